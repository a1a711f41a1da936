"""What every encode engine is: fixed-shape passes of uint8 tiles through the trunk of a vision tower.

Which engine made a record is not part of the cache's fingerprint, so every engine must give the features that torch
gives in fp32, up to rounding: tests/parity/test_encoders.py holds each to it, and `open_encoder` (choose.py) looks
again on the machine that encodes.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.model.vision import SiglipTower, VisionTower

if TYPE_CHECKING:
    from llama3v.config import Precision

PATCHES_IN_PASS = 1024
"""On a CPU, a pass takes about this many patches (one tile of 384 pixels): more of them no longer fill its caches
better, and activations fall out of them."""


class TrunkEncoder(ABC):
    """Runs a tower's trunk on one runtime.

    Attributes:
        name: the engine, as `--engine` names it.
        precision: of the matrix products. device: where they run, in words.
        tiles_in_pass: tiles that go through the trunk together, always this many. Kernels are chosen by shape, and
            another kernel rounds differently.
    """

    name: str
    device = "cpu"
    into_pinned_memory = False
    """Whether features come from a GPU that copies faster into such memory."""

    def __init__(self, tower: VisionTower, precision: "Precision", tiles_in_pass: int) -> None:
        self.precision = precision
        self.tiles_in_pass = tiles_in_pass
        self._shape = (tower.grid_side**2, tower.width)

    def encode(self, tiles: np.ndarray) -> Tensor:
        """Patch features of tiles.

        Args:
            tiles: uint8 [n, S, S, 3] RGB; n is a multiple of `tiles_in_pass`, such as `batch_tiles`.

        Returns:
            bf16 [n, patches, width] on the CPU, in memory that nothing else uses.
        """
        if len(tiles) % self.tiles_in_pass:
            raise ValueError(f"{len(tiles)} tiles do not fill passes of {self.tiles_in_pass}")
        features = torch.empty(len(tiles), *self._shape, dtype=torch.bfloat16, pin_memory=self.into_pinned_memory)
        for start in range(0, len(tiles), self.tiles_in_pass):
            end = start + self.tiles_in_pass
            features[start:end] = self.encode_pass(tiles[start:end])  # rounds to bf16
        return features

    @abstractmethod
    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        """uint8 [tiles_in_pass, S, S, 3] -> [tiles_in_pass, patches, width] of any float type, on any device."""


class NormalisedTrunk(nn.Module):
    """uint8 tiles [n, S, S, 3] -> features [n, patches, width]: `to_pixels` (model/tiles.py) and the trunk in one."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", torch.tensor(tower.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tower.std).view(3, 1, 1), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        pixels = tiles.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255  # [n, 3, S, S]
        return self.tower.trunk((pixels - self.mean) / self.std)


def tiles_per_pass(batch_tiles: int, patches: int) -> int:
    """The divisor of `batch_tiles` with which a pass on a CPU comes nearest to `PATCHES_IN_PASS` from below."""
    most = max(1, PATCHES_IN_PASS // patches)
    return max(divisor for divisor in range(1, min(most, batch_tiles) + 1) if batch_tiles % divisor == 0)


def require_siglip(engine: str, tower: VisionTower) -> SiglipTower:
    """ConfigError for a tower whose layers the engine does not have."""
    if not isinstance(tower, SiglipTower):
        raise ConfigError(f"the engine {engine} runs SigLIP towers, this one is {tower.kind}; give --engine torch")
    return tower
