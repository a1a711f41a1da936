"""From a data set to full batches of tiles: read, hash and decode ahead of the tower, in bounded memory.

    images of the source --one thread--> bytes, key --what is new, several threads--> tiles --one thread--> batches

Everything keeps the order of the source, so a run is reproducible. Nothing here needs torch.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llama3v.data.sources import ImageRef
from llama3v.errors import ImageError
from llama3v.model.tiles import Tiles, decode_image, image_key, make_tiles

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """An image whose bytes were read. `data` is None where the bytes are known and need no decoding."""

    sample: str
    name: str
    key: str
    data: bytes | None


@dataclass(frozen=True)
class Picture:
    """An image that is ready for the tower."""

    sample: str
    name: str
    key: str
    tiles: Tiles


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be used, and why. The key is empty where not even its bytes could be read."""

    sample: str
    name: str
    key: str
    reason: str


def read_ahead(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Iterator[Result]:
    """`work(item)` for every item, in order, with up to `depth` of them under way in the pool."""
    under_way: deque = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


@contextmanager
def one_ahead(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """The same items, each made by a thread of its own while the one before it is used.

    What making an item raises is raised where the item was due. When the context ends, the thread has ended; it
    finishes the item it is making.
    """
    with ThreadPoolExecutor(1, "batch") as pool:
        yield _one_ahead(pool, items)


def _one_ahead(pool: Executor, items: Iterator[Item]) -> Iterator[Item]:
    end = object()
    upcoming = pool.submit(next, items, end)
    while (item := upcoming.result()) is not end:
        upcoming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]  # only `end` is no Item


@dataclass(frozen=True)
class Preparer:
    """Turns image references into pictures.

    Attributes:
        is_known: key -> whether its features exist already, or were asked for before in this run.
        depth: images under way at a time, in each of the two steps.
        workers: threads that decode. (Pillow and NumPy let other threads run meanwhile.)
    """

    is_known: Callable[[str], bool]
    tile_size: int
    max_tiles: int
    depth: int
    workers: int

    def outcomes(self, images: Iterable[tuple[str, ImageRef]]) -> Iterator[Found | Picture | Unreadable]:
        """One outcome for each (sample id, image): Found where it is known, else Picture or Unreadable."""
        # One thread reads: a parquet file is quick in the order of its rows, and slow out of order.
        reading, decoding = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(self.workers, "decode")
        try:
            read = read_ahead(reading, _read, images, self.depth)
            yield from read_ahead(decoding, self._decode, map(self._forget_known, read), self.depth)
        finally:
            for pool in (reading, decoding):
                pool.shutdown(wait=True, cancel_futures=True)

    def _forget_known(self, outcome: Found | Unreadable) -> Found | Unreadable:
        if isinstance(outcome, Found) and self.is_known(outcome.key):
            return Found(outcome.sample, outcome.name, outcome.key, None)
        return outcome

    def _decode(self, outcome: Found | Unreadable) -> Found | Picture | Unreadable:
        if isinstance(outcome, Unreadable) or outcome.data is None:
            return outcome
        try:
            tiles = make_tiles(decode_image(outcome.data), self.tile_size, self.max_tiles)
        except ImageError as error:
            return Unreadable(outcome.sample, outcome.name, outcome.key, str(error))
        return Picture(outcome.sample, outcome.name, outcome.key, tiles)


def _read(image: tuple[str, ImageRef]) -> Found | Unreadable:
    sample, ref = image
    try:
        data = ref.read()
    except ImageError as error:
        return Unreadable(sample, ref.name, "", str(error))
    return Found(sample, ref.name, image_key(data), data)


@dataclass(frozen=True)
class Batch:
    """Tiles of several images for one forward pass.

    Attributes:
        tiles: uint8 [batch_tiles, S, S, 3], always full: the last batch of a run ends in black tiles, so that every
            forward pass has one shape. Kernels are chosen by shape, and another kernel rounds differently.
        pieces: (picture, number of its tiles here), in order; a picture may go on in the next batch.
    """

    tiles: np.ndarray
    pieces: list[tuple[Picture, int]]


def make_batches(pictures: Iterable[Picture], batch_tiles: int) -> Generator[Batch, None, None]:
    """Fill batches across images."""
    arrays: list[np.ndarray] = []
    pieces: list[tuple[Picture, int]] = []
    free = batch_tiles
    for picture in pictures:
        pixels = picture.tiles.pixels
        while len(pixels):
            taken, pixels = pixels[:free], pixels[free:]
            arrays.append(taken)
            pieces.append((picture, len(taken)))
            free -= len(taken)
            if not free:
                yield Batch(np.concatenate(arrays), pieces)
                arrays, pieces, free = [], [], batch_tiles
    if pieces:
        black = np.zeros((free, *arrays[0].shape[1:]), dtype=np.uint8)
        yield Batch(np.concatenate([*arrays, black]), pieces)
