"""`llama3v cache info | verify | prune | export | scores`: what a cache holds, whether it is whole, what may go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import llama3v
from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths, fingerprints, read_manifest
from llama3v.feature_cache.orphans import find_orphans
from llama3v.feature_cache.reader import content_digest
from llama3v.feature_cache.scores_format import scored_by
from llama3v.feature_cache.scores_report import report_scores
from llama3v.feature_cache.scores_tools import scores_info
from llama3v.feature_cache.tools_export import export
from llama3v.feature_cache.tools_prune import complaint_about_pruning, prune
from llama3v.feature_cache.tools_verify import complaint_about_damage, verify

SHOWN = 20
"""Entries of a list that the terminal shows; the report has them all."""

Results = dict[str, dict[str, Any]]
"""fingerprint -> what was found or done there."""


def cache(config: CacheConfig) -> Results:
    """Look into a feature cache, verify, prune or export it, or report its pair scores.

    Returns:
        fingerprint -> what it holds (`info`), how much of it was read and what was damaged (`verify`), what went or
        would go (`prune`), what was written (`export`), how pairs scored (`scores`). With `config.out`, the same as <out>/<action>.json.

    Raises:
        CacheError: there is no such cache; `verify` or `prune` found damage, or records that still wait to be encoded
            anew (after everything else was done and reported); a prune beside a writer.
        DataError: a data set to keep cannot be opened.
    """
    chosen = _choose(config)
    actions: dict[str, Callable[[CachePaths, CacheConfig], dict[str, Any]]] = {
        "info": lambda paths, _: info(paths),
        "verify": lambda paths, _: verify(paths),
        "prune": prune,
        "export": export,
        "scores": report_scores,
    }
    try:
        results = {name: actions[config.action](CachePaths(config.cache, name), config) for name in chosen}
        _print(results)
        if config.out is not None:
            _write_report(config, results)
    except OSError as error:
        raise CacheError(
            f"{config.action} of {config.cache} stopped: {error.strerror or error} ({error.filename or 'no file'}); "
            "mend that and run it again"
        ) from error
    complaint = {"verify": complaint_about_damage, "prune": complaint_about_pruning}.get(config.action)
    message = complaint(results) if complaint else ""
    if message:
        raise CacheError(f"{config.cache}: {message}")
    return results


def info(paths: CachePaths) -> dict[str, Any]:
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
        "codecs": sorted({shard.codec for shard in index.shards.values()}),
        "bytes on disk": sum(shard.shard_bytes for shard in index.shards.values()),
        "content digest": content_digest(index),
        "images named, by source": {path.stem: sum(1 for _ in journal.read(path)) for path in refs},
        "quarantined images": sum(1 for _ in journal.read(paths.quarantine)),
        "pair scores": scores_info(paths),
        "set aside": len(index.damaged),
        "damaged shards": index.broken,
        "unfinished files": [path.name for path in find_orphans(paths)],
        "made from": identity,
    }


def _choose(config: CacheConfig) -> list[str]:
    found = fingerprints(config.cache)
    if not found:
        raise CacheError(f"{config.cache} holds no cache; `llama3v encode` makes one")
    if config.fingerprint is not None and config.fingerprint not in found:
        raise CacheError(f"{config.cache} has no fingerprint {config.fingerprint}; it has {', '.join(found)}")
    chosen = found if config.fingerprint is None else [config.fingerprint]
    if config.action == "scores" and config.fingerprint is None:
        chosen = [name for name in found if scored_by(CachePaths(config.cache, name))] or found[:1]
    if config.action in ("export", "scores") and len(chosen) > 1:
        raise CacheError(
            f"{config.cache} holds {len(chosen)} fingerprints ({', '.join(chosen)}) and {config.action} takes one: "
            f"give --fingerprint; `llama3v cache info {config.cache}` shows them in words"
        )
    return chosen


def _write_report(config: CacheConfig, results: Results) -> None:
    assert config.out is not None
    report = {"llama3v": llama3v.__version__, "action": config.action, "cache": str(config.cache)}
    text = json.dumps(report | {"fingerprints": results}, indent=2) + "\n"
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with publish(config.out / f"{config.action}.json", [text.encode()], "report"):
        pass


def _print(results: Results) -> None:
    console = Console(highlight=False)
    for fingerprint, result in results.items():
        table = Table(title=fingerprint, show_header=False, title_justify="left")
        for name, value in result.items():
            table.add_row(name, escape(_in_words(value)))
        console.print(table)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_on_a_line(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        lines = [_on_a_line(item) for item in value[:SHOWN]]
        return "\n".join([*lines, f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else lines) or "none"
    return str(value)


def _on_a_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items() if item != "")
    return _in_words(value)
