"""The training loop: assemble, forward, backward, step; measure; checkpoint. Both stages run this one.

features at the cut --top, projector--> visual tokens --splice--> embeddings --LLM--> hidden states
--LM head, at supervised positions only--> loss, summed over the passes of the step
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.batches import Ahead, Batch, attention_mask
from llama3v.train.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer, restore_weights
from llama3v.train.loss import supervised_loss
from llama3v.train.meter import COUNTED, Meter, MetricsLog, ProgressLine
from llama3v.train.signals import StopRequest

MOST_BAD_STEPS = 5
"""Steps in a row without a finite loss after which the run stops."""


@dataclass
class Progress:
    """Where a run stands; with the weights, the moments and the random state it is all that resume needs."""

    step: int = 0  # finished steps
    skipped: int = 0  # of them, steps whose loss or gradient was not finite: counted, without an update
    skipped_in_a_row: int = 0


@dataclass
class Loop:
    """One run's training.

    Attributes:
        steps: of the whole run.
        make: step -> (its epoch, the batches of its passes).
        state: what every checkpoint stores beside the progress (see run.py).
        validate: measures and returns its part of a metrics line; called every `validate_every` steps.
        before_update: called with the step after its gradients are there; for fault tests.
    """

    model: Llama3VForConditionalGeneration
    optimizer: torch.optim.Optimizer
    steps: int
    make: Callable[[int], tuple[int, list[Batch]]]
    meter: Meter
    metrics: MetricsLog
    checkpoints: Checkpoints
    state: dict[str, Any]
    validate: Callable[[], dict[str, Any]]
    warmup: float = 0.03
    clip_norm: float = 1.0
    bf16: bool = False
    checkpoint_every: int = 200
    validate_every: int | None = None
    progress: Progress = field(default_factory=Progress)
    before_update: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._saved_at = self.progress.step

    def run(self, line: ProgressLine, stop: StopRequest) -> bool:
        """Train to the last step; False where `stop` was asked for before (a checkpoint is written then)."""
        ahead = Ahead(self.make, range(self.progress.step, self.steps))
        try:
            while self.progress.step < self.steps:
                if stop.requested:
                    self.save()
                    return False
                record = self._one_step(ahead)
                self.metrics.append(record)
                line.show(record)
                step = self.progress.step
                if self.validate_every and step % self.validate_every == 0 and step < self.steps:
                    self.metrics.append({"step": step, **self.validate()})
                if step % self.checkpoint_every == 0 or step == self.steps:
                    self.save()
        finally:
            ahead.close()
        return True

    def save(self) -> None:
        """Write a checkpoint of where the run stands, if there is none of this step yet."""
        step = self.progress.step
        if step == self._saved_at:
            return
        self.metrics.sync()
        state = {
            **self.state,
            **vars(self.progress),
            "rng": random_state(),
            "seconds": self.meter.seconds,
            "counts": self.meter.counts,
        }
        self.checkpoints.save(step, state, dict(self.trained), optimizer_tensors(self.optimizer))
        self._saved_at = step

    def restore(self, state: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        restore_weights(self.trained, weights)
        restore_optimizer(self.optimizer, moments)
        set_random_state(state["rng"])
        self.progress = Progress(**{name: state[name] for name in vars(Progress())})
        self._saved_at = self.progress.step

    def _one_step(self, ahead: "Ahead[tuple[int, list[Batch]]]") -> dict[str, Any]:
        begun, waited = perf_counter(), ahead.waited
        epoch, batches = ahead.next()
        waited = ahead.waited - waited
        factor = learning_rate_factor(self.progress.step, self.steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss, norm = train_step(
            self.model,
            self.optimizer,
            batches,
            list(self.trained.values()),
            clip_norm=self.clip_norm,
            bf16=self.bf16,
            before_update=lambda: self.before_update(self.progress.step),
        )
        self._count(math.isfinite(loss) and math.isfinite(norm))
        counts = {name: sum(_count_of(batch, name) for batch in batches) for name in COUNTED}
        step = self.progress.step
        return {
            "step": step,
            "epoch": epoch,
            "loss": loss if math.isfinite(loss) else None,  # JSON knows no NaN
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "skipped": self.progress.skipped,
            **self.meter.step(step, counts, perf_counter() - begun, waited),
        }

    def _count(self, finite: bool) -> None:
        self.progress.step += 1
        self.progress.skipped += not finite
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        if self.progress.skipped_in_a_row >= MOST_BAD_STEPS:
            last = self.progress.step
            raise ConfigError(
                f"the loss or its gradient was not finite in {MOST_BAD_STEPS} steps in a row "
                f"({last - MOST_BAD_STEPS + 1} to {last} of {self.steps}), none of which changed the weights; "
                "train with a lower --learning-rate or --precision fp32 in another --out"
            )


def train_step(
    model: Llama3VForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    *,
    clip_norm: float,
    bf16: bool = False,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """One optimizer step over the passes of a batch; returns (loss per supervised token, gradient norm).

    Where one of the two is not finite, the weights and the optimizer stay as they are.
    """
    device = parameters[0].device
    total = sum(batch.supervised for batch in batches)
    loss = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, bf16):
            part = supervised_loss(hidden_states(model, batch), batch.targets, head_of(model), total)
        if part.requires_grad:  # it does not where only the projector trains and the pass has no image
            part.backward()
        loss += part.detach()
    before_update()
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only wait for the device
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


def hidden_states(model: Llama3VForConditionalGeneration, batch: Batch) -> Tensor:
    """The LLM's last hidden states where a label follows: [supervised, hidden]."""
    embeddings = model.embed(batch.ids, batch.features)
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


def _count_of(batch: Batch, name: str) -> int:
    return batch.supervised if name == "supervised_tokens" else getattr(batch, name)
