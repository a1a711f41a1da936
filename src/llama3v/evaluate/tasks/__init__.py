"""The benchmarks, one file each, by name."""

from importlib import import_module
from typing import TYPE_CHECKING

from llama3v.errors import ConfigError

if TYPE_CHECKING:
    from llama3v.evaluate.tasks.base import Task

TASKS = {
    "mmmu": "mmmu:Mmmu",
    "mathvista": "mathvista:MathVista",
    "ai2d": "ai2d:Ai2d",
    "chartqa": "chartqa:ChartQa",
    "docvqa": "docvqa:DocVqa",
    "textvqa": "textvqa:TextVqa",
    "vqav2": "vqav2:VqaV2",
    "scienceqa": "scienceqa:ScienceQa",
    "mmbench": "mmbench:MmBench",
    "pope": "pope:Pope",
    "seedbench": "seedbench:SeedBench",
    "llavabench": "llava_bench:LlavaBench",
    "captions": "captions:Captions",
    "short": "short_answers:ShortAnswers",
    "probes": "probes:Probes",
}


def open_task(spec: str) -> "Task":
    """The task that `NAME` or `NAME=PATH` says; PATH is a file, a folder or a hub data set (owner/name).

    Raises ConfigError for an unknown name, DataError where a task has no place to read from.
    """
    name, _, where = spec.partition("=")
    if name not in TASKS:
        raise ConfigError(f"expected a task out of {', '.join(TASKS)}, found {name!r}")
    module, _, kind = TASKS[name].partition(":")
    task: Task = getattr(import_module(f"{__name__}.{module}"), kind)(where or None)
    return task
