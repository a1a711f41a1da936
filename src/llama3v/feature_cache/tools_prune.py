"""`llama3v cache prune`: drop what no data set needs, without ever risking what stays.

What stays of a partly used shard is committed in a new shard first; only then does the old one go, its index before its
file. So at any moment every record that stays is committed, for a while twice, and a killed prune is simply run again.

For tests: `LLAMA3V_CRASH_AT` (commit.py) knows `CRASH_POINTS` here too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.commit import crash_point, flush_directory
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths, read_manifest
from llama3v.feature_cache.orphans import collect_orphans, find_orphans
from llama3v.feature_cache.presence import enter_alone
from llama3v.feature_cache.progress import prune_progress
from llama3v.feature_cache.prune_plan import Plan, make_plan
from llama3v.feature_cache.records import Record, checksum_of
from llama3v.feature_cache.refs import digests_of, keys_named
from llama3v.feature_cache.scores_tools import ScorePruning
from llama3v.feature_cache.writer import write_shard

CRASH_POINTS = ("prune-refs-removed", "prune-index-removed", "prune-index-flushed", "prune-shard-removed")
NEW_SHARD_BYTES = 256 << 20
"""Size at which records that stay are committed together, and so the memory that a prune takes."""


def prune(paths: CachePaths, config: CacheConfig) -> dict[str, Any]:
    """Drop records that no kept data set names, records that are set aside, and duplicates; with them the pair scores of
    what is not named; collect orphans.

    Without `config.yes`, only count. A kept record of which a duplicate goes is verified first, and so is everything
    that is copied; what turns out to be damaged is set aside.

    Raises:
        CacheError: a kept data set is not in this cache; damaged shards that are not set aside yet; a writer is at
            work.
        OSError: files cannot be read, written or removed. What stays is safe; run it again.
    """
    read_manifest(paths)
    if not config.yes:
        return _in_words(paths, *_plan(paths, config.keep), _plan_scores(paths, config.keep), done=False)
    presence, certain = enter_alone(paths)
    with presence:
        index, plan = _plan(paths, config.keep)
        damaged: list[str] = []
        while found := [record for record in plan.twice if not _is_whole(paths, record)]:
            damaged += [record.key for record in found]
            _set_aside(index, found)  # its duplicate is the record from now on
            index, plan = _plan(paths, config.keep)
        scores = _plan_scores(paths, config.keep)
        result = _in_words(paths, index, plan, scores, done=True)
        collect_orphans(paths)
        scores.run()
        for refs in plan.forgotten:
            _remove(refs, "prune-refs-removed")
        damaged += _Pruning(paths, index, plan).run()
    return result | {"found damaged": damaged} | ({} if certain else {"locks": "none here: no writer may be at work"})


def complaint_about_pruning(results: dict[str, dict[str, Any]]) -> str:
    """What went wrong in a prune that went through, in one line; empty where nothing did."""
    damaged = [key for result in results.values() for key in result.get("found damaged", ())]
    if not damaged:
        return ""
    return (
        f"{len(damaged)} records that were to stay are damaged and set aside ({', '.join(damaged[:20])}); the rest is "
        "done. Run `llama3v encode` again on the data they belong to"
    )


class _Pruning:
    """Carries out a plan."""

    def __init__(self, paths: CachePaths, index: Index, plan: Plan) -> None:
        self.paths, self.index, self.plan = paths, index, plan
        self._pending: list[tuple[Record, bytes]] = []
        self._pending_bytes = 0
        self._copied: list[str] = []  # shards that may go once the pending records are committed

    def run(self) -> list[str]:
        """The keys of records that turned out to be damaged."""
        damaged: list[str] = []
        with prune_progress(self.plan.bytes_to_copy) as advance:
            for shard in self.plan.unused:
                remove_shard(self.paths, shard)
            for shard, rows in self.plan.partly_used.items():
                for record, data in self._read(shard, rows):
                    if data is None:
                        damaged.append(record.key)
                        _set_aside(self.index, [record])
                    else:
                        self._add(record, data)
                    advance(record.bytes)
                self._copied.append(shard)
            self._commit()
        return damaged

    def _read(self, shard: str, rows: np.ndarray) -> Iterator[tuple[Record, bytes | None]]:
        """Records with their bytes, or None where these are damaged."""
        with self.paths.shard(shard).open("rb") as file:
            for record in map(self.index.shards[shard].record, rows.tolist()):
                file.seek(record.offset)
                data = file.read(record.bytes)
                yield record, data if checksum_of(data).hex() == record.checksum else None

    def _add(self, record: Record, data: bytes) -> None:
        self._pending.append((record, data))
        self._pending_bytes += record.bytes
        if self._pending_bytes >= NEW_SHARD_BYTES:
            self._commit()

    def _commit(self) -> None:
        if self._pending:
            write_shard(self.paths, self._pending)
        for shard in self._copied:
            remove_shard(self.paths, shard)
        self._pending, self._pending_bytes, self._copied = [], 0, []


def remove_shard(paths: CachePaths, shard: str) -> None:
    """First its index, which takes its records back; a kill between leaves an orphan."""
    _remove(paths.index(shard), "prune-index-removed")
    crash_point("prune-index-flushed")
    _remove(paths.shard(shard), "prune-shard-removed")


def _remove(path: Path, point: str) -> None:
    path.unlink(missing_ok=True)
    crash_point(point)
    flush_directory(path.parent)


def _plan(paths: CachePaths, keep: tuple[str, ...]) -> tuple[Index, Plan]:
    index = Index(paths)
    index.refresh()
    if index.broken:
        shard, reason = next(iter(index.broken.items()))
        raise CacheError(
            f"{paths.directory}: {len(index.broken)} damaged shards are not set aside yet, the first is {shard} "
            f"({reason}). Run `llama3v cache verify {paths.root}`, then `llama3v encode` on the data they belong to, "
            "then prune"
        )
    return index, make_plan(paths, index, _named(paths, keep))


def _plan_scores(paths: CachePaths, keep: tuple[str, ...]) -> ScorePruning:
    return ScorePruning(paths, _named(paths, keep))


def _named(paths: CachePaths, keep: tuple[str, ...]) -> dict[Path, np.ndarray] | None:
    return keys_named(paths, digests_of(keep)) if keep else None


def _is_whole(paths: CachePaths, record: Record) -> bool:
    with paths.shard(record.shard).open("rb") as file:
        file.seek(record.offset)
        return checksum_of(file.read(record.bytes)).hex() == record.checksum


def _set_aside(index: Index, damaged: list[Record]) -> None:
    index.set_aside([(record.shard, record.key, "its bytes do not match their checksum") for record in damaged])


def _in_words(paths: CachePaths, index: Index, plan: Plan, scores: ScorePruning, done: bool) -> dict[str, Any]:
    unfinished = [path for path in find_orphans(paths) if path.exists()]
    return {
        "done": done if done else "no: this is what would go; add --yes to do it",
        "records that stay": plan.kept_records,
        "bytes that stay": plan.kept_bytes,
        "records that go": {
            reason: {"records": count, "bytes": size} for reason, (count, size) in plan.dropped.items()
        },
        "unfinished files": [path.name for path in unfinished],
        "shards left as they are": len(index.shards) - len(plan.partly_used) - plan.unused_live,
        "shards written anew": len(plan.partly_used),
        "shards of which nothing stays": len(plan.unused),
        "bytes to copy": plan.bytes_to_copy,
        "bytes freed": plan.bytes_freed + sum(path.stat().st_size for path in unfinished),
        "pair scores that stay": scores.stays,
        "pair scores that go": scores.goes,
        "data sets forgotten": [path.stem for path in plan.forgotten],
        "unreadable lines in the names of kept data sets": plan.unreadable_lines,
    }
