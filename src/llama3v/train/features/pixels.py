"""Mode pixels: decoded tiles from a cache, the trunk live. Any tower of that tile size can use the cache."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from llama3v.feature_cache.pipeline import Picture
from llama3v.feature_cache.reader import CacheReader
from llama3v.model.tiles import Tiles
from llama3v.train.features.base import FeatureSource
from llama3v.train.features.cached import CachedImages
from llama3v.train.features.live import LiveTrunk, once


class PixelFeatures(FeatureSource):
    """Reads tiles and runs the trunk on them.

    Args:
        cache: of tiles (codec u8).
        fingerprint: of the features that the trunk makes of them.
    """

    def __init__(self, cache: CacheReader, trunk: LiveTrunk, tile_size: int, fingerprint: str) -> None:
        self.lookup, self.fingerprint = CachedImages(cache), fingerprint
        self._cache, self._trunk, self._tile_size = cache, trunk, tile_size

    def features(self, keys: Sequence[str]) -> Tensor:
        return self._trunk.features(keys, self._pictures(once(keys)))

    def close(self) -> None:
        self._cache.close()

    def _pictures(self, keys: Sequence[str]) -> Iterator[Picture]:
        for key, pixels in zip(keys, self._cache.read_each(keys), strict=True):  # [n, S * S, 3]
            tiles = pixels.numpy().reshape(len(pixels), self._tile_size, self._tile_size, 3)
            yield Picture("", "", key, Tiles(tiles, self._cache.record(key).grid))
