"""The training loop: assemble, forward, backward, step; measure; checkpoint. Both stages run this one.

features at the cut --top, projector--> visual tokens --splice--> embeddings --LLM--> hidden states
--LM head, at supervised positions only--> loss, summed over the passes of the step
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from llama3v.errors import CacheError, ConfigError, DataError
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.batches import Ahead, Batch, Pass, attention_mask
from llama3v.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    optimizer_tensors,
    restore_optimizer,
    restore_weights,
)
from llama3v.train.features.base import FeatureSource, StoppedError
from llama3v.train.loss import supervised_loss
from llama3v.train.meter import COUNTED, Meter, MetricsLog, Record
from llama3v.train.pace import Pace
from llama3v.train.signals import StopRequest

MOST_BAD_STEPS = 5
"""Steps in a row without a finite loss after which the run stops."""


@dataclass
class Progress:
    """Where a run stands; with the weights, the moments and the random state it is all that resume needs."""

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
    bf16: bool
    validate_every: int | None

    def validates_after(self, step: int) -> bool:
        """Whether there is a validation, where there is anything to validate with, when so many steps are done."""
        return step == self.steps or (self.validate_every is not None and step % self.validate_every == 0)


@dataclass
class Loop:
    """One run's training.

    Attributes:
        make: number of a pass -> its rows (batches.make_pass).
        source: where their features come from.
        state: what every checkpoint stores beside the progress (see run.py).
        pace: says after which steps a checkpoint is due.
        watchers: are told each step's metrics line before it is written: they may add to it, and ask for a stop.
        validate: measures, and returns its part of a metrics line; None where there is nothing to measure on.
    """

    model: Llama3VForConditionalGeneration
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    make: Callable[[int], Pass]
    source: FeatureSource
    meter: Meter
    metrics: MetricsLog
    checkpoints: Checkpoints
    state: dict[str, Any]
    pace: Pace
    watchers: Sequence[Callable[[Record], None]] = ()
    validate: Callable[[], dict[str, Any]] | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._saved_at = self.progress.step

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; False where `stop` was asked for before (a checkpoint is written then)."""
        last, per_step = self.schedule.steps, self.schedule.passes_per_step
        ahead = Ahead(self.make, range(self.progress.step * per_step, last * per_step))
        try:
            while self.progress.step < last:
                if stop.requested:
                    self.save()
                    return False
                try:
                    record = self._step_or_save(ahead)
                except StoppedError:  # asked for while a step waited for features
                    continue
                for watcher in self.watchers:
                    watcher(record)
                self.metrics.append(record)
                self._measure_if_due()
                if self.pace.due(self.progress.step) or self.progress.step == last:
                    self.save()
        finally:
            self.source.stop()
            ahead.close()
        return True

    def save(self) -> None:
        """Write a checkpoint of where the run stands, if there is none of this step yet."""
        if self.progress.step == self._saved_at:
            return
        begun = perf_counter()
        self.metrics.sync()
        state = {
            **self.state,
            **asdict(self.progress),
            "rng": random_state(),
            "seconds": self.meter.seconds,
            "counts": self.meter.counts,
        }
        self.checkpoints.save(self.progress.step, state, dict(self.trained), optimizer_tensors(self.optimizer))
        self._saved_at = self.progress.step
        self.pace.saved(self.progress.step, perf_counter() - begun, self.meter.step_seconds)
        self.source.checkpointed(self.progress.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        restore_weights(self.trained, checkpoint.weights)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        set_random_state(checkpoint.state["rng"])
        self.progress = Progress(**{name: checkpoint.state[name] for name in asdict(Progress())})
        self._saved_at = self.progress.step

    def _step_or_save(self, ahead: "Ahead[Pass]") -> dict[str, Any]:
        before = random_state()
        try:
            return self._one_step(ahead)
        except (CacheError, DataError, StoppedError):  # no features: keep the work of the steps before
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(before)  # passes of this step may have drawn from it
            self.save()
            raise

    def _one_step(self, ahead: "Ahead[Pass]") -> dict[str, Any]:
        begun, waited = perf_counter(), ahead.waited
        factor = learning_rate_factor(self.progress.step, self.schedule.steps, self.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        epochs: list[int] = []

        def passes() -> Iterator[tuple[Batch, int]]:
            for _ in range(self.schedule.passes_per_step):
                one = ahead.next()
                counts.update({name: getattr(one.batch, name) for name in COUNTED})
                epochs.append(one.epoch)
                yield one.batch, one.supervised_of_step

        parameters, schedule = list(self.trained.values()), self.schedule
        loss, norm = train_step(
            self.model, self.optimizer, passes(), parameters, clip_norm=schedule.clip_norm, bf16=schedule.bf16
        )
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


def train_step(
    model: Llama3VForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    passes: Iterable[tuple[Batch, int]],
    parameters: Sequence[nn.Parameter],
    *,
    clip_norm: float,
    bf16: bool = False,
) -> tuple[float, float]:
    """One optimizer step; returns (loss per supervised token, gradient norm).

    Where one of the two is not finite, the weights and the optimizer stay as they are.

    Args:
        passes: batches, each with the number of supervised tokens of *all* of them.
        parameters: what trains.
    """
    device = parameters[0].device
    loss = torch.zeros((), device=device)
    for batch, total in passes:
        batch = batch.to(device)
        with autocast(device, bf16):
            part = supervised_loss(hidden_states(model, batch), batch.targets, head_of(model), total)
        if part.requires_grad:  # it does not where only the projector trains and the pass has no image
            part.backward()
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only wait for the device
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


def hidden_states(model: Llama3VForConditionalGeneration, batch: Batch) -> Tensor:
    """The LLM's last hidden states where a label follows: [supervised, hidden]."""
    embeddings = model.embed(batch.ids, batch.features)  # [rows, length, hidden]
    mask = attention_mask(batch.segments)
    if model.llm.config._attn_implementation == "eager":  # adds its mask, where the others select by it
        mask = torch.zeros_like(mask, dtype=embeddings.dtype).masked_fill(~mask, torch.finfo(embeddings.dtype).min)
    hidden = model.llm.model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state  # [rows, length, hidden]
    return hidden.flatten(0, 1)[batch.predict_at]


def head_of(model: Llama3VForConditionalGeneration) -> Tensor:
    """Weight of the LM head, [vocabulary, hidden]."""
    return model.get_output_embeddings().weight  # type: ignore[return-value]


def set_modes(model: Llama3VForConditionalGeneration) -> None:
    """Dropout, where an LLM has any, acts in what trains. The tower keeps its evaluation mode: its norms stand still."""
    model.eval()
    for part in (model.projector, model.llm):
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


def autocast(device: torch.device, bf16: bool) -> Any:
    """bf16 matrix products under --precision bf16; nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to zero; `step` counts from 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def random_state() -> dict[str, str]:
    """torch's random state, in hexadecimal: the CPU's, and the GPU's where there is one."""
    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, str]) -> None:
    """Put what `random_state` returned back."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cpu"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
