"""All committed records of one fingerprint: which keys there are, and where."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.records import Record, ShardIndex, checksum_of, key_bytes, unpack_index


class SortedKeys:
    """16-byte keys as sorted arrays: 16 bytes a key, where a dict of strings would take some 200."""

    def __init__(self, high: np.ndarray, low: np.ndarray) -> None:
        """[n] and [n] of uint64: the halves of the keys. Equal keys keep their order."""
        self.order = np.lexsort((low, high))
        """[n]: position in the arguments, for every place in the sorted order."""
        self.high = high[self.order]
        self.low = low[self.order]

    def find(self, key: bytes) -> np.ndarray:
        """Positions (in the arguments) at which a key stands, in order."""
        high, low = np.uint64(int.from_bytes(key[:8], "big")), np.uint64(int.from_bytes(key[8:], "big"))
        first, last = self.high.searchsorted(high, "left"), self.high.searchsorted(high, "right")
        return self.order[first:last][self.low[first:last] == low]

    def first_of_each(self) -> np.ndarray:
        """Places in the sorted order where a new key begins."""
        if not len(self.order):
            return np.zeros(0, dtype=np.int64)
        changes = (self.high[1:] != self.high[:-1]) | (self.low[1:] != self.low[:-1])
        return np.flatnonzero(np.concatenate(([True], changes)))


@dataclass(frozen=True)
class _View:
    """The live records as of one refresh; replaced as a whole, so that threads see the old one or the new one."""

    keys: SortedKeys
    shard: np.ndarray
    """[records]: which of the shards."""
    row: np.ndarray
    """[records]: which row of that shard's index."""
    shards: list[ShardIndex]

    def record(self, position: int) -> Record:
        return self.shards[self.shard[position]].record(int(self.row[position]))


class Index:
    """The live records. A record is live if its shard's index is whole and damaged.jsonl does not name it.

    Several live records of one key (two writers raced) are one logical record: the first in order of shard names. Safe
    to use from threads.

    Attributes:
        shards: name -> content of every index that could be trusted.
        broken: name -> reason, for shards that could not.
        damaged: (shard, key) of records, and (shard, "") of whole shards, that are set aside.
    """

    def __init__(self, paths: CachePaths) -> None:
        self.paths = paths
        self.shards: dict[str, ShardIndex] = {}
        self.broken: dict[str, str] = {}
        self.damaged: set[tuple[str, str]] = set()
        self._changing = threading.Lock()
        self._view = self._make_view()

    def refresh(self) -> None:
        """Take in what was committed or set aside since the last time."""
        with self._changing:
            entries = journal.read(self.paths.damaged)
            self.damaged.update((entry["shard"], entry["key"]) for entry in entries)
            names = self._listed()
            while True:
                shards, broken = self._load_all(names)
                before, names = names, self._listed()
                if names == before:
                    break  # else a prune may just have moved records to a shard that the list did not have
            self.shards, self.broken = shards, broken
            self._view = self._make_view()

    def find(self, key: str) -> list[Record]:
        """The live records of a key, the one to use first; none if it is not there."""
        view = self._view
        return [view.record(position) for position in view.keys.find(key_bytes(key))]

    def __contains__(self, key: str) -> bool:
        return len(self._view.keys.find(key_bytes(key))) > 0

    def __len__(self) -> int:
        """Number of logical records."""
        return len(self._view.keys.first_of_each())

    def records(self) -> Iterator[Record]:
        """The logical records in order of their keys."""
        view = self._view
        for place in view.keys.first_of_each():
            position = view.keys.order[place]
            yield view.record(position)

    def records_set_aside(self, shard: str) -> Iterator[Record]:
        """What a shard that is set aside as a whole held; nothing where its index cannot be trusted either."""
        try:
            index = unpack_index(self.paths.index(shard).read_bytes(), shard, self.paths.fingerprint)
        except (ValueError, OSError):
            return
        yield from (index.record(number) for number in range(len(index.rows)))

    def set_aside(self, damage: Iterable[tuple[str, str, str]]) -> None:
        """Mark (shard, key, reason) as damaged, for everyone, from now on; an empty key means the whole shard.

        The bytes stay where they are. A writer takes such keys for absent, and what it writes for them goes to
        another shard, so it is live.

        Raises:
            CacheError: the mark could not be written (read-only directory, disk full). This process still heeds it.
        """
        with self._changing:
            new = [(shard, key, reason) for shard, key, reason in damage if (shard, key) not in self.damaged]
            self.damaged.update((shard, key) for shard, key, _ in new)
            for shard, key, _ in new:
                if not key:
                    self.shards.pop(shard, None)
                    self.broken.pop(shard, None)
            self._view = self._make_view()
        try:
            journal.append(
                self.paths.damaged, [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in new]
            )
        except OSError as error:
            raise CacheError(
                f"cannot mark {len(new)} damaged records in {self.paths.damaged} ({error.strerror}); "
                "make the cache directory writable and run `llama3v cache verify` on it"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_changing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._changing = threading.Lock()

    def _listed(self) -> list[str]:
        names = sorted(path.stem for path in self.paths.shards.glob("*.idx"))
        return [name for name in names if (name, "") not in self.damaged]

    def _load_all(self, names: list[str]) -> tuple[dict[str, ShardIndex], dict[str, str]]:
        """The shards that can be trusted, and the reasons of those that cannot."""
        shards: dict[str, ShardIndex] = {}
        broken: dict[str, str] = {}
        for name in names:
            try:
                shards[name] = self.shards[name] if name in self.shards else self._load(name)
            except (ValueError, OSError) as error:
                broken[name] = str(error)
        return shards, broken

    def _load(self, name: str) -> ShardIndex:
        """Raises ValueError with the reason, or OSError, if the shard cannot be trusted."""
        index = unpack_index(self.paths.index(name).read_bytes(), name, self.paths.fingerprint)
        shard = self.paths.shard(name)
        if not shard.is_file():
            raise ValueError(f"{shard.name} is missing")
        size = shard.stat().st_size
        if size != index.shard_bytes:
            raise ValueError(f"{shard.name} is truncated or foreign: {size} bytes, expected {index.shard_bytes}")
        return index

    def _make_view(self) -> _View:
        shards = list(self.shards.values())  # in order of names
        rows = [np.arange(len(index.rows)) for index in shards]
        suspects = {shard for shard, _ in self.damaged}
        for number, index in enumerate(shards):
            if index.shard in suspects:
                good = [(index.shard, index.record(int(row)).key) not in self.damaged for row in rows[number]]
                rows[number] = rows[number][np.array(good, dtype=bool)]
        high = [index.rows["key_high"][row] for index, row in zip(shards, rows, strict=True)]
        low = [index.rows["key_low"][row] for index, row in zip(shards, rows, strict=True)]
        return _View(
            keys=SortedKeys(_joined(high), _joined(low)),
            shard=np.repeat(np.arange(len(shards)), [len(row) for row in rows]),
            row=np.concatenate([np.zeros(0, dtype=int), *rows]),
            shards=shards,
        )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.uint64), *(part.astype(np.uint64) for part in parts)])


def shard_header_is_whole(paths: CachePaths, index: ShardIndex) -> bool:
    """Whether the part of a shard before its records, which only other tools read, is as it was written."""
    with paths.shard(index.shard).open("rb") as file:
        header = file.read(index.shard_header_bytes)
    return checksum_of(header).hex() == index.shard_header_checksum
