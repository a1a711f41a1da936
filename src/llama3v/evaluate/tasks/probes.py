"""Synthetic probes: drawn scenes and questions with one exact answer, made anew from a seed, nothing to download.

Rule: equal but for case and a final full stop, as `llama3v quickstart` scores them (`sight.same_answer`). The scenes are of a
split of their own, which no recipe trains on or reports.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from llama3v.data.sources.base import ImageRef
from llama3v.data.synthetic.dataset import QUESTIONS_PER_SCENE, WEIGHTS, magnification_of, make_scenes
from llama3v.data.synthetic.language import choose, questions
from llama3v.data.synthetic.scenes import Scene, draw
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.sight import same_answer
from llama3v.evaluate.tasks.base import Task, TaskSample

SPLIT = "evaluate"
SCENES = 150


@dataclass(frozen=True)
class SceneImage(ImageRef):
    """A scene, drawn when it is read."""

    scene: Scene

    def read(self) -> bytes:
        file = io.BytesIO()
        draw(self.scene, magnification_of(self.scene)).save(file, "PNG")
        return file.getvalue()


class Probes(Task):
    name = "probes"
    rule = "exact match but for case and a final full stop"

    def __init__(self, where: str | None = None) -> None:
        """`where` is taken for the sake of the others' form; there is nothing to read."""
        self.where = where

    def _samples(self) -> Iterator[TaskSample]:
        for scene in make_scenes(SPLIT, SCENES):
            rng = random.Random(scene.seed + "/conversation")
            image = SceneImage(f"{scene.seed}.png", scene)
            for number, asked in enumerate(choose(questions(scene, rng), QUESTIONS_PER_SCENE, WEIGHTS, rng)):
                yield TaskSample(
                    f"{scene.seed}/{number}", (image,), asked.text, (asked.answer,), asked.kind, cluster=scene.seed
                )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return answer.strip().rstrip(".") or None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(isinstance(parsed, str) and same_answer(parsed, sample.references[0]))
