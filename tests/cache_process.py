"""A cheap writer of feature caches: imported by tests, and run as a process that tests kill.

    python tests/cache_process.py ROOT FIRST_KEY LAST_KEY RECORDS_PER_SHARD [SECONDS_BETWEEN_RECORDS [FILE_SIZE_LIMIT]]

In bf16 it needs no torch, so that a process starts in a tenth of a second.
"""

from __future__ import annotations

import os
import resource
import sys
import time

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache.codecs import codec_named
from llama3v.feature_cache.commit import CRASH_VARIABLE
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


def manifest_in(codec: str) -> dict[str, str]:
    return {**MANIFEST, "codec": codec}


def write(root: str, numbers: range, records_per_shard: int, seconds: float = 0.0, codec: str = "bf16") -> int:
    """Write what is missing; returns how many records were written."""
    shard_bytes = records_per_shard * codec_named(codec).bytes_of(SHAPE)
    with CacheWriter(root, manifest_in(codec), shard_bytes=shard_bytes) as writer:
        for number in numbers:
            if key_number(number) not in writer:
                writer.add_bytes(key_number(number), features_of(number), GRID)
                time.sleep(seconds)
    return writer.committed_records


def serve() -> None:
    """Fork a writer for every line `CRASH_AT ROOT FIRST LAST PER_SHARD CODEC` on stdin; answer with its exit code.

    A fork takes milliseconds, a new process a tenth of a second and more.
    """
    for line in sys.stdin:
        crash_at, root, first, last, per_shard, codec = line.split()
        if codec != "bf16":
            import torch  # noqa: F401 (once, before the fork)
        child = os.fork()
        if child == 0:
            os.environ[CRASH_VARIABLE] = crash_at
            write(root, range(int(first), int(last)), int(per_shard), codec=codec)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def main(root: str, first: str, last: str, per_shard: str, pause: str = "0", file_limit: str = "") -> None:
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
    try:
        print(write(root, range(int(first), int(last)), int(per_shard), float(pause)))
    except CacheError as error:
        sys.exit(f"CacheError: {error}")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(*sys.argv[1:])
