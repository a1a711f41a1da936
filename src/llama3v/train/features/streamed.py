"""Mode stream: nothing is cached. Images are read, decoded, cut and encoded when a pass needs them, ahead of the loop."""

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from llama3v.data.sources.base import BytesImage, ImageRef
from llama3v.errors import DataError, ImageError
from llama3v.feature_cache.pictures import checked
from llama3v.feature_cache.pipeline import Picture, Preparer
from llama3v.model.headers import grid_in_header
from llama3v.model.slicing import Grid
from llama3v.model.tiles import image_key
from llama3v.train.features.base import FeatureSource, NotFoundError
from llama3v.train.features.broken import BrokenImages
from llama3v.train.features.live import LiveTrunk, once
from llama3v.train.locations import Locate

UNREADABLE = "image cannot be read"


class ImageHeaders:
    """Keys from the files' bytes and grids from their headers. No pixel is decoded, so a file that is broken behind its
    header is not noticed."""

    def __init__(self, tile_size: int, max_tiles: int) -> None:
        self._tile_size, self._max_tiles = tile_size, max_tiles

    def find(self, source_digest: str, image: ImageRef) -> tuple[str, Grid]:
        if isinstance(image, BytesImage):
            raise DataError(
                f"{image.name}: its bytes stand in the data file, where they cannot be found again in training order; "
                "encode the data and train from the cache (--mode features or pixels, without --ring)"
            )
        try:
            data = image.read()
            return image_key(data), grid_in_header(data, self._tile_size, self._max_tiles)
        except ImageError as error:
            raise NotFoundError(UNREADABLE, image=image.name, because=str(error)) from error

    def advice(self, encode_command: str) -> str:
        return "see the ledger for the reasons, and check where the images lie"


class StreamedFeatures(FeatureSource):
    """Decodes images and runs the trunk on them."""

    needs_files = True

    def __init__(self, trunk: LiveTrunk, broken: Path, *, tile_size: int, max_tiles: int, fingerprint: str) -> None:
        """`broken`: the file of the run that says which images turned out to be broken."""
        self.lookup, self.fingerprint = ImageHeaders(tile_size, max_tiles), fingerprint
        self._trunk, self._broken = trunk, BrokenImages(broken)
        workers = min(8, os.cpu_count() or 1)
        self._preparer = Preparer(lambda key: False, tile_size, max_tiles, depth=4 * workers, workers=workers)

    def open_files(self, locate: Locate) -> None:
        self._locate = locate

    def features(self, keys: Sequence[str]) -> Tensor:
        with closing(self._pictures(once(keys))) as pictures:
            return self._trunk.features(keys, pictures)

    def _pictures(self, keys: Sequence[str]) -> Generator[Picture, None, None]:
        outcomes = self._preparer.outcomes((key, self._locate(key).image) for key in keys)
        for key, outcome in zip(keys, outcomes, strict=True):
            place = self._locate(key)
            found = checked(outcome, key, place.grid, was_broken=key in self._broken)
            if isinstance(found, str):
                raise self._broken.note(key, place.data, place.image.name, found)
            yield found
