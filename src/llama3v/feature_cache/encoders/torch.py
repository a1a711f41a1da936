"""The trunk in PyTorch: CPU, CUDA or Apple's GPU, as it is or through torch.compile. The default, without extras."""

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.feature_cache.encoders.base import NormalisedTrunk, TrunkEncoder, tiles_per_pass
from llama3v.model.vision import VisionTower

if TYPE_CHECKING:
    from llama3v.config import Precision


class TorchEncoder(TrunkEncoder):
    """In bf16, matrix products run in bf16 while the residual stream and the norms stay in fp32 (autocast).

    On a GPU a pass is the whole batch, and `encode` returns when its features are in host memory.
    """

    name = "torch"

    def __init__(self, tower: VisionTower, precision: "Precision", batch_tiles: int) -> None:
        self._device = best_device()
        on_cpu = self._device.type == "cpu"
        super().__init__(tower, precision, tiles_per_pass(batch_tiles, tower.grid_side**2) if on_cpu else batch_tiles)
        self.device = str(self._device) if on_cpu else _name_of(self._device)
        self.into_pinned_memory = self._device.type == "cuda"
        trunk: nn.Module = NormalisedTrunk(tower)
        if not on_cpu or precision == "bf16":  # the caller's tower stays as it is
            trunk = copy.deepcopy(trunk).to(self._device)
        if precision == "bf16":
            _lower_products(trunk)
        self._trunk = trunk

    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        lower = torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.no_grad(), lower:
            on_device = torch.from_numpy(np.ascontiguousarray(tiles)).to(self._device)
            features = self._trunk(on_device)
            return features if self._device.type == "cpu" else features.to(torch.bfloat16)  # half the bytes to move


class CompiledTorchEncoder(TorchEncoder):
    """`TorchEncoder` through torch.compile, which needs a C++ compiler (and Triton on CUDA)."""

    name = "torch-compile"

    def __init__(self, tower: VisionTower, precision: "Precision", batch_tiles: int) -> None:
        super().__init__(tower, precision, batch_tiles)
        self._trunk = torch.compile(self._trunk, dynamic=False)  # type: ignore[assignment]
        side = tower.tile_size
        try:
            self.encode_pass(np.zeros((self.tiles_in_pass, side, side, 3), dtype=np.uint8))
        except RuntimeError as error:  # what every compiler error of torch is
            first_line = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"torch.compile does not work here: {first_line}; install a C++ compiler (and Triton for CUDA), "
                "or give --engine torch"
            ) from error


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def _lower_products(trunk: nn.Module) -> None:
    """Keep the weights of matrix products in bf16. Autocast would round them to the same values in every pass: it
    keeps rounded weights only while they are being trained."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)
