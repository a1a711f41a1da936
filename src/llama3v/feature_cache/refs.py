"""Which record belongs to which image of a data set, so that training needs no image files.

refs/<source digest>.jsonl has a line {"name": ..., "key": ...} for every readable image. The last line of a name counts.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.index import SortedKeys
from llama3v.feature_cache.layout import CachePaths


class Refs:
    """Name of an image -> key of its record, read once. Names are held as 16-byte hashes to stay small."""

    def __init__(self, path: Path) -> None:
        names, keys = bytearray(), bytearray()
        for entry in journal.read(path):
            names += _hash(entry["name"])
            keys += bytes.fromhex(entry["key"])
        halves = np.frombuffer(bytes(names), dtype=">u8").astype(np.uint64).reshape(-1, 2)
        self._names = SortedKeys(halves[:, 0], halves[:, 1])
        self._keys = bytes(keys)

    def key_of(self, name: str) -> str | None:
        positions = self._names.find(_hash(name))
        return self._keys[16 * positions[-1] : 16 * (positions[-1] + 1)].hex() if len(positions) else None


class RefsWriter:
    """Appends what is not there yet, so that running again changes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = {_pair(entry["name"], entry["key"]) for entry in journal.read(path)}
        self._pending: list[dict[str, str]] = []

    def add(self, name: str, key: str) -> int:
        """Returns how many lines wait for `flush`."""
        pair = _pair(name, key)
        if pair not in self._known:
            self._known.add(pair)
            self._pending.append({"name": name, "key": key})
        return len(self._pending)

    def flush(self) -> None:
        """Append what was added. Raises OSError if that is impossible; nothing is forgotten then."""
        journal.append(self.path, self._pending)
        self._pending = []


def digests_of(data: Iterable[str]) -> list[str]:
    """The source digests of data sets, each given as `open_source` takes it or as its digest.

    Raises:
        DataError: no such data set.
    """
    from llama3v.data.sources import open_source

    return [
        spec if re.fullmatch("[0-9a-f]{32}", spec) and not Path(spec).exists() else open_source(spec).digest
        for spec in data
    ]


def keys_named(paths: CachePaths, digests: Iterable[str]) -> dict[Path, np.ndarray]:
    """refs file -> [names] of S16: the keys that data sets name. Keys of names that were written anew are there too.

    Raises:
        CacheError: a data set has no names in this cache.
    """
    named = {}
    for digest in digests:
        path = paths.refs(digest)
        if not path.is_file():
            raise CacheError(
                f"{paths.directory} knows no data set {digest}: {path.name} is missing. Run `llama3v encode` on it with "
                "this cache first, or choose another fingerprint with --fingerprint"
            )
        named[path] = keys_in(path)
    return named


def keys_in(path: Path) -> np.ndarray:
    """[names] of S16: the keys that one refs file names."""
    return np.frombuffer(b"".join(bytes.fromhex(entry["key"]) for entry in journal.read(path)), dtype="S16")


def _hash(name: str) -> bytes:
    return xxhash.xxh3_128_digest(name.encode(errors="surrogateescape"))


def _pair(name: str, key: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{key} {name}".encode(errors="surrogateescape"))
