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
    partly_used: shard -> rows of its index that stay; they move to a new shard.
    unused: shards of which nothing stays, with those that are set aside as a whole.
    unused_live: how many of these are not set aside.
    twice: records that stay and of which a duplicate goes.
    dropped: reason -> (records, bytes) that go.
    forgotten: refs of data sets that are not kept and that lose records.
    unreadable_lines: in the refs of kept data sets; what such a line named is not known.
    """

    kept_records: int
    kept_bytes: int
    partly_used: dict[str, np.ndarray]
    unused: list[str]
    unused_live: int
    twice: list[Record]
    dropped: dict[str, tuple[int, int]]
    forgotten: list[Path]
    unreadable_lines: int
    bytes_to_copy: int
    bytes_freed: int
    """Once everything is done; on the way, a shard's worth more is needed."""


def make_plan(paths: CachePaths, index: Index, named: Mapping[Path, np.ndarray] | None) -> Plan:
    """Plan a prune.

    Args:
        named: refs of the kept data sets -> the keys they name (S16); None keeps whatever is live.
    """
    shards = list(index.shards.values())  # in order of names, as readers choose among duplicates
    rows = _Rows(shards)
    live = rows.live(index)
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
    copied = int(rows.bytes[stays & np.isin(rows.shard, partly)].sum())
    return Plan(
        kept_records=int(stays.sum()),
        kept_bytes=int(rows.bytes[stays].sum()),
        partly_used={shards[number].shard: np.flatnonzero(stays[rows.span(number)]) for number in partly},
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
        bytes_to_copy=copied,
        bytes_freed=sum(shard.shard_bytes for shard in shards if shard.shard in removed) + aside_bytes - copied,
    )


class _Rows:
    """The rows of all indexes, one after another."""

    def __init__(self, shards: list[ShardIndex]) -> None:
        self.shards = shards
        counts = [len(shard.rows) for shard in shards]
        self.shard = np.repeat(np.arange(len(shards)), counts)
        """[rows]: which shard."""
        self.start = np.concatenate([[0], np.cumsum(counts, dtype=int)])
        """[shards + 1]: where the rows of a shard begin."""
        halves = [np.stack([shard.rows["key_high"], shard.rows["key_low"]], axis=1) for shard in shards]
        packed = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *halves]).astype(">u8")
        self.keys = packed.view("S16").reshape(-1)
        self.bytes = np.concatenate([np.zeros(0, dtype=int), *(shard.rows["bytes"].astype(int) for shard in shards)])

    def span(self, shard: int) -> slice:
        """The rows of a shard."""
        return slice(self.start[shard], self.start[shard + 1])

    def live(self, index: Index) -> np.ndarray:
        """[rows]: whether it is not set aside."""
        damaged: dict[str, list[bytes]] = {}
        for name, key in index.damaged:
            damaged.setdefault(name, []).append(bytes.fromhex(key))
        live = np.ones(len(self.keys), dtype=bool)
        for number, shard in enumerate(self.shards):
            if shard.shard in damaged:
                live[self.span(number)] = ~np.isin(self.keys[self.span(number)], np.array(damaged[shard.shard], "S16"))
        return live

    def records(self, chosen: np.ndarray) -> list[Record]:
        places = np.flatnonzero(chosen)
        return [self.shards[self.shard[place]].record(int(place - self.start[self.shard[place]])) for place in places]

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
