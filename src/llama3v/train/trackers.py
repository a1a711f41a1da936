"""Trackers: other places that a run's figures go to, beside metrics.jsonl. None is imported unless it is asked for.

A tracker is two methods. To add one: a class here, a line in `_KINDS`, its name in config.Tracker, an extra in
pyproject.toml.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from llama3v.errors import ConfigError
from llama3v.train.meter import Record

PROJECT = "llama3v"
RUN_ID = "tracker-run.json"


class Tracker(Protocol):
    """Somewhere figures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after a step. After a resume, steps come again from the one after the checkpoint."""

    def close(self) -> None:
        """No more figures come in this part of the run."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        id: the same in all parts of the run, and in no other run.
        step: the last one of the checkpoint that this part goes on from; 0 at the start.
    """

    out: Path
    id: str
    title: str
    options: Mapping[str, Any]
    step: int


class TensorBoard:
    """Event files in out/tensorboard: `tensorboard --logdir OUT`."""

    def __init__(self, run: TrackedRun) -> None:
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted part wrote after its checkpoint is not shown any more
        self._writer: Any = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B; without a network, WANDB_MODE=offline keeps it in out/wandb."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project=PROJECT, id=run.id, name=run.out.name, config=dict(run.options), dir=str(run.out), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine: `trackio show`."""

    def __init__(self, run: TrackedRun) -> None:
        self._trackio = _import("trackio", "trackio")
        self._trackio.init(
            project=PROJECT, name=f"{run.out.name}-{run.id}", config=dict(run.options), resume="allow", embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


_KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


@contextmanager
def tracked(
    names: Sequence[str], out: Path, title: str, options: Mapping[str, Any], step: int
) -> Iterator[Callable[[Record], None]]:
    """Open trackers by name; gives what is to be told each line of metrics.

    Raises ConfigError where the package of one is not installed.
    """
    trackers: list[Tracker] = []
    try:
        if names:
            run = TrackedRun(out, _run_id(out, fresh=step == 0), title, options, step)
            for name in names:
                trackers.append(_KINDS[name](run))  # one by one: those that are open are closed if the next fails

        def tell(record: Record) -> None:
            values = {name: value for name, value in record.items() if _is_figure(value) and name != "step"}
            for tracker in trackers:
                tracker.log(record["step"], values)

        yield tell
    finally:
        for tracker in trackers:
            tracker.close()


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _run_id(out: Path, *, fresh: bool) -> str:
    """A name of its own for every run, kept for its later parts."""
    path = out / RUN_ID
    if fresh or not path.is_file():
        path.write_text(json.dumps({"id": secrets.token_hex(4)}))
    return str(json.loads(path.read_text())["id"])


def _import(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(f"the tracker {extra} is not installed; pip install 'llama3v[{extra}]'") from error
