"""What `--tasks` and `--data` say: which tasks, on which data, under which label."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llama3v.data.sources.base import ImageRef
from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.tasks import TASKS, open_task
from llama3v.evaluate.tasks.base import Task, TaskSample
from llama3v.model.tiles import image_key

NEEDS_NO_DATA = ("probes",)
_SUFFIXES = ("", ".parquet", ".json", ".jsonl", ".tsv")


@dataclass(frozen=True)
class TaskSpec:
    """A task as it was asked for. `label` names its files and rows; `where` is None for the task's own data set."""

    name: str
    label: str
    where: str | None

    def open(self) -> Task:
        """Raises DataError where the task has no place to read from."""
        return open_task(self.name if self.where is None else f"{self.name}={self.where}")


@dataclass(frozen=True)
class LoadedTask:
    """A task and those of its samples that are asked."""

    spec: TaskSpec
    task: Task
    samples: Sequence[TaskSample]

    @cached_property
    def keys(self) -> dict[ImageRef, str]:
        """Image -> hash of its file's bytes, as the feature cache names it. Raises ImageError."""
        return image_keys(self.samples)

    @cached_property
    def digest(self) -> str:
        """Of everything that is asked and expected: ids, prompts, references, pictures, in their order; 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            pictures = [self.keys[image] for image in sample.images]
            row = [sample.id, sample.prompt, list(sample.references), pictures]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()


def image_keys(samples: Sequence[TaskSample]) -> dict[ImageRef, str]:
    """Image -> hash of its file's bytes, of all the samples' images. Raises ImageError."""
    images = dict.fromkeys(image for sample in samples for image in sample.images)
    return {image: image_key(image.read()) for image in images}


def parse_specs(texts: Sequence[str], data: Path | None) -> list[TaskSpec]:
    """The tasks that texts such as "mmmu,ai2d" or "short:daquar=daquar/test.parquet" name, in their order.

    Raises ConfigError for an unknown task and for a label that stands twice, DataError where a task has no data.
    """
    specs = [_spec(text, data) for text in ",".join(texts).split(",") if text.strip()]
    if not specs:
        raise ConfigError(f"--tasks is empty; give some of {', '.join(TASKS)}")
    labels = [spec.label for spec in specs]
    for spec in specs:
        if labels.count(spec.label) > 1:
            raise ConfigError(f"task {spec.label} stands twice; tell the two apart: {spec.name}:LABEL=PATH")
    return specs


def load(spec: TaskSpec, limit: int | None) -> LoadedTask:
    """Raises DataError where the data cannot be read or has no sample."""
    task = spec.open()
    samples = list(task.samples(limit))
    if not samples:
        raise DataError(f"{spec.label}: no samples in {spec.where or task.name}")
    return LoadedTask(spec, task, samples)


def _spec(text: str, data: Path | None) -> TaskSpec:
    head, _, where = text.strip().partition("=")
    name, _, label = head.partition(":")
    if name not in TASKS:
        raise ConfigError(f"expected a task out of {', '.join(TASKS)}, found {name!r}")
    if not re.fullmatch(r"[\w.-]*", label):
        raise ConfigError(f"expected a label of letters, digits, '-' and '_', found {label!r}")
    return TaskSpec(name, label or name, _place(name, where, data))


def _place(name: str, where: str, data: Path | None) -> str | None:
    """Where to read: PATH under `data` if it is there, PATH as it is otherwise, <data>/NAME without a PATH."""
    if data is None or name in NEEDS_NO_DATA:
        return where or None
    if where:
        return str(data / where) if (data / where).exists() else where
    found = next((place for suffix in _SUFFIXES if (place := data / (name + suffix)).exists()), None)
    if found is None:
        raise DataError(f"{name}: expected {data / name}, found nothing; give its place as {name}=PATH")
    return str(found)
