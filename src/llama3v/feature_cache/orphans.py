"""What a killed writer leaves behind, and when it is safe to remove it.

An orphan is a temporary file, or a shard without an index. Readers never look at one. A writer that starts removes it
if nobody holds its lock, and its owner is known to be dead: it was made on this running machine, where the kernel frees
a dead process's locks, or it has not changed for a day.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from llama3v.feature_cache.commit import TEMPORARY, host_tag, try_lock
from llama3v.feature_cache.layout import CachePaths

FOREIGN_ORPHAN_SECONDS = 24 * 3600  # far longer than a commit takes


def find_orphans(paths: CachePaths) -> Iterator[Path]:
    """Files that a writer is working on, or that a dead writer left."""
    for directory in (paths.directory, paths.shards, *sorted(paths.scores.glob("*"))):
        yield from sorted(directory.glob(f"*{TEMPORARY}"))
    for shard in sorted(paths.shards.glob("*.safetensors")):
        if not paths.index(shard.stem).exists():
            yield shard


def collect_orphans(paths: CachePaths, none_alive: bool = False) -> list[Path]:
    """Remove the orphans that are safe to remove, and return them.

    Args:
        none_alive: whether it is certain that no writer is at work, on any machine. Then so are all of them.
    """
    return [path for path in find_orphans(paths) if _remove_if_dead(paths, path, none_alive)]


def _remove_if_dead(paths: CachePaths, path: Path, none_alive: bool) -> bool:
    try:
        descriptor = try_lock(path)
    except FileNotFoundError:  # it was committed, or another collector was quicker
        return False
    if descriptor is None:
        return False
    try:
        status = os.fstat(descriptor)
        known_dead = none_alive or host_tag() in path.name
        if not known_dead and time.time() - status.st_mtime < FOREIGN_ORPHAN_SECONDS:
            return False
        # Its owner may have committed it between our look at the directory and our lock.
        if path.suffix == ".safetensors" and paths.index(path.stem).exists():
            return False
        # A rename in that time leaves the lock on the file under its new name: look again whether it is this one.
        if not path.exists() or not os.path.samestat(status, path.stat()):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
