"""`llama3v cache verify`: read all of a cache, and set aside what is damaged."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama3v.feature_cache import journal
from llama3v.feature_cache.index import Index, shard_header_is_whole
from llama3v.feature_cache.layout import CachePaths, read_manifest
from llama3v.feature_cache.progress import scrub_progress
from llama3v.feature_cache.records import Record, ShardIndex, checksum_of
from llama3v.feature_cache.scores_tools import verify_scores

SHOWN = 20
"""Damaged records that the error lists; damaged.jsonl and the report have them all."""

Damage = tuple[str, str, str]
"""(shard, key, reason); an empty key stands for the whole shard."""


def verify(paths: CachePaths) -> dict[str, Any]:
    """Read every byte; set aside what is damaged, so that the encode pass makes it anew.

    Raises:
        CacheError: no or a foreign manifest; damage that could not be set aside (read-only directory).
    """
    read_manifest(paths)
    index = Index(paths)
    index.refresh()
    damage: list[Damage] = [(shard, "", reason) for shard, reason in index.broken.items()]
    total = sum(shard.shard_bytes for shard in index.shards.values())
    with scrub_progress(total) as advance:
        for shard in list(index.shards.values()):
            damage += _scrub(paths, shard, index.damaged, advance)
    index.set_aside(damage)
    pairs, damaged_scores = verify_scores(paths)
    return {
        "records": len(index),
        "shards": len(index.shards),
        "bytes read": total,
        "damaged": [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in damage],
        "waiting to be encoded anew": sorted(_waiting(paths, index)),
        "pair scores": pairs,
        "damaged files of pair scores": damaged_scores,
        "data sets": {path.stem: _named(path, index) for path in sorted((paths.directory / "refs").glob("*.jsonl"))},
    }


def complaint_about_damage(results: dict[str, dict[str, Any]]) -> str:
    """What is wrong after `verify`, in one line; empty where nothing is."""
    damaged = [damage for result in results.values() for damage in result["damaged"]]
    waiting = [key for result in results.values() for key in result["waiting to be encoded anew"]]
    scores = [damage for result in results.values() for damage in result["damaged files of pair scores"]]
    of_scores = (
        f"{len(scores)} damaged files of pair scores are set aside, such as {scores[0]['file']} ({scores[0]['reason']}): "
        "run `llama3v encode --score` again on the data they belong to"
        if scores
        else ""
    )
    if not damaged and not waiting:
        return of_scores
    named = [
        f"{damage['key'] or 'all records'} in shard {damage['shard']} ({damage['reason']})"
        for damage in damaged[:SHOWN]
    ]
    more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    kinds = Counter("shards" if not damage["key"] else "records" for damage in damaged)
    found = " and ".join(f"{count} damaged {kind}" for kind, count in sorted(kinds.items())) or "no new damage"
    return (
        f"{found}{': ' if named else ''}{', '.join(named)}{more}; {len(waiting)} known images wait to be encoded "
        f"anew: run `llama3v encode` again on the data they belong to{'; ' if of_scores else ''}{of_scores}"
    )


def _scrub(
    paths: CachePaths, index: ShardIndex, known: set[tuple[str, str]], advance: Callable[[int], None]
) -> Iterator[Damage]:
    """The damage in one shard that is not known yet."""
    try:
        if not shard_header_is_whole(paths, index):
            yield index.shard, "", "its header is damaged"
            advance(index.shard_bytes)
            return
        advance(index.shard_header_bytes)
        with paths.shard(index.shard).open("rb") as file:
            for number in range(len(index.rows)):
                record = index.record(number)
                reason = _fault(file, record)
                advance(record.bytes)
                if reason and (index.shard, record.key) not in known:
                    yield index.shard, record.key, reason
    except OSError as error:
        if paths.index(index.shard).exists():  # else a prune removed it meanwhile
            yield index.shard, "", f"it cannot be read ({error.strerror})"


def _fault(file: BinaryIO, record: Record) -> str:
    try:
        file.seek(record.offset)
        data = file.read(record.bytes)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return "" if checksum_of(data).hex() == record.checksum else "its bytes do not match their checksum"


def _waiting(paths: CachePaths, index: Index) -> set[str]:
    """Keys that are set aside and have no live record. (Those of a shard without a whole index are not known.)

    Where a prune has removed the damaged bytes, a key counts only if a data set still names it.
    """
    known: set[str] = set()
    gone: set[str] = set()
    for shard, key in index.damaged:
        if not key:
            known.update(record.key for record in index.records_set_aside(shard))
        else:
            (known if paths.index(shard).exists() else gone).add(key)
    if gone:
        for path in (paths.directory / "refs").glob("*.jsonl"):
            known.update(entry["key"] for entry in journal.read(path) if entry["key"] in gone)
    return {key for key in known if key not in index}


def _named(refs: Path, index: Index) -> dict[str, int]:
    """How many images a data set names, how many of them have no record, and how many lines cannot be read."""
    counts = {"names": 0, "without a record": 0, "unreadable lines": journal.unreadable_lines(refs)}
    for entry in journal.read(refs):
        counts["names"] += 1
        counts["without a record"] += entry["key"] not in index
    return counts
