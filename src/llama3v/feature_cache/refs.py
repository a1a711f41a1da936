"""Which record belongs to which image of a data set, so that training needs no image files.

refs/<source digest>.jsonl has a line {"name": ..., "key": ...} for every readable image. The last line of a name counts.
"""

from pathlib import Path

import numpy as np
import xxhash

from llama3v.feature_cache import journal
from llama3v.feature_cache.index import SortedKeys


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


def _hash(name: str) -> bytes:
    return xxhash.xxh3_128_digest(name.encode(errors="surrogateescape"))


def _pair(name: str, key: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{key} {name}".encode(errors="surrogateescape"))
