"""The trainer's step as the benchmarks call it: the one place here that knows its functions."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.batches import Batch
from llama3v.train.parallel.placement import Placement
from llama3v.train.step import PassLoss, set_modes, train_step

__all__ = ["adamw", "optimizer_step", "pass_loss", "set_modes", "trained"]

Passes = Iterable[tuple[Batch, int]]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The trainer's optimizer, at a rate at which random weights stay what they are."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def optimizer_step(
    model: Llama3VForConditionalGeneration, optimizer: torch.optim.Optimizer, passes: Passes, *, bf16: bool = False
) -> float:
    """The whole step of the trainer: passes, clipping, update. Returns the loss."""
    return train_step(Placement(model, bf16=bf16), optimizer, passes, trained(model), clip_norm=1.0)[0]


def pass_loss(model: Llama3VForConditionalGeneration, batch: Batch, total: int, *, bf16: bool = False) -> Tensor:
    """One pass's part of the loss, as the trainer's step has it; `backward` is the caller's."""
    return PassLoss(model, bf16=bf16)(batch, total)
