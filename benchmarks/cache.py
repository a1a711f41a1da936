"""The cache's reader, measured: against memcpy, Lance and WebDataset; its memory; and what faults it survives.

    python -m benchmarks.cache --json benchmarks/results/cache.json

Records have the shape of SigLIP so400m: [n_tiles, 729, 1152] in bf16, 1.68 MB a tile, one and five tiles in turn. They
stand in the page cache. Every side reads all of them in an order that is shuffled anew for each round, in one process,
as torch tensors; only ours verifies them. Interleaved, medians.

Peers, as their documentation has it for random access:
    Lance: `LanceDataset.take` by row numbers (the fastest of 1, 8 and 32 at a time) on a large_binary column, and
        `take_blobs` on a blob column, which reads with threads of its own.
    WebDataset: tar files through `WebDataset(shardshuffle=...).shuffle(...)`, which reads in the order of the files and
        shuffles in a buffer: an easier task than ours.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
import xxhash

from benchmarks import cache_faults, cache_memory, cache_peers
from benchmarks.common import interleaved, row, write_results
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

GRIDS = (Grid(1, 1), Grid(2, 2))  # 1 and 5 tiles
MANIFEST = manifest_of({"vision.kind": "benchmark"}, tile_size=384, max_tiles=6, codec="bf16")
READER_LIMIT, PEER_LIMIT = 0.5, 5.0
"""What is asked for: share of memcpy, and times the peers."""


@dataclass
class Options:
    """What to measure."""

    tiles: int = 600
    """Tiles in the cache: 1.68 MB each."""
    rounds: int = 7
    """Rounds over all records, after one that is not counted."""
    flips: int = 1000
    """Bits to flip, one at a time."""
    memory_mb: int = 64
    """Memory that the process that reads ten times as much may take beside its imports."""
    directory: Path | None = None
    """Where the records are written for the time being (default: the system's directory for temporary files)."""
    json: Path | None = None
    """File for the results."""
    quick: bool = False
    """Tiny records and few rounds: shows that everything runs, and measures nothing."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options.tiles, options.rounds, options.flips, options.memory_mb = 12, 1, 6, 0
    shape = (8, 32) if options.quick else (729, 1152)
    work = Path(tempfile.mkdtemp(prefix="llama3v-benchmark-", dir=options.directory))
    try:
        rows = read_rows(work, shape, options)
        rows += memory_rows(work, shape, options)
        rows += cache_faults.rows(work, options.flips, options.quick)
    finally:
        shutil.rmtree(work)
    write_results(options.json, rows, packages=("numpy", "xxhash", *cache_peers.PACKAGES))


def make_features(number: int, shape: tuple[int, int]) -> tuple[str, np.ndarray, Grid]:
    """(key, bits of bf16 values [n_tiles, tokens, width], grid) of the n-th record."""
    grid = GRIDS[number % len(GRIDS)]
    generator = np.random.default_rng(number)
    bits = generator.integers(0, 0x4000, (grid.tiles, *shape), dtype=np.uint16)
    return make_key(number), bits, grid


def write_cache(root: Path, shape: tuple[int, int], tiles: int) -> int:
    """A cache of so many tiles; returns the number of records."""
    number = 0
    with CacheWriter(root, MANIFEST, shard_bytes=128 << 20) as writer:
        while tiles > 0:
            key, bits, grid = make_features(number, shape)
            writer.add_bytes(key, bits, grid)
            tiles -= grid.tiles
            number += 1
    return number


def read_rows(work: Path, shape: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    """Speed of reading, of its parts, and of the peers."""
    records = write_cache(work / "cache", shape, options.tiles)
    generator = np.random.default_rng(0)
    keys = [make_key(number) for number in range(records)]
    with CacheReader(work / "cache") as reader:
        total = sum(record.bytes for record in reader.records())
        orders: list[list[int]] = [[]]

        def shuffle() -> None:
            orders[0] = generator.permutation(records).tolist()

        def ours() -> None:
            for number in orders[0]:
                reader.read(keys[number])

        sides = {"ours": ours} | parts(reader, keys, orders, total)
        peers = cache_peers.make(work, shape, records, make_features, orders)
        cpu: dict[str, list[float]] = {}
        counted = {name: count_cpu(call, cpu.setdefault(name, [])) for name, call in (sides | peers).items()}
        seconds = interleaved(counted, options.rounds, between=shuffle)
    speed = {name: total / median(values) / 1e9 for name, values in seconds.items()}
    cpu_speed = {name: total / median(values[1:]) / 1e9 for name, values in cpu.items()}
    return [*part_rows(speed), *peer_rows(speed, cpu_speed, list(peers))]


def count_cpu(call: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """The same call, noting the CPU time of the whole process."""

    def counted() -> None:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)

    return counted


def make_key(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(b"%d" % number)


def parts(reader: CacheReader, keys: list[str], orders: list[list[int]], total: int) -> dict[str, Callable[[], None]]:
    """What bounds a read: copying memory, the kernel's copy from the page cache, and the hash alone."""
    places = [reader.record(key) for key in keys]
    files = {place.shard: os.open(reader.paths.shard(place.shard), os.O_RDONLY) for place in places}
    largest = max(place.bytes for place in places)
    buffer = np.ones(largest, dtype=np.uint8)
    size = min(total, 256 << 20)
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)

    def memcpy() -> None:
        left = total
        while left > 0:
            count = min(left, size)
            np.copyto(target[:count], source[:count])
            left -= count

    def fresh_copy() -> None:
        for number in orders[0]:
            count = places[number].bytes
            start = number * 4096 % (size - count + 1)
            source[start : start + count].copy()

    def page_cache() -> None:
        for number in orders[0]:
            place = places[number]
            os.preadv(files[place.shard], [buffer[: place.bytes].data], place.offset)

    def checksum() -> None:
        for number in orders[0]:
            count = places[number].bytes
            start = number * 4096 % (size - count + 1)
            xxhash.xxh3_128_digest(source[start : start + count].data)

    return {"memcpy": memcpy, "fresh copy": fresh_copy, "pread": page_cache, "checksum": checksum}


def part_rows(speed: dict[str, float]) -> list[dict[str, Any]]:
    memcpy = speed["memcpy"]
    return [
        row(
            "reader, shuffled, verified / memcpy",
            speed["ours"],
            memcpy,
            limit=memcpy,
            unit="GB/s",
            note=f"asked for: ratio of at least {READER_LIMIT}",
        ),
        row(
            "copying records into new memory",
            speed["fresh copy"],
            limit=memcpy,
            unit="GB/s",
            note="what any reader that returns memory of its own has to do",
        ),
        row("pread into one buffer", speed["pread"], limit=memcpy, unit="GB/s", note="page cache, not verified"),
        row("xxh3_128 alone", speed["checksum"], limit=memcpy, unit="GB/s", note="of memory; half of it in the reader"),
    ]


def peer_rows(speed: dict[str, float], cpu_speed: dict[str, float], peers: list[str]) -> list[dict[str, Any]]:
    """Ours against every peer, by the clock and by the CPU time of all threads: a peer may have several."""
    rows = []
    for way in cache_peers.WAYS:
        tried = [name for name in peers if name.startswith(way)]
        if not tried:
            rows.append(row(f"reader / {way}", speed["ours"], unit="GB/s", note="not installed here"))
            continue
        best = max(tried, key=lambda name: speed[name])
        others = [f"{name} {speed[name]:.3g}" for name in tried if name != best]
        note = "; ".join([f"asked for: ratio of at least {PEER_LIMIT:g}; {best}, not verified", *others])
        rows.append(row(f"reader / {way}", speed["ours"], speed[best], limit=speed["memcpy"], unit="GB/s", note=note))
        name, unit = f"reader / {way}, by CPU time", "GB per CPU second"
        rows.append(row(name, cpu_speed["ours"], cpu_speed[best], limit=cpu_speed["memcpy"], unit=unit))
    return rows


def memory_rows(work: Path, shape: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    """Memory of a process that reads a cache of ten times what it may take."""
    found = cache_memory.measure(work / "cache", options.memory_mb << 20)
    return [
        row(
            "memory that grows while reading / size of the cache",
            found["grown"] / 2**20,
            found["read"] / 2**20,
            limit=options.memory_mb or None,
            unit="MiB",
            note="private memory of a process of its own at its highest, less that after the first tenth; its data "
            "segment was limited to the limit beside its imports" + ("" if options.memory_mb else " (no limit: quick)"),
        )
    ]


if __name__ == "__main__":
    main()
