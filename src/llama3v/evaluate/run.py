"""Ask an engine the samples of a task, with the right image, with another sample's, and blind; and go on after a kill.

What a model scores without the image, or with a wrong one, belongs beside its score: only the difference is sight.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from llama3v.data.sources.base import ImageRef
from llama3v.engines.base import BatchEngine, EngineImage, Question
from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, append_records, read_records
from llama3v.evaluate.sight import CONDITIONS, OVERVIEW
from llama3v.evaluate.tasks.base import Task, TaskSample
from llama3v.model.prompt import Turn

Show: TypeAlias = Callable[[ImageRef, str], EngineImage]
"""What an engine is given of an image under a condition."""


def show_file(image: ImageRef, condition: str) -> EngineImage:
    """The bytes of the image's file."""
    return image.read()


def answer_task(
    engine: BatchEngine,
    task: Task,
    out: Path,
    *,
    conditions: Sequence[str] = CONDITIONS,
    samples: Sequence[TaskSample] | None = None,
    limit: int | None = None,
    batch: int = 16,
    show: Show = show_file,
    advance: Callable[[int], object] = lambda count: None,
) -> list[AnswerRecord]:
    """The records of every sample under each condition, greedily answered; those that `out` holds are not asked again.

    `out` is a JSONL file of one model's answers. `samples`: instead of the task's first `limit`. `show`: what the engine
    is given of an image. `advance` is told how many answers came, or were there already. Raises DataError where `out`
    holds answers to other prompts, or no picture can stand in for another; ImageError for one that cannot be read.
    """
    samples = list(task.samples(limit)) if samples is None else samples
    known = {record.key: record for record in read_records(out)}
    records: list[AnswerRecord] = []
    for condition in conditions:
        shown = images_shown(samples, condition)
        waiting: list[int] = []
        for index, sample in enumerate(samples):
            record = known.get((task.name, condition, sample.id))
            if record is None or record.images != tuple(image.name for image in shown[index]):
                waiting.append(index)  # more samples give some another wrong image than before
            elif record.prompt != sample.prompt:
                raise DataError(
                    f"{out}: sample {sample.id} of {task.name} was asked with another prompt; move the file away"
                )
            else:
                records.append(record)
        advance(len(samples) - len(waiting))
        for start in range(0, len(waiting), batch):
            some = waiting[start : start + batch]
            questions = [
                _question(samples[index], [show(image, condition) for image in shown[index]]) for index in some
            ]
            answers = engine.answer_batch(questions, max_new_tokens=task.max_new_tokens)
            made = [
                _record(task, samples[index], condition, shown[index], answer)
                for index, answer in zip(some, answers, strict=True)
            ]
            append_records(out, made)
            records += made
            advance(len(made))
    return records


def images_shown(samples: Sequence[TaskSample], condition: str) -> list[tuple[ImageRef, ...]]:
    """The images that each sample is asked about under a condition."""
    if condition in ("right image", OVERVIEW):
        return [sample.images for sample in samples]
    if condition == "blind":
        return [() for _ in samples]
    if condition != "wrong image":
        raise ValueError(f"expected a condition out of {', '.join(CONDITIONS)}, found {condition!r}")
    alike: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(len(sample.images), []).append(index)
    return [_wrong_images(samples, index, alike[len(sample.images)]) for index, sample in enumerate(samples)]


def _wrong_images(samples: Sequence[TaskSample], index: int, alike: Sequence[int]) -> tuple[ImageRef, ...]:
    """Those of the next sample, going round, that has as many images and another picture."""
    sample, place = samples[index], bisect_left(alike, index)
    for step in range(1, len(alike)):
        other = samples[alike[(place + step) % len(alike)]]
        if _picture(other) != _picture(sample):
            return other.images
    raise DataError(f"sample {sample.id}: no other picture can stand in for its own; take more samples (--limit)")


def _picture(sample: TaskSample) -> object:
    return sample.cluster or tuple(image.name for image in sample.images)


def _question(sample: TaskSample, images: Sequence[EngineImage]) -> Question:
    return [Turn("user", sample.prompt, tuple(range(len(images))))], images


def _record(task: Task, sample: TaskSample, condition: str, images: Sequence[ImageRef], answer: str) -> AnswerRecord:
    grade = task.grade(answer, sample)
    return AnswerRecord(
        task=task.name,
        id=sample.id,
        condition=condition,
        category=sample.category,
        cluster=sample.cluster,
        images=tuple(image.name for image in images),
        prompt=sample.prompt,
        answer=answer,
        parsed=grade.parsed,
        references=sample.references,
        score=grade.score,
    )
