"""Ask an engine the samples of a task, with the right image, with another sample's, and blind; and go on after a kill.

What a model scores without the image, or with a wrong one, belongs beside its score: only the difference is sight.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TypeAlias

from llama3v.data.sources.base import ImageRef
from llama3v.engines.base import BatchEngine, EngineImage, Question
from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, append_records, read_records
from llama3v.evaluate.sight import CONDITIONS, OVERVIEW
from llama3v.evaluate.specs import image_keys
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
    keys: Mapping[ImageRef, str] | None = None,
    limit: int | None = None,
    batch: int = 16,
    show: Show = show_file,
    advance: Callable[[int], object] = lambda count: None,
) -> list[AnswerRecord]:
    """The records of every sample under each condition, greedily answered; those that `out` holds are not asked again,
    but read and scored anew, by the rule and the references of now.

    `out` is a JSONL file of one model's answers. `samples`: instead of the task's first `limit`. `keys`: the hashes of
    their images' files, where they are known. `show`: what the engine is given of an image. `advance` is told how many
    answers came, or were there already. Raises DataError where `out` holds answers to other prompts, or no picture can
    stand in for another (before anything is asked); ImageError for one that cannot be read.
    """
    samples = list(task.samples(limit)) if samples is None else samples
    keys = image_keys(samples) if keys is None else keys
    shown = {condition: images_shown(samples, condition, keys) for condition in conditions}
    known = {record.key: record for record in read_records(out)}
    records: list[AnswerRecord] = []
    for condition in conditions:
        waiting: list[int] = []
        for index, sample in enumerate(samples):
            record = known.get((task.name, condition, sample.id))
            images = shown[condition][index]
            if record is None or record.pictures != _hashes(images, keys):
                waiting.append(index)  # more samples give some another wrong image than before; or a file has changed
            elif record.prompt != sample.prompt:
                raise DataError(
                    f"{out}: sample {sample.id} of {task.name} was asked with another prompt; move the file away"
                )
            else:
                records.append(_record(task, sample, condition, images, keys, record.answer))
        advance(len(samples) - len(waiting))
        for start in range(0, len(waiting), batch):
            some = [(samples[index], shown[condition][index]) for index in waiting[start : start + batch]]
            questions = [_question(sample, [show(image, condition) for image in images]) for sample, images in some]
            answers = engine.answer_batch(questions, max_new_tokens=task.max_new_tokens)
            made = [
                _record(task, sample, condition, images, keys, answer)
                for (sample, images), answer in zip(some, answers, strict=True)
            ]
            append_records(out, made)
            records += made
            advance(len(made))
    return records


def images_shown(
    samples: Sequence[TaskSample], condition: str, keys: Mapping[ImageRef, str]
) -> list[tuple[ImageRef, ...]]:
    """The images that each sample is asked about under a condition. `keys`: the hashes of their files.

    Raises DataError where no picture can stand in for a sample's own.
    """
    if condition in ("right image", OVERVIEW):
        return [sample.images for sample in samples]
    if condition == "blind":
        return [() for _ in samples]
    if condition != "wrong image":
        raise ValueError(f"expected a condition out of {', '.join(CONDITIONS)}, found {condition!r}")
    return [_wrong_images(samples, index, keys) for index in range(len(samples))]


def _wrong_images(samples: Sequence[TaskSample], index: int, keys: Mapping[ImageRef, str]) -> tuple[ImageRef, ...]:
    """As many images as the sample has, of the next samples about other pictures, going round; if all of those have
    fewer, some twice.
    """
    sample = samples[index]
    if not sample.images:
        return ()
    own = _hashes(sample.images, keys)
    others = (samples[(index + step) % len(samples)] for step in range(1, len(samples)))
    strangers = (other for other in others if not sample.cluster or other.cluster != sample.cluster)
    found = list(islice((one for other in strangers for one in other.images if keys[one] not in own), len(own)))
    if not found:
        raise DataError(
            f"sample {sample.id}: no other picture can stand in for its own; take more samples (--limit), or measure "
            "without controls (--no-controls)"
        )
    return tuple(islice(cycle(found), len(own)))


def _hashes(images: Sequence[ImageRef], keys: Mapping[ImageRef, str]) -> tuple[str, ...]:
    return tuple(keys[image] for image in images)


def _question(sample: TaskSample, images: Sequence[EngineImage]) -> Question:
    return [Turn("user", sample.prompt, tuple(range(len(images))))], images


def _record(
    task: Task,
    sample: TaskSample,
    condition: str,
    images: Sequence[ImageRef],
    keys: Mapping[ImageRef, str],
    answer: str,
) -> AnswerRecord:
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
        pictures=_hashes(images, keys),
    )
