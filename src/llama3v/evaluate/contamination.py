"""Did the model see a benchmark's pictures in training?

The same file is found by its hash, which is its key in the feature cache. A near-duplicate (the same picture saved again,
shrunk, brightened, grey) has another hash but nearly the same *perceptual* one; a cache has no pictures to take that of, so
it needs the training data itself. The hash is `imagehash.phash`: the signs of 8 x 8 low frequencies of the picture.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.data.sources.base import AddressableSource, ImageRef, Sample, open_source
from llama3v.errors import ConfigError, DataError, ImageError
from llama3v.feature_cache.layout import CachePaths, fingerprints
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.refs import digests_of, keys_named
from llama3v.model.tiles import decode_image, image_key

NEAR = 8
"""Bits of 64 in which near-duplicates differ at most. Measured on Flickr8k: a JPEG of quality 30, half the size, 1.2 times as
bright and grey differ by 0 to 6; the nearest of 1,500 other photographs by 12 or more. A cropped picture may escape."""
_BITS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)
_AHEAD = 256  # pictures that are read at a time
_COMPARED = 1 << 24  # pairs at a time


@dataclass(frozen=True)
class Match:
    """A picture of a benchmark that the training has, or nearly: `bits` apart; 0 and no `trained` name: by the cache."""

    image: str
    trained: str
    bits: int
    same_file: bool


@dataclass(frozen=True)
class Trained:
    """What is known of the training's pictures."""

    keys: frozenset[str]
    names: tuple[str, ...] = ()
    hashes: np.ndarray | None = None  # [pictures, 8] uint8, in the order of `names`
    places: tuple[tuple[str, str], ...] = ()  # (key, data set) of each of `names`
    unreadable: int = 0  # pictures that training, too, must have left out

    def matches(self, images: dict[ImageRef, str]) -> list[Match]:
        """Those of a benchmark's images (image -> key) that the training has, same files first."""
        by_key = {key: name for (key, _), name in zip(self.places, self.names, strict=True)}
        same = {image: key for image, key in images.items() if key in self.keys}
        found = [Match(image.name, by_key.get(key, ""), 0, True) for image, key in same.items()]
        others = [image for image in images if image not in same]
        if self.hashes is None or not len(self.hashes) or not others:
            return found
        own = np.stack([perceptual_hash(image.read()) for image in others])
        for image, (nearest, bits) in zip(others, _nearest(own, self.hashes), strict=True):
            if bits <= NEAR:
                found.append(Match(image.name, self.names[nearest], bits, False))
        return found


def read_trained(
    cache: Path | None, data: Sequence[str], advance: Callable[[int], object] = lambda count: None
) -> Trained:
    """What a training saw: the images of `data`, or every image of the cache without it.

    `data` beside a cache keeps to those of its images that the data sets name (a cache often holds the held-out pictures,
    too). `advance` is told how many pictures were hashed. Raises CacheError, DataError, ConfigError where the extra is
    missing.
    """
    keys = frozenset(_cached_keys(cache, data)) if cache is not None else frozenset()
    if not data:
        return Trained(keys)
    perceptual_hash(b"", only_try=True)  # a missing extra is told before minutes of work
    names, places, hashes, unreadable = [], [], [], 0
    for spec in data:
        for found in _hashed(open_source(spec)):
            advance(1)
            if found is None:
                unreadable += 1
                continue
            name, key, bits = found
            names.append(name)
            places.append((key, spec))
            hashes.append(bits)
    if not names:
        raise DataError(f"{', '.join(data)}: expected images, found none that can be read")
    return Trained(keys | {key for key, _ in places}, tuple(names), np.stack(hashes), tuple(places), unreadable)


def clean_samples(matches: Sequence[Match], images: dict[str, Sequence[str]]) -> set[str]:
    """The ids of samples (id -> names of its images) that show none of the matched pictures."""
    tainted = {match.image for match in matches}
    return {id for id, names in images.items() if tainted.isdisjoint(names)}


def picture_of(trained: Trained, match: Match) -> bytes | None:
    """The training's picture of a match; None where only the cache knows it. Raises DataError, ImageError."""
    if not match.trained:
        return None
    spec = trained.places[trained.names.index(match.trained)][1]
    return open_source(spec).image(match.trained).read()


def perceptual_hash(data: bytes, *, only_try: bool = False) -> np.ndarray[Any, Any]:
    """[8] uint8: 64 bits of the bytes of an image file. Raises ImageError; ConfigError where the extra is missing."""
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError("finding near-duplicates needs an extra: pip install 'llama3v[duplicates]'") from error
    if only_try:
        return np.zeros(8, dtype=np.uint8)
    return np.packbits(imagehash.phash(decode_image(data)).hash)


def _hashed(source: AddressableSource) -> Iterator[tuple[str, str, np.ndarray[Any, Any]] | None]:
    """(name, key, perceptual hash) of every image, each name once; None for what cannot be read. Decoding runs in threads."""
    with ThreadPoolExecutor(os.cpu_count() or 1, "hash") as pool:
        for some in _batches(_images(source)):
            yield from pool.map(_hash, some)


def _hash(image: ImageRef) -> tuple[str, str, np.ndarray[Any, Any]] | None:
    try:
        data = image.read()
        return image.name, image_key(data), perceptual_hash(data)
    except ImageError:
        return None


def _images(source: AddressableSource) -> Iterator[ImageRef]:
    seen: set[str] = set()
    for row in source:
        for image in row.images if isinstance(row, Sample) else ():
            if image.name not in seen:
                seen.add(image.name)
                yield image


def _batches(images: Iterable[ImageRef]) -> Iterator[list[ImageRef]]:
    some: list[ImageRef] = []
    for image in images:
        some.append(image)
        if len(some) == _AHEAD:
            yield some
            some = []
    yield some


def _cached_keys(cache: Path, data: Sequence[str]) -> Iterator[str]:
    digests = digests_of(data)
    for fingerprint in fingerprints(cache):
        if digests:
            paths = CachePaths(cache, fingerprint)
            here = [digest for digest in digests if paths.refs(digest).is_file()]
            for keys in keys_named(paths, here).values():
                yield from (bytes(key).ljust(16, b"\0").hex() for key in keys)
        else:
            with CacheReader(cache, fingerprint=fingerprint) as reader:
                yield from reader.keys()


def _nearest(own: np.ndarray[Any, Any], trained: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """(index, bits apart) of the nearest of `trained` [n, 8] to each of `own` [m, 8]."""
    rows = max(1, _COMPARED // (8 * len(trained)))
    for start in range(0, len(own), rows):
        apart = _BITS[own[start : start + rows, None] ^ trained[None]].sum(axis=2, dtype=np.uint16)  # [rows, n]
        nearest = apart.argmin(axis=1)
        yield from ((int(index), int(apart[row, index])) for row, index in enumerate(nearest))
