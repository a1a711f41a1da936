"""The cache's reader, measured: against memcpy, Lance and WebDataset; its memory; and what faults it survives.

    python -m benchmarks.cache --json benchmarks/results/cache.json

Records have the shape of SigLIP so400m: [n_tiles, 729, 1152] in bf16, 1.68 MB a tile, one and five tiles in turn. They
stand in the page cache. Every side reads all of them in an order that is shuffled anew for each round, in one process,
as torch tensors; only ours verifies them. Interleaved, medians. The reader is measured with one thread (`read`) and with
as many as it takes by default (`read_each`); memcpy, with as many. In batches, all records of a batch end up in one
tensor, as a training step takes them: ours reads them to where they belong (`read_many`), the peers' are put there by
`torch.cat`.

Peers, as their documentation has it for random access:
    Lance: `LanceDataset.take` by row numbers (the faster of 1 and 8 at a time) on a large_binary column, and
        `take_blobs` and `read_blobs` on a blob column. All read with threads of their own.
    WebDataset: tar files through `WebDataset(shardshuffle=...).shuffle(...)`, which reads in the order of the files and
        shuffles in a buffer: an easier task than ours.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import cache_faults, cache_memory, cache_peers, cache_reading
from benchmarks.common import row, write_results


@dataclass
class Options:
    """What to measure."""

    tiles: int = 300
    """Tiles in the cache: 1.68 MB each."""
    rounds: int = 5
    """Rounds over all records, after one that is not counted."""
    flips: int = 1000
    """Bits to flip, one at a time."""
    memory_mb: int = 96
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
    load = os.getloadavg()[0]
    work = Path(tempfile.mkdtemp(prefix="llama3v-benchmark-", dir=options.directory))
    parts = (
        lambda: cache_reading.read_rows(work, shape, options.tiles, options.rounds),
        lambda: memory_rows(work, options),
        lambda: cache_faults.rows(work, options.flips, options.quick),
    )
    packages, rows = ("numpy", "xxhash", *cache_peers.PACKAGES), []
    try:
        for part in parts:  # written after each: a long run may be ended early
            rows += part()
            write_results(options.json, rows, packages=packages, load_average_before=round(load, 2))
    finally:
        shutil.rmtree(work)


def memory_rows(work: Path, options: Options) -> list[dict[str, Any]]:
    """Memory of a process that reads more than ten times what it may take."""
    found = cache_memory.measure(work / "cache", options.memory_mb << 20)
    return [
        row(
            "memory that grows while reading / what is read",
            found["grown"] / 2**20,
            found["read"] / 2**20,
            limit=options.memory_mb or None,
            unit="MiB",
            note="private memory of a process of its own at its highest, less that after the first tenth; its data "
            "segment was limited to the limit beside its imports; by read, read_each and read_many in turn"
            + ("" if options.memory_mb else " (no limit: quick)"),
        )
    ]


if __name__ == "__main__":
    main()
