"""`llama3v cache info` and `llama3v cache verify`: look into a cache, and read all of it to find damage."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.index import Index, shard_header_is_whole
from llama3v.feature_cache.layout import CachePaths, fingerprints, read_manifest
from llama3v.feature_cache.orphans import find_orphans
from llama3v.feature_cache.progress import scrub_progress
from llama3v.feature_cache.reader import content_digest
from llama3v.feature_cache.records import ShardIndex, checksum_of

SHOWN = 20
"""Damaged records that the error lists; damaged.jsonl has them all."""

Damage = tuple[str, str, str]
"""(shard, key, reason); an empty key stands for the whole shard."""


def cache(config: CacheConfig) -> dict[str, Any]:
    """Look into a feature cache.

    Returns:
        fingerprint -> what it holds (`info`), or how much of it was read and what was damaged (`verify`).

    Raises:
        CacheError: there is no cache, or `verify` found damage or records that still wait to be encoded anew.
    """
    found = fingerprints(config.cache)
    if not found:
        raise CacheError(f"{config.cache} holds no cache; `llama3v encode` makes one")
    action = {"info": _info, "verify": _verify}[config.action]
    results = {fingerprint: action(CachePaths(config.cache, fingerprint)) for fingerprint in found}
    _print(results)
    if config.action == "verify":
        _raise_if_damaged(config.cache, results)
    return results


def _info(paths: CachePaths) -> dict[str, Any]:
    """Counts, bytes and the fingerprint in words, from the indexes alone."""
    identity = read_manifest(paths)
    index = Index(paths)
    index.refresh()
    records = tiles = size = 0
    for record in index.records():
        records, tiles, size = records + 1, tiles + record.n_tiles, size + record.bytes
    refs = sorted((paths.directory / "refs").glob("*.jsonl"))
    return {
        "records": records,
        "tiles": tiles,
        "bytes": size,
        "shards": len(index.shards),
        "bytes on disk": sum(shard.shard_bytes for shard in index.shards.values()),
        "content digest": content_digest(index),
        "images named, by source": {path.stem: sum(1 for _ in journal.read(path)) for path in refs},
        "quarantined images": sum(1 for _ in journal.read(paths.quarantine)),
        "set aside": len(index.damaged),
        "damaged shards": index.broken,
        "unfinished files": [path.name for path in find_orphans(paths)],
        "made from": identity,
    }


def _verify(paths: CachePaths) -> dict[str, Any]:
    """Read every byte; set aside what is damaged, so that the encode pass makes it anew."""
    read_manifest(paths)
    index = Index(paths)
    index.refresh()
    damage: list[Damage] = [(shard, "", reason) for shard, reason in index.broken.items()]
    total = sum(shard.shard_bytes for shard in index.shards.values())
    with scrub_progress(total) as advance:
        for shard in list(index.shards.values()):
            damage += _scrub(paths, shard, index.damaged, advance)
    index.set_aside(damage)
    return {
        "records": len(index),
        "shards": len(index.shards),
        "bytes read": total,
        "damaged": [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in damage],
        "waiting to be encoded anew": sorted(_waiting(paths, index)),
    }


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
                file.seek(record.offset)
                data = file.read(record.bytes)
                advance(record.bytes)
                if checksum_of(data).hex() != record.checksum and (index.shard, record.key) not in known:
                    yield index.shard, record.key, "its bytes do not match their checksum"
    except OSError as error:
        yield index.shard, "", f"it cannot be read ({error.strerror})"


def _waiting(paths: CachePaths, index: Index) -> Iterator[str]:
    """Keys that are set aside and have no live record. (Those of a shard without a whole index are not known.)"""
    shards = {shard for shard, key in index.damaged if not key}
    keys = {key for _, key in index.damaged if key}
    for shard in shards:
        keys.update(record.key for record in index.records_set_aside(shard))
    return (key for key in keys if key not in index)


def _raise_if_damaged(root: Path, results: dict[str, dict[str, Any]]) -> None:
    damaged = [damage for result in results.values() for damage in result["damaged"]]
    waiting = [key for result in results.values() for key in result["waiting to be encoded anew"]]
    if not damaged and not waiting:
        return
    named = [
        f"{damage['key'] or 'all records'} in shard {damage['shard']} ({damage['reason']})"
        for damage in damaged[:SHOWN]
    ]
    more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    kinds = Counter("shards" if not damage["key"] else "records" for damage in damaged)
    found = " and ".join(f"{count} damaged {kind}" for kind, count in sorted(kinds.items())) or "no new damage"
    raise CacheError(
        f"{root}: {found}{': ' if named else ''}{', '.join(named)}{more}; {len(waiting)} known images wait to be encoded "
        "anew: run `llama3v encode` again on the data they belong to"
    )


def _print(results: dict[str, dict[str, Any]]) -> None:
    console = Console(highlight=False)
    for fingerprint, result in results.items():
        table = Table(title=fingerprint, show_header=False, title_justify="left")
        for name, value in result.items():
            table.add_row(name, escape(_in_words(value)))
        console.print(table)


def _in_words(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_in_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        lines = [" ".join(filter(None, item.values())) if isinstance(item, dict) else item for item in value[:SHOWN]]
        return "\n".join([*lines, f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else lines) or "none"
    return str(value)
