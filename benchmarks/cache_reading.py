"""Speed of the cache's reader, of what bounds it, and of the peers: rows for benchmarks/cache.py."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from benchmarks import cache_peers
from benchmarks.common import interleaved, row
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

if TYPE_CHECKING:
    import torch

GRIDS = (Grid(1, 1), Grid(2, 2))  # 1 and 5 tiles
MANIFEST = manifest_of({"vision.kind": "benchmark"}, tile_size=384, max_tiles=6, codec="bf16")
TOGETHER = 16
"""Records of a batch."""
MEMCPY_BYTES = 256 << 20
READER_LIMIT, PEER_LIMIT = 0.5, 5.0
"""What is asked for: share of memcpy, and times the peers."""

Side = Callable[[], None]


def make_features(number: int, shape: tuple[int, int]) -> tuple[str, np.ndarray, Grid]:
    """(key, bits of bf16 values [n_tiles, tokens, width], grid) of the n-th record."""
    grid = GRIDS[number % len(GRIDS)]
    generator = np.random.default_rng(number)
    bits = generator.integers(0, 0x4000, (grid.tiles, *shape), dtype=np.uint16)
    return make_key(number), bits, grid


def make_key(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(b"%d" % number)


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


def read_rows(work: Path, shape: tuple[int, int], tiles: int, rounds: int) -> list[dict[str, Any]]:
    """All sides in each round, each with an order of its own."""
    records = write_cache(work / "cache", shape, tiles)
    keys = [make_key(number) for number in range(records)]
    peers = cache_peers.make(work, shape, records, make_features)
    generator, orders = np.random.default_rng(0), [list(range(records))]

    def shuffle() -> None:
        orders[0] = generator.permutation(records).tolist()

    with CacheReader(work / "cache", threads=1) as alone, CacheReader(work / "cache") as reader:
        total = sum(record.bytes for record in reader.records())
        sides = _ours(alone, reader, keys, orders) | _parts(reader, keys, orders, total)
        for name, read in peers.items():
            sides[name] = _exhaust(read, orders, records)
            sides[f"{name}, batches"] = _gather(read, orders, records)
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        counted = {name: _count_cpu(side, cpu[name]) for name, side in sides.items()}
        seconds = interleaved(counted, rounds, between=shuffle)
    speed = {name: total / median(values) / 1e9 for name, values in seconds.items()}
    cpu_speed = {name: total / median(values[1:]) / 1e9 for name, values in cpu.items()}
    several = f"{reader.threads} threads"
    return [*_memcpy_rows(speed, several), *_part_rows(speed, several), *_peer_rows(speed, cpu_speed, several, peers)]


def _ours(alone: CacheReader, reader: CacheReader, keys: list[str], orders: list[list[int]]) -> dict[str, Side]:
    def one() -> None:
        for number in orders[0]:
            alone.read(keys[number])

    def several() -> None:
        for _ in reader.read_each([keys[number] for number in orders[0]]):
            pass

    def batches(with_reader: CacheReader) -> Side:
        def read() -> None:
            for numbers in cache_peers.in_batches(orders[0], TOGETHER):
                with_reader.read_many([keys[number] for number in numbers])

        return read

    return {
        "one thread": one,
        "several threads": several,
        "one thread, batches": batches(alone),
        "several threads, batches": batches(reader),
    }


def _parts(reader: CacheReader, keys: list[str], orders: list[list[int]], total: int) -> dict[str, Side]:
    """What bounds a read: copying memory, the kernel's copy from the page cache, and the hash alone."""
    places = [reader.record(key) for key in keys]
    files = {place.shard: os.open(reader.paths.shard(place.shard), os.O_RDONLY) for place in places}
    largest = max(place.bytes for place in places)
    size = max(largest, min(total, MEMCPY_BYTES))
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)

    def memcpy(threads: int) -> Side:
        part = size // threads

        def copy(thread: int) -> None:
            left, own = total // threads, slice(thread * part, (thread + 1) * part)
            while left > 0:
                count = min(left, part)
                np.copyto(target[own][:count], source[own][:count])
                left -= count

        return _in_threads(lambda: range(threads), copy, threads)

    def piece(number: int) -> np.ndarray:
        count = places[number].bytes
        start = number * 4096 % (size - count + 1)
        return source[start : start + count]

    def fresh_copy(number: int) -> None:
        piece(number).copy()

    def page_cache(number: int) -> None:
        place, start = places[number], number * largest % (size - largest + 1)
        os.preadv(files[place.shard], [target[start : start + place.bytes].data], place.offset)

    def checksum(number: int) -> None:
        xxhash.xxh3_128_digest(piece(number).data)

    sides: dict[str, Side] = {}
    for name, threads in (("one", 1), ("several", reader.threads)):
        sides[f"memcpy, {name}"] = memcpy(threads)
        for part, work in (("fresh copy", fresh_copy), ("pread", page_cache), ("checksum", checksum)):
            sides[f"{part}, {name}"] = _in_threads(lambda: orders[0], work, threads)
    return sides


def _in_threads(items: Callable[[], Any], work: Callable[[int], None], threads: int) -> Side:
    def run() -> None:
        if threads == 1:
            for item in items():
                work(item)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, items()))

    return run


def _exhaust(read: cache_peers.Read, orders: list[list[int]], records: int) -> Side:
    def run() -> None:
        count = sum(1 for _ in read(orders[0]))
        assert count == records, f"{count} of {records} records came"

    return run


def _gather(read: cache_peers.Read, orders: list[list[int]], records: int) -> Side:
    """Into one tensor for each batch, as a training step takes them."""
    import torch

    def batches(features: "Iterator[torch.Tensor]") -> Iterator[int]:
        while batch := list(islice(features, TOGETHER)):
            torch.cat(batch)
            yield len(batch)

    def run() -> None:
        with closing(read(orders[0])) as features:  # type: ignore[type-var]
            count = sum(batches(features))
        assert count == records, f"{count} of {records} records came"

    return run


def _count_cpu(call: Side, seconds: list[float]) -> Side:
    """The same call, noting the CPU time of the whole process."""

    def counted() -> None:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)

    return counted


def _memcpy_rows(speed: dict[str, float], several: str) -> list[dict[str, Any]]:
    rows = []
    for ours, name, threads in (
        ("one thread", "reader, one thread", "one"),
        ("several threads", f"reader, {several}", "several"),
        ("one thread, batches", f"reader, one thread, batches of {TOGETHER}", "one"),
        ("several threads, batches", f"reader, {several}, batches of {TOGETHER}", "several"),
    ):
        limit = speed[f"memcpy, {threads}"]
        note = f"shuffled, verified; memcpy by as many threads; asked for: ratio of at least {READER_LIMIT}"
        rows.append(row(f"{name} / memcpy", speed[ours], limit, limit=limit, unit="GB/s", note=note))
    return rows


def _part_rows(speed: dict[str, float], several: str) -> list[dict[str, Any]]:
    notes = {
        "fresh copy": (
            "copying records into new memory",
            "what a reader does that returns memory of its own each time",
        ),
        "pread": ("pread alone", "from the page cache into memory that was used before, not verified"),
        "checksum": ("xxh3_128 alone", "of memory"),
    }
    return [
        row(f"{title}, {words}", speed[f"{part}, {name}"], limit=speed[f"memcpy, {name}"], unit="GB/s", note=note)
        for part, (title, note) in notes.items()
        for name, words in (("one", "one thread"), ("several", several))
    ]


def _peer_rows(
    speed: dict[str, float], cpu_speed: dict[str, float], several: str, peers: dict[str, Any]
) -> list[dict[str, Any]]:
    """Ours against every peer, by the clock and by the CPU time of all threads: a peer may have several."""
    rows = []
    for family in cache_peers.FAMILIES:
        tried = [name for name in peers if name.startswith(family)]
        if not tried:
            rows.append(row(f"reader / {family}", speed["several threads"], unit="GB/s", note="not installed here"))
            continue
        for ours, words, kind in (
            ("one thread", "one thread", ""),
            ("several threads", several, ""),
            ("several threads, batches", f"{several}, batches of {TOGETHER}", ", batches"),
        ):
            ways = [name + kind for name in tried]
            best = max(ways, key=speed.__getitem__)
            others = [f"{name} {speed[name]:.3g}" for name in ways if name != best]
            note = "; ".join([f"asked for: ratio of at least {PEER_LIMIT:g}; {best}, not verified", *others])
            rows.append(row(f"reader, {words} / {family}", speed[ours], speed[best], unit="GB/s", note=note))
        best = max(tried, key=cpu_speed.__getitem__)
        name, unit = f"reader, one thread / {family}, by CPU time", "GB per CPU second"
        rows.append(row(name, cpu_speed["one thread"], cpu_speed[best], unit=unit, note=best))
    return rows
