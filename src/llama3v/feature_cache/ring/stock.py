"""What lies in a ring, and making room in it. Nothing here is called by two threads at once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from llama3v.feature_cache.commit import crash_point
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.orphans import collect_orphans
from llama3v.feature_cache.presence import Presence
from llama3v.feature_cache.records import Record, checksum_of, index_bytes, shard_header
from llama3v.feature_cache.ring.wanted import Wanted
from llama3v.feature_cache.tools_prune import remove_shard
from llama3v.feature_cache.writer import write_shard

Pending = Sequence[tuple[Record, bytes]]


@dataclass(frozen=True)
class _Shard:
    keys: tuple[str, ...]
    """Of its live records."""
    bytes: int
    """Of its two files."""


class Stock:
    """The shards of a ring, with what is in them. What takes a `presence` is to be called alone, with what `wait_to_be_alone` gave.

    Args:
        bound: bytes that they may take.

    Attributes:
        losses: grows whenever anything that was there is gone.
    """

    def __init__(self, paths: CachePaths, bound: int) -> None:
        self.paths, self.bound, self.losses = paths, bound, 0
        self._index = Index(paths)
        self._damaged = 0
        self._shards: dict[str, _Shard] = {}
        self._keys: set[str] = set()

    @property
    def keys(self) -> set[str]:
        """Of all that is there."""
        return self._keys

    def refresh(self) -> None:
        """See what was committed, removed and set aside since. A shard that cannot be trusted is set aside.

        Raises:
            CacheError: it could not be set aside.
        """
        self._index.refresh()
        self._index.set_aside([(shard, "", reason) for shard, reason in self._index.broken.items()])
        newly_damaged = len(self._index.damaged) != self._damaged
        if not newly_damaged and self._index.shards.keys() == self._shards.keys():
            return
        self.losses += newly_damaged or not self._index.shards.keys() >= self._shards.keys()
        known = {} if newly_damaged else self._shards
        self._damaged = len(self._index.damaged)
        self._shards = {name: known.get(name) or self._describe(name) for name in self._index.shards}
        self._keys = {key for shard in self._shards.values() for key in shard.keys}

    def used(self) -> int:
        """Bytes on disk, those of unfinished and of useless files included."""
        return sum(_size(entry) for entry in os.scandir(self.paths.shards))

    def room(self, wanted: Wanted) -> "Room":
        """How much more fits, as things stand now."""
        needs = self._needs(wanted)
        return Room(self.bound - self.used(), [(needs[name], shard.bytes) for name, shard in self._shards.items()])

    def make_room(self, size: int, step: float, wanted: Wanted, presence: Presence) -> bool:
        """Remove files until `size` more bytes fit, as far as nothing goes that is needed up to `step`; what is needed
        last goes first. Returns whether it was enough."""
        self.refresh()
        used = self.used()
        if used + size > self.bound:
            used -= self._remove_rubbish(presence)
        needs = self._needs(wanted)
        for name in sorted(needs, key=needs.__getitem__, reverse=True):
            if used + size <= self.bound or needs[name] <= step:
                break
            remove_shard(self.paths, name)
            used -= self._shards[name].bytes
        self.refresh()
        return used + size <= self.bound

    def compact(self, step: float, wanted: Wanted, shard_bytes: int, least_gain: float) -> bool:
        """Free what lies in one shard with records that are needed up to `step`: these move to a new shard, as a prune
        moves what stays. To be called alone.

        Returns whether it was done: only where it frees more than the share `least_gain` of what is copied and freed.
        """
        self.refresh()
        pending: dict[str, tuple[Record, bytes]] = {}  # two encoders that raced may have left two records of one key
        emptied: list[str] = []
        for name in sorted(self._shards, key=lambda name: self._share_needed(name, step, wanted)):
            stays = [record for record in self._records(name) if wanted.next_use(record.key) <= step]
            size = sum(record.bytes for record in stays) + sum(record.bytes for record, _ in pending.values())
            if emptied and size > shard_bytes:
                break
            for record in stays:
                if (data := self._read(record)) is not None:
                    pending[record.key] = (record, data)
            emptied.append(name)
        before = sum(self._shards[name].bytes for name in emptied)
        after = file_bytes(list(pending.values())) if pending else 0
        if before - after <= least_gain * before:
            return False
        if pending:
            write_shard(self.paths, list(pending.values()))
            crash_point("ring-compacted")
        for name in emptied:
            remove_shard(self.paths, name)
        self.refresh()
        return True

    def clear(self, presence: Presence) -> None:
        """Remove all shards."""
        self.refresh()
        for name in list(self._shards):
            remove_shard(self.paths, name)
        self._remove_rubbish(presence)
        self.refresh()

    def _describe(self, name: str) -> _Shard:
        index = self._index.shards[name]
        return _Shard(
            tuple(record.key for record in self._records(name)), index.shard_bytes + index_bytes(len(index.rows))
        )

    def _records(self, name: str) -> Iterator[Record]:
        index = self._index.shards[name]
        for number in range(len(index.rows)):
            record = index.record(number)
            if (name, record.key) not in self._index.damaged:
                yield record

    def _needs(self, wanted: Wanted) -> dict[str, float]:
        """The next step that needs anything of each shard, by its name.

        A kill inside a compaction, or encoders without locks, leave records twice. Such a record counts for the shard of
        which nothing is needed late, so that the other may go.
        """
        names, met = list(self._shards), set[str]()
        if sum(len(self._shards[name].keys) for name in names) > len(self._keys):
            names.sort(key=lambda name: max(map(wanted.next_use, self._shards[name].keys), default=inf))
        needs = {}
        for name in names:
            keys = [key for key in self._shards[name].keys if key not in met]
            met.update(keys)
            needs[name] = min(map(wanted.next_use, keys), default=inf)
        return needs

    def _share_needed(self, name: str, step: float, wanted: Wanted) -> float:
        keys = self._shards[name].keys
        return sum(wanted.next_use(key) <= step for key in keys) / max(1, len(keys))

    def _read(self, record: Record) -> bytes | None:
        """The bytes of a record; None, after setting it aside, where they are damaged."""
        try:
            with self.paths.shard(record.shard).open("rb") as file:
                file.seek(record.offset)
                data = file.read(record.bytes)
            if checksum_of(data).hex() == record.checksum:
                return data
            reason = "its bytes do not match their checksum"
        except OSError as error:
            reason = f"it cannot be read ({error.strerror or error})"
        self._index.set_aside([(record.shard, record.key, reason)])
        return None

    def _remove_rubbish(self, presence: Presence) -> int:
        """Orphans of the dead, and shards that are set aside as a whole. Returns their bytes.

        Whoever commits to a ring is alone meanwhile. So who is alone now knows that all orphans' owners are dead, those of
        machines that have crashed included: nobody else would remove them for a day, and they would take room.
        """
        before = self.used()
        collect_orphans(self.paths, none_alive=presence.certain)
        for name, key in list(self._index.damaged):
            if not key and (self.paths.shard(name).exists() or self.paths.index(name).exists()):
                remove_shard(self.paths, name)
        return before - self.used()


class Room:
    """How many bytes may be added for a step: those that are free, and those that later steps hold."""

    def __init__(self, free: int, shards: list[tuple[float, int]]) -> None:
        """`shards`: the next step that needs each, and its bytes."""
        self._free, self._shards = free, sorted(shards, reverse=True)

    def take(self, size: int) -> None:
        """Count bytes that are going to be added."""
        self._free -= size

    def for_step(self, step: int) -> int:
        """Bytes for what `step` needs."""
        while self._shards and self._shards[-1][0] <= step:
            self._shards.pop()  # steps come in order
        return self._free + sum(size for _, size in self._shards)


def file_bytes(pending: Pending) -> int:
    """Size of the two files of a shard of these records."""
    records = [record for record, _ in pending]
    header = shard_header(records, fingerprint="0" * 32)
    return len(header) + sum(record.bytes for record in records) + index_bytes(len(records))


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # removed meanwhile
        return 0
