"""No tower at all: mode pixels keeps the tiles themselves."""

import numpy as np
import torch
from torch import Tensor

from llama3v.feature_cache.encoders.base import TrunkEncoder
from llama3v.model.vision import VisionTower


class PixelEncoder(TrunkEncoder):
    """Gives back what it is given, as a cache of tiles stores it (codec u8)."""

    name = "none (pixels)"

    def __init__(self, tower: VisionTower) -> None:
        super().__init__(tower, "fp32", tiles_in_pass=1)

    def encode(self, tiles: np.ndarray) -> Tensor:
        """uint8 [n, S, S, 3] -> uint8 [n, S * S, 3]."""
        return torch.from_numpy(tiles).flatten(1, 2)

    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        return self.encode(tiles)
