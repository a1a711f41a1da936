"""The usual way to train: the tower in the loop, samples padded to the longest, logits of every position; transformers' classes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.train_shapes import ModelShape, TowerShape
from llama3v.model.projector import Projector
from llama3v.train.prepared import PreparedData

IGNORED = -100  # what transformers takes for "no loss here"


def stock_tower(shape: TowerShape, layers: int) -> SiglipVisionModel:
    """transformers' SigLIP with so many layers, frozen, without the pooling head, which nobody needs here."""
    config = SiglipVisionConfig(
        image_size=shape.tile_size,
        patch_size=shape.patch_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    return SiglipVisionModel(config).requires_grad_(False).eval()


class LlavaProjector(nn.Module):
    """LLaVA-1.5's: two linear layers, one visual token for each patch."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


class UsualModel(nn.Module):
    """SiglipVisionModel, a projector, LlamaForCausalLM. trains: "projector", "llm" or both."""

    def __init__(
        self, shape: ModelShape, tower_layers: int, *, trains: Collection[str], llava_projector: bool = False
    ) -> None:
        super().__init__()
        tower = shape.tower
        self.image_token = shape.llm.vocabulary
        self.vision = stock_tower(tower, tower_layers)
        self.projector: nn.Module = LlavaProjector(tower.width, shape.llm.hidden)
        if not llava_projector:
            self.projector = Projector(
                width=tower.width,
                heads=tower.heads,
                mlp_size=tower.mlp_size,
                grid_side=tower.tile_size // tower.patch_size,
                scale_factor=shape.scale_factor,
                hidden=shape.llm.hidden,
            )
        self.projector.requires_grad_("projector" in trains)
        self.llm = LlamaForCausalLM(shape.llm.config()).requires_grad_("llm" in trains).train("llm" in trains)

    def forward(self, batch: "PaddedBatch") -> Tensor:
        """The mean loss of the batch, a scalar."""
        with torch.no_grad():
            features = self.vision(pixel_values=batch.pixels).last_hidden_state  # [tiles, patches, width]
        slots = batch.ids == self.image_token
        embeddings = self.llm.get_input_embeddings()(batch.ids.masked_fill(slots, 0))
        embeddings = embeddings.masked_scatter(slots[..., None], self.projector(features))
        return self.llm(inputs_embeds=embeddings, attention_mask=batch.attention, labels=batch.labels).loss


@dataclass(frozen=True)
class PaddedBatch:
    """ids, attention, labels: [samples, longest]; pixels: [tiles, 3, S, S]."""

    ids: Tensor
    attention: Tensor
    labels: Tensor
    pixels: Tensor

    @property
    def padding(self) -> float:
        """Share of the positions that is padding."""
        return 1 - float(self.attention.float().mean())


def padded(data: PreparedData, samples: Sequence[int], tiles: int, tile_size: int) -> PaddedBatch:
    """The samples side by side, padded on the right; with random pixels for their tiles."""
    longest = max(data.length(sample) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        place = slice(int(data.starts[sample]), int(data.starts[sample + 1]))
        tokens = torch.from_numpy(data.tokens[place].astype("int64"))
        supervised = torch.from_numpy(data.supervised[place].astype(bool))
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = tokens.masked_fill(~supervised, IGNORED)
    pixels = torch.randn(tiles, 3, tile_size, tile_size, generator=torch.Generator().manual_seed(0))
    return PaddedBatch(ids, attention, labels, pixels)


def usual_step(model: UsualModel, optimizer: torch.optim.Optimizer, batch: PaddedBatch) -> float:
    """Forward, backward, clipping, update."""
    loss = model(batch)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
