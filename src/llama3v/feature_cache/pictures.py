"""Pictures through an engine: whole pictures in, the features of each one out, in the same order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llama3v.feature_cache.pipeline import Batch, Found, Picture, Unreadable
from llama3v.model.slicing import Grid

if TYPE_CHECKING:
    import torch


def encode_batches(
    batches: Iterable[Batch], encode: "Callable[[np.ndarray], torch.Tensor]"
) -> Iterator[tuple[Picture, "torch.Tensor"]]:
    """(picture, bf16 [its tiles, patches, width]) for every picture that batches are made of (`make_batches`).

    A picture comes when its last tile is encoded.

    Args:
        encode: `TrunkEncoder.encode`.
    """
    import torch

    parts: list[torch.Tensor] = []  # of the picture that the last batch cut off
    for batch in batches:
        features, position = encode(batch.tiles), 0
        for picture, count in batch.pieces:
            parts.append(features[position : position + count])
            position += count
            if sum(len(part) for part in parts) == len(picture.tiles.pixels):
                yield picture, torch.cat(parts)
                parts = []


def checked(outcome: Found | Picture | Unreadable, key: str, grid: Grid, *, was_broken: bool) -> Picture | str:
    """The picture under its planned key, or in words why it cannot be used.

    Its bytes must be those that were planned with, unless these are known to be broken: then any picture that is cut alike
    has been put there to mend them.

    Args:
        outcome: what a Preparer made of the image that was planned as `key`, with `grid`.
    """
    if isinstance(outcome, Unreadable):
        return outcome.reason
    assert isinstance(outcome, Picture), "every image is decoded"
    if outcome.key != key and not was_broken:
        return "its bytes are others than those that were planned with"
    if outcome.tiles.grid != grid:
        found = outcome.tiles.grid
        return f"it is cut into {found.columns}x{found.rows} slices, planned {grid.columns}x{grid.rows}"
    return replace(outcome, key=key)
