"""The training loop: assemble, step (step.py), measure, checkpoint. Both stages run this one, on one rank or on many."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch

from llama3v.errors import CacheError, ConfigError, DataError
from llama3v.train.batches import Ahead, Batch, Pass
from llama3v.train.checkpoint import Checkpoint
from llama3v.train.features.base import FeatureSource, StoppedError
from llama3v.train.meter import COUNTED, Meter, MetricsLog, Record
from llama3v.train.pace import Pace
from llama3v.train.parallel.placement import Placement
from llama3v.train.parallel.ranks import lost, means_lost
from llama3v.train.saved_tensors import optimizer_tensors
from llama3v.train.saving import Saver
from llama3v.train.signals import StopRequest
from llama3v.train.step import train_step

MOST_BAD_STEPS = 5
"""Steps in a row without a finite loss after which the run stops."""


@dataclass
class Progress:
    """Where a run stands; with the weights and the moments it is all that resume needs."""

    step: int = 0  # finished steps
    skipped: int = 0  # of them, steps whose loss or gradient was not finite: counted, without an update
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Schedule:
    """How a run goes on from step to step."""

    steps: int
    passes_per_step: int
    warmup: float
    clip_norm: float
    seed: int
    validate_every: int | None

    def validates_after(self, step: int) -> bool:
        """Whether there is a validation, where there is anything to validate with, when so many steps are done."""
        return step == self.steps or (self.validate_every is not None and step % self.validate_every == 0)


@dataclass
class Loop:
    """One run's training, as this rank sees it.

    Attributes:
        placed: the model, and where it lies.
        make: number of a pass -> its rows (batches.make_pass).
        source: where their features come from.
        state: what every checkpoint stores beside the progress (see run.py).
        pace: says after which steps a checkpoint is due.
        watchers: are told each step's metrics line before it is written: they may add to it, and ask for a stop.
        validate: measures, and returns its part of a metrics line; None where there is nothing to measure on.
    """

    placed: Placement
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    make: Callable[[int], Pass]
    source: FeatureSource
    meter: Meter
    metrics: MetricsLog
    saver: Saver
    state: dict[str, Any]
    pace: Pace
    watchers: Sequence[Callable[[Record], None]] = ()
    validate: Callable[[], dict[str, Any]] | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.ranks = self.placed.ranks
        self.trained = {name: p for name, p in self.placed.model.named_parameters() if p.requires_grad}
        self._saved_at = self._told = self.progress.step

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; False where `stop` was asked for before (a checkpoint is written then)."""
        last, per_step = self.schedule.steps, self.schedule.passes_per_step
        ahead = Ahead(self.make, range(self.progress.step * per_step, last * per_step))
        try:
            while self.progress.step < last:
                self._tell_source()
                try:
                    with self._keeping_work():
                        stopped = self.ranks.any(stop.requested is not None)  # on whichever: all stop at one step
                        record = {} if stopped else self._one_step(ahead)
                except StoppedError:  # asked for while a step waited for features
                    continue
                if stopped:
                    self.save(wait=True)
                    return False
                for watcher in self.watchers:
                    watcher(record)
                self.metrics.append(record)
                self._measure_if_due()
                if self.pace.due(self.progress.step) or self.progress.step == last:
                    self.save(wait=self.progress.step == last)
        finally:
            self.source.stop()
            ahead.close()
            self.saver.close()
        return True

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of where the run stands, if there is none of this step yet.

        Args:
            wait: until it is on the disk; otherwise it is written while training goes on.
        """
        begun = perf_counter()
        if self.progress.step != self._saved_at:
            self.metrics.sync()
            state = {
                **self.state,
                **asdict(self.progress),
                "seconds": self.meter.seconds,
                "counts": dict(self.meter.counts),  # they count on while it is written
            }
            self.saver.save(self.progress.step, state, self.trained, optimizer_tensors(self.optimizer))
            self._saved_at = self.progress.step
            if not wait:  # what it holds up training for, the rest of a save before it included
                self.pace.saved(self.progress.step, perf_counter() - begun, self.meter.step_seconds)
        if wait:
            self.saver.wait()
            self._tell_source()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        checkpoint.restore(self.trained, self.optimizer, self.ranks)
        self.progress = Progress(**{name: checkpoint.state[name] for name in asdict(Progress())})
        self._saved_at = self._told = self.progress.step

    def _tell_source(self) -> None:
        """Of a checkpoint that has become whole since the last time."""
        self.saver.look()
        if self.saver.committed is not None and self.saver.committed != self._told:
            self._told = self.saver.committed
            self.source.checkpointed(self._told)

    @contextmanager
    def _keeping_work(self) -> Iterator[None]:
        """Write a checkpoint of the steps before, where the next one cannot be finished."""
        try:
            yield
        except (CacheError, DataError, StoppedError):  # no features, here or on another rank: keep the steps before
            self.optimizer.zero_grad(set_to_none=True)
            self.save(wait=True)
            raise
        except RuntimeError as error:
            if self.ranks.alone or not means_lost(error):
                raise
            if not self.placed.sharded and self.ranks.is_main:  # it has all it takes, and needs nobody
                self.optimizer.zero_grad(set_to_none=True)
                self.save(wait=True)
            raise lost(self.ranks, error) from error

    def _one_step(self, ahead: "Ahead[Pass]") -> dict[str, Any]:
        begun, waited = perf_counter(), ahead.waited
        factor = learning_rate_factor(self.progress.step, self.schedule.steps, self.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        epochs: list[int] = []

        torch.manual_seed(seed_of(self.schedule.seed, self.progress.step, self.ranks.number))

        def passes() -> Iterator[tuple[Batch, int]]:
            for number in range(self.schedule.passes_per_step):
                one = self._next(ahead)
                self.placed.before_pass(last=number == self.schedule.passes_per_step - 1)
                counts.update({name: getattr(one.batch, name) for name in COUNTED})
                epochs.append(one.epoch)
                yield one.batch, one.supervised_of_step

        parameters = list(self.trained.values())
        loss, norm = train_step(self.placed, self.optimizer, passes(), parameters, clip_norm=self.schedule.clip_norm)
        self._count(math.isfinite(loss) and math.isfinite(norm))
        return {
            "step": self.progress.step,
            "epoch": epochs[0],
            "loss": loss if math.isfinite(loss) else None,  # JSON knows no NaN
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "skipped": self.progress.skipped,
            **self.meter.step(self.progress.step, dict(counts), perf_counter() - begun, ahead.waited - waited),
        }

    def _next(self, ahead: "Ahead[Pass]") -> Pass:
        """The next pass, if every rank has one; where one has not, none goes on."""
        failure = None
        try:
            one = ahead.next()
        except (CacheError, DataError, StoppedError) as error:
            failure = error
        if self.ranks.any(failure is not None):
            raise failure or DataError("another process could not read what it trains on; its message says why")
        return one

    def _count(self, finite: bool) -> None:
        self.progress.step += 1
        self.progress.skipped += not finite
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        if self.progress.skipped_in_a_row >= MOST_BAD_STEPS:
            last = self.progress.step
            raise ConfigError(
                f"the loss or its gradient was not finite in {MOST_BAD_STEPS} steps in a row "
                f"({last - MOST_BAD_STEPS + 1} to {last} of {self.schedule.steps}), none of which changed the weights; "
                "train with a lower --learning-rate or --precision fp32 in another --out"
            )

    def _measure_if_due(self) -> None:
        """Before the checkpoint of the same step: its metrics line is then neither lost nor written twice."""
        step = self.progress.step
        if self.validate and self.schedule.validates_after(step):
            self.metrics.append({"step": step, **self.validate(), "seconds": round(self.meter.seconds, 2)})


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to zero; `step` counts from 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def seed_of(seed: int, step: int, rank: int) -> int:
    """What random numbers of a step (dropout) start from: a pure function, so that no generator's state is stored."""
    words = f"{seed} {step} {rank}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big")
