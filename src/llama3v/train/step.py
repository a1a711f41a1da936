"""One training step, and the pass it is made of: forward, backward, and at the end of the step the update.

features at the cut --top, projector--> visual tokens --splice--> embeddings --LLM--> hidden states
--LM head, at supervised positions only--> loss, summed over the passes of the step and over the ranks
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.attention import mask_for
from llama3v.train.batches import Batch
from llama3v.train.loss import losses_of, supervised_loss

if TYPE_CHECKING:
    from llama3v.train.parallel.placement import Placement


def train_step(
    placed: "Placement",
    optimizer: torch.optim.Optimizer,
    passes: Iterable[tuple[Batch, int]],
    parameters: Sequence[nn.Parameter],
    *,
    clip_norm: float,
) -> tuple[float, float]:
    """One optimizer step; returns (loss per supervised token, gradient norm), both over all ranks.

    Where one of the two is not finite, on whichever rank, the weights and the optimizer stay as they are on all.

    Args:
        placed: the model, and where it lies (parallel/placement.py).
        passes: this rank's batches, each with the number of supervised tokens of *all* of the step, on all ranks.
        parameters: what trains.
    """
    device = parameters[0].device
    loss, tiles = torch.zeros((), device=device), 0
    for batch, total in passes:
        part = placed.forward(batch.to(device), total)
        if part.requires_grad:  # it does not where only the projector trains and the pass has no image
            part.backward()
        loss += part.detach()
        tiles += batch.tiles
    placed.after_passes(tiles)
    placed.ranks.add(loss)
    norm = placed.clip(parameters, clip_norm)
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only wait for the device
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


class PassLoss(nn.Module):
    """What one pass computes, as a module: DDP and FSDP2 wrap it.

    Attributes:
        touches_all: have every trained parameter take part in every pass, with a gradient of zero where it has no
            other. Ranks reduce their gradients together, so they must have the same ones.
    """

    def __init__(self, model: Llama3VForConditionalGeneration, *, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16, self.touches_all = model, bf16, False

    def forward(self, batch: Batch, total: int | None = None) -> Tensor:
        """The pass's part of the step's loss, a scalar; with `total` None the loss of every supervised position.

        Args:
            total: supervised tokens of the whole step.
        """
        with autocast(batch.ids.device, self.bf16):
            hidden = hidden_states(self.model, batch)
            if total is None:
                return losses_of(hidden, batch.targets, head_of(self.model))
            loss = supervised_loss(hidden, batch.targets, head_of(self.model), total)
        if self.touches_all and batch.features is None:
            for parameter in trained_visual(self.model):
                loss = loss + parameter.flatten()[:0].sum()
        return loss


def trained_visual(model: Llama3VForConditionalGeneration) -> list[nn.Parameter]:
    """The trained parameters that only a pass with images uses: of the vision top and the projector."""
    parts = (model.vision, model.projector)
    return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]


def hidden_states(model: Llama3VForConditionalGeneration, batch: Batch) -> Tensor:
    """The LLM's last hidden states where a label follows: [supervised, hidden]."""
    embeddings = model.embed(batch.ids, batch.features)  # [rows, length, hidden]
    mask = mask_for(model.llm.config._attn_implementation, batch.segments, embeddings.dtype)
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


def llm_layers(model: Llama3VForConditionalGeneration) -> list[nn.Module]:
    """The LLM's transformer blocks."""
    kinds = set(model.llm._no_split_modules or ())
    return [module for module in model.llm.modules() if type(module).__name__ in kinds]


def recompute_activations(model: Llama3VForConditionalGeneration) -> None:
    """Keep only the inputs of the LLM's blocks for the backward pass, which runs each block forward once more.

    Less memory for about a third more time; the results are the same bits. (Chen et al. 2016, arXiv 1604.06174)
    """
    from torch.utils.checkpoint import checkpoint

    for layer in llm_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
