"""Short answers about pictures, from any data set that can be trained on: LLaVA JSON, parquet (the_cauldron's DAQUAR), or
easy-vqa's questions.json.

Rule: equal after EvalAI normalisation, 1 or 0 (`answers.normalise_evalai`). The prompt is the question as the data has it.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from llama3v.data.sources.base import FileImage, Sample, open_source
from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.answers import normalise_evalai
from llama3v.evaluate.tasks.base import Task, TaskSample


class ShortAnswers(Task):
    name = "short"
    rule = "exact match after EvalAI normalisation"

    def _samples(self) -> Iterator[TaskSample]:
        path = Path(str(self.where)).expanduser()
        if path.name == "questions.json":
            yield from _easy_vqa(path)
            return
        for row in open_source(str(self.where)):
            if not isinstance(row, Sample):
                raise DataError(f"{path.name}: row {row.id} cannot be used: {row.reason}")
            yield from _questions(row)

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        """Also "" of "A", which normalises to nothing, as a reference "a" does."""
        return normalise_evalai(answer) if answer.strip() else None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in [normalise_evalai(reference) for reference in sample.references])


def _questions(row: Sample) -> Iterator[TaskSample]:
    """Every question with its answer, alone, about all images of the row."""
    for number, (question, answer) in enumerate(pairwise(row.turns)):
        if question.role == "user" and answer.role == "assistant":
            picture = "|".join(image.name for image in row.images)
            yield TaskSample(f"{row.id}/{number}", row.images, question.text, (answer.text,), cluster=picture)


def _easy_vqa(path: Path) -> Iterator[TaskSample]:
    """[question, answer, image id] in a list, the pictures in images/ beside it (PyPI: easy-vqa)."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 3:
            raise DataError(f"{path.name}#{number}: expected [question, answer, image id], found {row!r:.60}")
        question, answer, image = map(str, row)
        kind = "yes or no" if answer in ("yes", "no") else "shape or colour"
        picture = FileImage(f"images/{image}.png", path.parent)
        yield TaskSample(f"{path.name}#{number}", (picture,), question, (answer,), kind, cluster=image)
