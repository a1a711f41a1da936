"""LoRA adapters as plain modules, for a machine without peft: the same products (arXiv 2106.09685), nothing to save."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """base(x) + B A x; A [rank, in] is random and B [out, rank] zero, both in fp32. The base stays frozen."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, device=device) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(llm: nn.Module, rank: int) -> int:
    """Put adapters beside every linear layer of the LLM's blocks, in place; returns how many."""
    places = [
        (parent, name, child)
        for parent in llm.modules()
        for name, child in parent.named_children()
        if name in TARGETS and isinstance(child, nn.Linear)
    ]
    for parent, name, child in places:
        setattr(parent, name, LoraLinear(child, rank))
    return len(places)
