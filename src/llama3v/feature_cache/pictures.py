"""Pictures through an engine: whole pictures in, the features of each one out, in the same order."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llama3v.feature_cache.pipeline import Batch, Picture

if TYPE_CHECKING:
    import torch

    from llama3v.feature_cache.encoders.base import TrunkEncoder


def encode_batches(batches: Iterable[Batch], encoder: "TrunkEncoder") -> Iterator[tuple[Picture, "torch.Tensor"]]:
    """(picture, bf16 [its tiles, patches, width]) for every picture that batches are made of (`make_batches`).

    A picture comes when its last tile is encoded.
    """
    import torch

    parts: list[torch.Tensor] = []  # of the picture that the last batch cut off
    for batch in batches:
        features, position = encoder.encode(batch.tiles), 0
        for picture, count in batch.pieces:
            parts.append(features[position : position + count])
            position += count
            if sum(len(part) for part in parts) == len(picture.tiles.pixels):
                yield picture, torch.cat(parts)
                parts = []
