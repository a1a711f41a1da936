"""The loss: cross entropy at supervised positions only, in chunks, divided by the tokens of the *whole* step.

With a vocabulary of 128k, logits of 8,192 tokens are 4 GB, and gradients as much again. Most positions of a
multimodal row (visual tokens, questions) carry no label, so the LM head runs only where there is one; and it runs chunk
by chunk, each chunk's gradients computed at once, so that full logits never exist.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 * 2**20
"""Logits that exist at once, in fp32; about what stays in a GPU's caches and a laptop's memory."""


def supervised_loss(hidden: Tensor, targets: Tensor, head: Tensor, total: int) -> Tensor:
    """Sum of the cross entropy of the given positions, divided by `total`: a scalar.

    Summed over the passes of a step, with `total` the supervised tokens of all of them, this is the mean over the
    step, however it is split into passes.

    Args:
        hidden: [positions, hidden], the LLM's last hidden states where a label follows.
        targets: [positions], the next token at each.
        head: [vocabulary, hidden], weight of the LM head.
        total: supervised tokens of the whole step.
    """
    return _ChunkedCrossEntropy.apply(hidden, head, targets, 1.0 / total)


@torch.no_grad()
def losses_of(hidden: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """The cross entropy of every position, [positions], without gradients: for validation."""
    chunks = zip(*(x.split(_chunk_length(head)) for x in (hidden, targets)), strict=True)
    losses = [F.cross_entropy(F.linear(h, head).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one walk over the chunks: nothing is computed twice, and no chunk's logits are kept.

    d loss / d logits = (softmax(logits) - one-hot(target)) * scale, hence d hidden = that @ head, d head = that.T @ hidden.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None  # bf16 would lose chunks
        length = _chunk_length(head)
        for start in range(0, len(hidden), length):
            chunk = slice(start, start + length)
            logits = F.linear(hidden[chunk], head).float()  # [chunk, vocabulary]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            del logits
            target = targets[chunk, None]
            loss -= log_probabilities.gather(1, target).sum()
            if not (wants_hidden or wants_head):
                continue
            grad_logits = log_probabilities.exp_()
            grad_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad_logits.dtype))
            grad_logits = grad_logits.mul_(scale).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ head
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_head = (
            None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_head, None, None


def _chunk_length(head: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * head.shape[0]))
