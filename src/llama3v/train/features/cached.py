"""Mode features: records of the feature cache."""

from collections.abc import Sequence

from torch import Tensor

from llama3v.data.sources.base import ImageRef
from llama3v.errors import ImageError
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.selection import encode_option
from llama3v.model.slicing import Grid
from llama3v.model.tiles import image_key
from llama3v.train.features.base import FeatureSource, NotFoundError

NOT_IN_CACHE = "image not in the cache"


class CachedImages:
    """Keys and grids from a cache: by name where the encode pass noted it, else by the image's bytes."""

    def __init__(self, cache: CacheReader) -> None:
        self._cache = cache

    def find(self, source_digest: str, image: ImageRef) -> tuple[str, Grid]:
        key = self._cache.key_of(source_digest, image.name)
        if key is None:
            try:
                key = image_key(image.read())
            except ImageError as error:
                raise NotFoundError(NOT_IN_CACHE, image=image.name, because=str(error)) from error
        if key not in self._cache:
            raise NotFoundError(NOT_IN_CACHE, image=image.name, key=key)
        return key, self._cache.record(key).grid

    def advice(self, encode_command: str) -> str:
        return f"run: {encode_command}{encode_option(self._cache.manifest['codec'])}"


class CachedFeatures(FeatureSource):
    """Reads features; nothing of the tower's trunk runs."""

    def __init__(self, cache: CacheReader) -> None:
        self.lookup, self.fingerprint = CachedImages(cache), cache.fingerprint
        self._cache = cache

    def features(self, keys: Sequence[str]) -> Tensor:
        return self._cache.read_many(keys)

    def close(self) -> None:
        self._cache.close()
