"""Does the model see? Loss on held-out samples with their own images, and with each other's.

The gap between the two is what the images tell the model: a model that only knows the language has none.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama3v.data.packing import pack
from llama3v.train.batches import assemble
from llama3v.train.features.base import FeatureSource
from llama3v.train.parallel.placement import Placement
from llama3v.train.prepared import PreparedData
from llama3v.train.step import set_modes


@dataclass(frozen=True)
class Validation:
    """Held-out samples and how to measure on them."""

    data: PreparedData
    source: FeatureSource
    row_tokens: int
    rows_per_pass: int

    def measure(self, placed: Placement) -> dict[str, Any]:
        """Losses per supervised token. The ranks share the work, and all of them call it.

        `validation_loss` is over all samples. `validation_loss_shuffled` is over the samples that could be given
        images of another sample (`validation_shuffled` of them), and `validation_gap` is how much lower the loss of
        those very samples is with their own images; both are None where no sample could.
        """
        placed.model.eval()
        try:
            return self._measure(placed)
        finally:
            set_modes(placed.model)

    def _measure(self, placed: Placement) -> dict[str, Any]:
        right, tokens = self._losses(placed, {})
        report: dict[str, Any] = {
            "validation_loss": float(right.sum() / tokens.sum()),
            "validation_samples": len(self.data),
            "validation_shuffled": 0,
            "validation_loss_shuffled": None,
            "validation_gap": None,
        }
        if exchanged := shuffle_images(self.data):
            wrong, _ = self._losses(placed, exchanged)
            samples = torch.tensor(sorted(exchanged))
            shuffled = float(wrong[samples].sum() / tokens[samples].sum())
            own = float(right[samples].sum() / tokens[samples].sum())
            report |= {
                "validation_shuffled": len(exchanged),
                "validation_loss_shuffled": shuffled,
                "validation_gap": shuffled - own,
            }
        return report

    @torch.no_grad()
    def _losses(self, placed: Placement, images_of: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and the supervised tokens, of every sample: two tensors [samples], float64."""
        ranks, image_token_id = placed.ranks, placed.model.config.image_token_id
        losses = torch.zeros(len(self.data), dtype=torch.float64)
        tokens = torch.zeros(len(self.data), dtype=torch.float64)
        rows = pack(self.data.lengths.tolist(), self.row_tokens, seed=0, epoch=0)
        passes = [rows[first : first + self.rows_per_pass] for first in range(0, len(rows), self.rows_per_pass)]
        for first in range(0, len(passes), ranks.count):
            own = first + ranks.number
            # ranks that share the weights compute together, so one that has no pass left repeats the last
            batch = assemble(self.data, passes[min(own, len(passes) - 1)], self.source, image_token_id, images_of)
            found = placed.forward(batch.to(placed.device))
            if own < len(passes):
                losses.index_add_(0, batch.owners, found.double().cpu())
                tokens.index_add_(0, batch.owners, torch.ones(len(found), dtype=torch.float64))
        return ranks.add(losses), ranks.add(tokens)


def shuffle_images(data: PreparedData) -> dict[int, int]:
    """Sample -> another sample whose images it gets: of the same grids, so that prompts keep their length.

    Within samples of equal grids, sorted by image, everyone takes the images of the one as many places further on as
    the most frequent image occurs: so two questions about one picture never exchange the same picture. A sample that
    finds no other image, or has none, is left out. Deterministic.
    """
    groups: dict[tuple[tuple[int, int], ...], list[tuple[list[str], int]]] = defaultdict(list)
    for sample in range(len(data)):
        if grids := data.grids_of(sample):
            groups[grids].append((data.images(sample), sample))
    exchanged = {}
    for members in groups.values():
        members.sort()
        shift = max(Counter(tuple(images) for images, _ in members).values())
        for place, (images, sample) in enumerate(members):
            other_images, other = members[(place + shift) % len(members)]
            if other_images != images:
                exchanged[sample] = other
    return exchanged
