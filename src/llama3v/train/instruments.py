"""All that measures and watches a run, opened in one place: meter, metrics, pace of checkpoints, budget, display."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from llama3v.config import TrainConfig
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.checkpoint import Checkpoint
from llama3v.train.display import Display
from llama3v.train.gemm import gemm_rate
from llama3v.train.meter import Device, Meter, MetricsLog, Record, peak_memory, trim_metrics
from llama3v.train.pace import Pace
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.signals import StopRequest
from llama3v.train.watch import Budget
from llama3v.train.work import work_of

METRICS = "metrics.jsonl"


@dataclass
class Instruments:
    """See above. `watchers` is what the loop calls after every step."""

    config: TrainConfig
    title: str
    meter: Meter
    metrics: MetricsLog
    pace: Pace
    watchers: list[Callable[[Record], None]] = field(default_factory=list)

    @contextmanager
    def watching(self, console: Console, done: int, stop: StopRequest) -> Iterator[Display]:
        """While entered, steps are shown and watched. `done`: steps before this part of the run."""
        config = self.config
        priced = config.dollars_per_hour > 0
        display = Display(console, self.title, self.meter.steps, done, priced=priced, budget=config.budget)
        self.metrics.listeners.append(display.show)
        if config.budget is not None:
            budget = Budget(config.budget, self.meter, self.pace, stop)
            budget.after_step()
            self.watchers.append(budget.after_step)
        try:
            with display:
                yield display
        finally:
            self.metrics.close()


def open_instruments(
    config: TrainConfig,
    title: str,
    model: Llama3VForConditionalGeneration,
    checkpoint: Checkpoint | None,
    steps: int,
    begun: float,
    ranks: Ranks,
) -> Instruments:
    """The instruments as they stood at the checkpoint; only the time that was spent after it stays spent.

    Args:
        model: on its device, with what trains marked.
        begun: when this part of the run began (perf_counter): loading and preparing belong to the price.
    """
    state: dict[str, Any] = checkpoint.state if checkpoint else {"step": 0, "seconds": 0.0, "counts": {}}
    path = config.out / METRICS
    spent = max(trim_metrics(path, state["step"]) if ranks.is_main else 0.0, state["seconds"])
    device = _device(config, model, ranks)
    seconds = spent + perf_counter() - begun
    meter = Meter(steps, config.dollars_per_hour, seconds, state["counts"], device)
    metrics = MetricsLog(path, writes=ranks.is_main)
    pace = Pace(config.checkpoint_every, config.preemption_hours, agreed=ranks.of_main)
    return Instruments(config, title, meter, metrics, pace)


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
