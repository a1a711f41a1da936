"""A cheap writer of feature caches: imported by tests, and run as a process that tests kill.

    python tests/cache_process.py ROOT FIRST_KEY LAST_KEY RECORDS_PER_SHARD [SECONDS_BETWEEN_RECORDS [FILE_SIZE_LIMIT]]

It needs no torch, so that a process starts in a tenth of a second.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

MANIFEST = {"vision.kind": "test", "vision.cut": "2", "tile_size": "42", "codec": "bf16"}
GRID = Grid(2, 1)
SHAPE = (3, 9, 8)
RECORD_BYTES = 3 * 9 * 8 * 2


def key_number(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"  # odd, so keys differ and are spread


def features_of(number: int) -> np.ndarray:
    """bf16 bits of finite values that only this number has."""
    generator = np.random.default_rng(number)
    return generator.integers(0, 0x4000, SHAPE).astype(np.uint16)


def write(root: str, numbers: range, records_per_shard: int, seconds: float = 0.0) -> int:
    """Write what is missing; returns how many records were written."""
    with CacheWriter(root, MANIFEST, shard_bytes=records_per_shard * RECORD_BYTES) as writer:
        for number in numbers:
            if key_number(number) not in writer:
                writer.add_bytes(key_number(number), features_of(number), GRID)
                time.sleep(seconds)
    return writer.committed_records


if __name__ == "__main__":
    root, first, last, per_shard, *rest = sys.argv[1:]
    pause = float(rest[0]) if rest else 0.0
    if len(rest) > 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest[1]), int(rest[1])))
    try:
        print(write(root, range(int(first), int(last)), int(per_shard), pause))
    except CacheError as error:
        sys.exit(f"CacheError: {error}")
