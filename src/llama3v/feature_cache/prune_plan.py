"""What a prune would do: which records stay, and what that means for every shard. Nothing is changed here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama3v.feature_cache import journal
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.records import Record, ShardIndex
from llama3v.feature_cache.refs import keys_in


@dataclass(frozen=True)
class Plan:
    """Attributes:
    partly_used: shard -> the records of it that stay; they move to a new shard.
    unused: shards of which nothing stays, with those that are set aside as a whole.
    unused_live: how many of these are not set aside.
    twice: records that stay and of which a duplicate goes.
    dropped: reason -> (records, bytes) that go.
    forgotten: refs of data sets that are not kept and that lose records.
    unreadable_lines: in the refs of kept data sets; what such a line named is not known.
    """

    kept_records: int
    kept_bytes: int
    partly_used: dict[str, list[Record]]
    unused: list[str]
    unused_live: int
    twice: list[Record]
    dropped: dict[str, tuple[int, int]]
    forgotten: list[Path]
    unreadable_lines: int
    bytes_freed: int
    """Once everything is done; on the way, a shard's worth more is needed."""

    @property
    def bytes_to_copy(self) -> int:
        return sum(record.bytes for records in self.partly_used.values() for record in records)


def make_plan(paths: CachePaths, index: Index, named: Mapping[Path, np.ndarray] | None) -> Plan:
    """Plan a prune.

    Args:
        named: refs of the kept data sets -> the keys they name (S16); None keeps whatever is live.
    """
    shards = list(index.shards.values())  # in order of names, as readers choose among duplicates
    rows = _Rows(shards)
    live = np.array([row not in index.damaged for row in rows.identities()], dtype=bool)
    wanted = live if named is None else live & np.isin(rows.keys, np.concatenate([*named.values(), rows.keys[:0]]))
    stays = np.zeros(len(live), dtype=bool)
    candidates = np.flatnonzero(wanted)
    stays[candidates[np.unique(rows.keys[candidates], return_index=True)[1]]] = True
    duplicates = wanted & ~stays
    aside = _set_aside_as_a_whole(paths, index)
    per_shard = np.bincount(rows.shard, weights=stays, minlength=len(shards)).astype(int)
    unused = [shard.shard for shard, count in zip(shards, per_shard, strict=True) if count == 0]
    partly = [number for number, shard in enumerate(shards) if 0 < per_shard[number] < len(shard.rows)]
    aside_bytes = sum(size for _, size in aside.values())
    removed = {*unused, *(shards[number].shard for number in partly)}
    partly_used = {shards[number].shard: rows.records(stays & (rows.shard == number)) for number in partly}
    copied = sum(record.bytes for records in partly_used.values() for record in records)
    return Plan(
        kept_records=int(stays.sum()),
        kept_bytes=int(rows.bytes[stays].sum()),
        partly_used=partly_used,
        unused=[*unused, *aside],
        unused_live=len(unused),
        twice=rows.records(stays & np.isin(rows.keys, rows.keys[duplicates])),
        dropped={
            "not named": rows.count(live & ~wanted),
            "duplicates": rows.count(duplicates),
            "set aside": _plus(rows.count(~live), (sum(count for count, _ in aside.values()), aside_bytes)),
        },
        forgotten=[] if named is None else _forgotten(paths, named, rows.keys[stays]),
        unreadable_lines=sum(journal.unreadable_lines(path) for path in named or ()),
        bytes_freed=sum(shard.shard_bytes for shard in shards if shard.shard in removed) + aside_bytes - copied,
    )


class _Rows:
    """The rows of all indexes, one after another."""

    def __init__(self, shards: list[ShardIndex]) -> None:
        self.shards = shards
        counts = [len(shard.rows) for shard in shards]
        self.shard = np.repeat(np.arange(len(shards)), counts)
        """[rows]: which shard."""
        self.row = np.concatenate([np.zeros(0, dtype=int), *(np.arange(count) for count in counts)])
        """[rows]: which row of its index."""
        halves = [np.stack([shard.rows["key_high"], shard.rows["key_low"]], axis=1) for shard in shards]
        packed = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *halves]).astype(">u8")
        self.keys = packed.view("S16").reshape(-1)
        self.bytes = np.concatenate([np.zeros(0, dtype=int), *(shard.rows["bytes"].astype(int) for shard in shards)])

    def identities(self) -> list[tuple[str, str]]:
        """(shard, key) of every row."""
        hexes = self.keys.view(np.uint8).reshape(-1, 16)
        return [(self.shards[shard].shard, key.tobytes().hex()) for shard, key in zip(self.shard, hexes, strict=True)]

    def records(self, chosen: np.ndarray) -> list[Record]:
        return [self.shards[self.shard[place]].record(int(self.row[place])) for place in np.flatnonzero(chosen)]

    def count(self, chosen: np.ndarray) -> tuple[int, int]:
        """Records and their bytes."""
        return int(chosen.sum()), int(self.bytes[chosen].sum())


def _plus(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _set_aside_as_a_whole(paths: CachePaths, index: Index) -> dict[str, tuple[int, int]]:
    """Shard -> (its records as far as they are known, bytes of its files), for those that still have a file."""
    found = {}
    for shard in sorted(shard for shard, key in index.damaged if not key):
        files = [path for path in (paths.index(shard), paths.shard(shard)) if path.exists()]
        if files:
            known = sum(1 for _ in index.records_set_aside(shard))
            found[shard] = known, sum(path.stat().st_size for path in files)
    return found


def _forgotten(paths: CachePaths, named: Mapping[Path, np.ndarray], kept: np.ndarray) -> list[Path]:
    """Refs of data sets that are not kept, and that name a record which is not there after the prune."""
    return [
        path
        for path in sorted((paths.directory / "refs").glob("*.jsonl"))
        if path not in named and not np.isin(keys_in(path), kept).all()
    ]
