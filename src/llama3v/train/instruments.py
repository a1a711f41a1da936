"""All that measures and watches a run, opened in one place.

Meter, metrics, pace of checkpoints, display, trackers, loss alarm, sample answers, budget.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from llama3v.config import TrainConfig
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.alarm import Alarm
from llama3v.train.batches import RowPlan
from llama3v.train.checkpoint import Checkpoint
from llama3v.train.display import Display
from llama3v.train.gemm import gemm_rate
from llama3v.train.meter import Device, Meter, MetricsLog, Record, peak_memory, read_metrics, trim_metrics
from llama3v.train.names import names_of
from llama3v.train.pace import Pace
from llama3v.train.parallel.placement import Placement
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.prepared import PreparedData
from llama3v.train.resume import plain
from llama3v.train.samples import Questions, SampleAnswers
from llama3v.train.signals import StopRequest
from llama3v.train.trackers import tracked
from llama3v.train.watch import Budget
from llama3v.train.work import work_of

METRICS = "metrics.jsonl"


@dataclass
class Instruments:
    """See above. `watchers` is what the loop calls after every step; rank 0 has more of them than the others."""

    config: TrainConfig
    title: str
    meter: Meter
    metrics: MetricsLog
    pace: Pace
    data: PreparedData
    plan: RowPlan
    answers: SampleAnswers
    is_main: bool = True
    answers_come: bool = True  # a model whose weights are shared out computes only where all ranks do
    watchers: list[Callable[[Record], None]] = field(default_factory=list)

    @contextmanager
    def watching(self, console: Console, done: int, stop: StopRequest) -> Iterator[Display]:
        """While entered, steps are shown, tracked and watched. `done`: steps before this part of the run."""
        config = self.config
        priced = config.dollars_per_hour > 0
        display = Display(console, self.title, self.meter.steps, done, priced=priced, budget=config.budget)
        if self.is_main:
            alarm = Alarm(config.out, self._names, display.say, stop if config.stop_on_alarm else None)
            alarm.resume(done, read_metrics(self.metrics.path))
            self.answers.resume(done)
            self.watchers.append(alarm.after_step)
            if self.answers_come:
                self.watchers.append(self.answers.after_step)
            elif config.sample_every is not None:
                display.say(
                    "no sample answers: the weights are shared out among the processes (--parallel ddp has them)"
                )
        if config.budget is not None:
            budget = Budget(config.budget, self.meter, self.pace, stop)
            budget.after_step()
            self.watchers.append(budget.after_step)
        try:
            trackers = config.trackers if self.is_main else ()
            with tracked(trackers, config.out, self.title, plain(config), done) as tell, display:
                self.metrics.listeners += [display.show, tell]
                yield display
        finally:
            self.metrics.close()

    def _names(self, step: int) -> list[str]:
        """The ids of a step's samples; steps count from 1."""
        return names_of(self.data.directory, [sample for row in self.plan.rows(step - 1) for sample in row])


def open_instruments(
    config: TrainConfig,
    title: str,
    placed: Placement,
    checkpoint: Checkpoint | None,
    steps: int,
    begun: float,
    *,
    data: PreparedData,
    plan: RowPlan,
    questions: Questions,
) -> Instruments:
    """The instruments as they stood at the checkpoint; only the time that was spent after it stays spent.

    Args:
        placed: the model where it computes, with what trains marked.
        begun: when this part of the run began (perf_counter): loading and preparing belong to the price.
        data, plan: what is trained on, and when. questions: whose answers are shown.
    """
    state: dict[str, Any] = checkpoint.state if checkpoint else {"step": 0, "seconds": 0.0, "counts": {}}
    path, model, ranks = config.out / METRICS, placed.model, placed.ranks
    spent = max(trim_metrics(path, state["step"]) if ranks.is_main else 0.0, state["seconds"])
    device = _device(config, model, ranks)
    seconds = spent + perf_counter() - begun
    return Instruments(
        config=config,
        title=title,
        meter=Meter(steps, config.dollars_per_hour, seconds, state["counts"], device),
        metrics=MetricsLog(path, writes=ranks.is_main),
        pace=Pace(config.checkpoint_every, config.preemption_hours, agreed=ranks.of_main),
        data=data,
        plan=plan,
        answers=SampleAnswers(config.out, model, questions, config.sample_every, steps),
        is_main=ranks.is_main,
        answers_come=not placed.sharded,
    )


def _device(config: TrainConfig, model: Llama3VForConditionalGeneration, ranks: Ranks) -> Device:
    place = model.projector.norm.weight.device
    on_gpu = place.type == "cuda"
    return Device(
        flops=work_of(model, live_trunk=config.mode != "features").flops,
        gemm_rate=gemm_rate(place, bf16=config.precision == "bf16"),
        memory=(lambda: torch.cuda.max_memory_allocated(place)) if on_gpu else peak_memory,
        processes=ranks.count,
        summed=ranks.summed,
    )
