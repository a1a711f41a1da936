"""The trunk of the tower, run while training: what modes pixels and stream share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llama3v.config import EncodeConfig, Precision
from llama3v.feature_cache.encoders.torch import TorchEncoder
from llama3v.feature_cache.pictures import encode_batches
from llama3v.feature_cache.pipeline import Picture, make_batches
from llama3v.model.vision import VisionTower


class LiveTrunk:
    """Features as `llama3v encode` makes them: its engine torch, its fixed shape of a pass, rounded to bf16.

    So on a CPU they are those of the cache bit for bit, if that was encoded with the default `--engine` and
    `--batch-tiles` and the same `--precision`; otherwise, up to rounding.
    """

    def __init__(self, tower: VisionTower, precision: Precision) -> None:
        self._encoder = TorchEncoder(tower, precision, EncodeConfig.batch_tiles)

    def features(self, keys: Sequence[str], pictures: Iterable[Picture]) -> Tensor:
        """bf16 [tiles, patches, width]: the features of images, one after another.

        Args:
            keys: images; one may come several times.
            pictures: one for each key, in the order of first appearance (`once`).
        """
        batches = make_batches(pictures, self._encoder.tiles_in_pass)
        found = {picture.key: features for picture, features in encode_batches(batches, self._encoder.encode)}
        return torch.cat([found[key] for key in keys])


def once(keys: Sequence[str]) -> list[str]:
    """The keys in order of first appearance."""
    return list(dict.fromkeys(keys))
