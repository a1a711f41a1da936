"""Tower and projector of an engine whose LLM is not in torch: an encode engine of the cache, then the projector."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.engines.base import ImageFeatures
from llama3v.model.projector import Projector
from llama3v.model.tiles import Tiles
from llama3v.model.vision import VisionTower


class Vision:
    """Tiles, or features at the cut, to visual tokens, in float32.

    Args:
        encoder: a name of feature_cache/encoders; it is opened by the first image.
    """

    def __init__(self, tower: VisionTower, projector: Projector, encoder: str) -> None:
        self._tower = tower.eval()
        self._projector = projector.eval()
        self._encoder_name = encoder
        self._encoder: Any = None
        self.tile_size = tower.tile_size
        self.feature_shape = (tower.grid_side**2, tower.width)
        """(patches, width) of a tile's features at the cut."""

    @torch.inference_mode()
    def encode(self, tiles: Tiles) -> np.ndarray:
        """Tiles -> visual tokens float32 [tiles * tokens_per_tile, hidden]."""
        if self._encoder is None:
            from llama3v.feature_cache.encoders.choose import open_encoder

            self._encoder = open_encoder(self._encoder_name, self._tower, precision="fp32", batch_tiles=1)  # type: ignore[arg-type]
        # one tile in a pass, unrounded: `encode` of the encoder would store bf16
        return self._project(torch.cat([self._encoder.encode_pass(tile[None]).float().cpu() for tile in tiles.pixels]))

    @torch.inference_mode()
    def project(self, image: ImageFeatures) -> np.ndarray:
        """Features at the cut -> visual tokens."""
        return self._project(image.features.float().cpu())

    def _project(self, features: Tensor) -> np.ndarray:
        tokens: np.ndarray = self._projector(self._tower.top(features)).flatten(0, 1).numpy()
        return tokens
