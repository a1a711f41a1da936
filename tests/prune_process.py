"""A cache in which a prune has everything to do, and a server that forks prunes for tests to kill.

    python tests/prune_process.py

It answers every line `CRASH_AT ROOT` on stdin with the exit code of a prune that keeps DATA and was to crash there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

from cache_process import GRID, MANIFEST, RECORD_BYTES, features_of, key_number, write

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import tools_prune
from llama3v.feature_cache.commit import CRASH_VARIABLE, TEMPORARY, host_tag
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths, fingerprint_of
from llama3v.feature_cache.refs import RefsWriter
from llama3v.feature_cache.tools import cache
from llama3v.feature_cache.writer import write_shard

FINGERPRINT = fingerprint_of(MANIFEST)
KEPT, OTHER, INSIDE = "a" * 32, "b" * 32, "c" * 32
"""Digests of three data sets: the one to keep, another, and one whose images are all in the first."""
KEPT_IMAGES = (0, 1, 2, 3, 5, 8, 10)
RECORDS = 12
PER_SHARD = 4


def make_cache(root: Path) -> CachePaths:
    """Shards 0-3 (used), 4-7 and 8-11 (partly used); two duplicates; one record set aside and written anew; orphans."""
    paths = CachePaths(root, FINGERPRINT)
    write(str(root), range(RECORDS), PER_SHARD)
    name(paths, KEPT, KEPT_IMAGES)
    name(paths, OTHER, range(4, RECORDS))
    name(paths, INSIDE, (1, 2, 8))
    index = Index(paths)
    index.refresh()
    (record,) = index.find(key_number(5))
    index.set_aside([(record.shard, record.key, "for a test")])
    write(str(root), range(RECORDS), PER_SHARD)
    records = [index.find(key_number(number))[0] for number in (1, 6)]
    write_shard(
        paths, [(record, features_of(number).tobytes()) for record, number in zip(records, (1, 6), strict=True)]
    )
    (paths.shards / f"{records[0].shard}.safetensors.{host_tag()}-12345678{TEMPORARY}").write_bytes(b"half a shard")
    return paths


def name(paths: CachePaths, digest: str, numbers: object) -> None:
    refs = RefsWriter(paths.refs(digest))
    for number in numbers:  # type: ignore[attr-defined]
        refs.add(f"{number}.png", key_number(number))
    refs.flush()


def prune(root: Path, *keep: str, yes: bool = True, per_shard: int = 2) -> dict:
    """The result of `llama3v cache prune`, with so many records in a new shard."""
    with patch.object(tools_prune, "NEW_SHARD_BYTES", per_shard * RECORD_BYTES):
        return cache(CacheConfig("prune", root, keep=keep, yes=yes))[FINGERPRINT]


def serve() -> None:
    for line in sys.stdin:
        crash_at, root = line.split()
        child = os.fork()
        if child == 0:
            os.environ[CRASH_VARIABLE] = crash_at
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            try:
                prune(Path(root), KEPT, per_shard=1)  # so that there are several commits
            except CacheError:
                os._exit(2)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


__all__ = ["GRID", "MANIFEST", "RECORD_BYTES", "features_of", "key_number", "make_cache", "prune"]

if __name__ == "__main__":
    serve()
