"""Faults against a tiny cache, counted: kills at every step of a commit and of a prune, and single flipped bits.

The machinery is that of tests/faults/, whose tests assert what is counted here.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import row

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import cache_process  # noqa: E402
import prune_process  # noqa: E402

from llama3v.errors import CacheError  # noqa: E402
from llama3v.feature_cache import commit, copies, tools_prune  # noqa: E402
from llama3v.feature_cache.layout import CachePaths, fingerprint_of  # noqa: E402
from llama3v.feature_cache.reader import CacheReader  # noqa: E402
from llama3v.feature_cache.writer import CacheWriter  # noqa: E402

FINGERPRINT = fingerprint_of(cache_process.MANIFEST)
RECORDS, PER_SHARD = 12, 4
WRITER_POINTS = [point for point in commit.CRASH_POINTS if point.startswith(("shard", "index", "manifest"))]
PRUNE_POINTS = [
    *(point for point in commit.CRASH_POINTS if point.startswith(("shard", "index"))),
    *tools_prune.CRASH_POINTS,
]


def rows(work: Path, flips: int, quick: bool = False) -> list[dict[str, Any]]:
    """The counts as rows: `ours` is what went wrong, of `limit` faults."""
    times, step = ((2,), 5) if quick else ((1, 2, 3), 1)
    return [
        *_kill_rows("commit", sweep_commits(work / "kills", WRITER_POINTS[::step], times)),
        *_kill_rows("prune", sweep_prunes(work / "prunes", PRUNE_POINTS[::step], times)),
        *_flip_rows(sweep_flips(work / "flips", flips)),
    ]


def sweep_commits(work: Path, points: Sequence[str], times: Sequence[int]) -> dict[str, int]:
    """Kill a writer at every step of the commits in `times` (1: its first); look; run it again."""
    counts = dict.fromkeys(("kills", "wrong records", "lost records", "incomplete reruns"), 0)
    with _Server(cache_process.__file__, "--serve") as server:
        for point in points:
            for time in times:
                root = work / f"{point}-{time}"
                if server.run(f"{point}:{time} {root} 0 {RECORDS} {PER_SHARD} bf16") != commit.CRASH_EXIT_CODE:
                    continue  # a manifest is written once
                counts["kills"] += 1
                committed = PER_SHARD * (time - 1) if not point.startswith("manifest") else 0
                found, wrong = _look(root)
                counts["wrong records"] += wrong
                counts["lost records"] += max(0, committed - found)
                server.run(f"never {root} 0 {RECORDS} {PER_SHARD} bf16")
                counts["incomplete reruns"] += _look(root) != (RECORDS, 0)
    return counts


def sweep_prunes(work: Path, points: Sequence[str], times: Sequence[int]) -> dict[str, int]:
    """Kill a prune the `times` it comes to a step; what a kept data set names must be there; run it again."""
    counts = dict.fromkeys(("kills", "wrong records", "lost records", "incomplete reruns"), 0)
    prune_process.make_cache(work / "filled")
    with _Server(prune_process.__file__) as server:
        for point in points:
            for time in times:
                root = shutil.copytree(work / "filled", work / f"{point}-{time}")
                if server.run(f"{point}:{time} {root}") != commit.CRASH_EXIT_CODE:
                    continue  # it does not come here so often
                counts["kills"] += 1
                counts["wrong records"] += _look(root)[1]
                counts["lost records"] += sum(key not in CacheReader(root) for key in _kept())
                server.run(f"never {root}")
                complete = set(CacheReader(root).keys()) == _kept() and _look(root)[1] == 0
                counts["incomplete reruns"] += not complete
    return counts


def sweep_flips(work: Path, flips: int) -> dict[str, int]:
    """Flip one bit of a shard or an index; read everything; encode anew what is missing; read again."""
    counts = dict.fromkeys(("flips", "undetected", "not named", "not encoded anew"), 0)
    cache_process.write(str(work / "filled"), range(RECORDS), PER_SHARD)
    generator = random.Random(0)
    with patch.object(copies, "RETRY_SECONDS", 0.0):  # nothing heals between two reads here
        for number in range(flips):
            root = shutil.copytree(work / "filled", work / "flipped")
            path = _flip(root, "*.idx" if number % 3 == 0 else "*.safetensors", generator)
            counts["flips"] += 1
            try:
                _read_all(root)
                counts["undetected"] += 1
            except CacheError as error:
                counts["not named"] += path.stem not in str(error)
            _encode_missing(root)
            counts["not encoded anew"] += _look(root) != (RECORDS, 0)
            shutil.rmtree(root)
    return counts


def _flip(root: Path, pattern: str, generator: random.Random) -> Path:
    path = generator.choice(sorted(CachePaths(root, FINGERPRINT).shards.glob(pattern)))
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)
    return path


def _encode_missing(root: Path) -> None:
    with CacheWriter(root, cache_process.MANIFEST) as writer:
        for number in range(RECORDS):
            writer.add_bytes(cache_process.key_number(number), cache_process.features_of(number), cache_process.GRID)


class _Server:
    """A process that forks others for us, and tells their exit codes."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _kept() -> set[str]:
    return {cache_process.key_number(number) for number in prune_process.KEPT_IMAGES}


def _read_all(root: Path) -> None:
    found = CacheReader(root, cache_process.MANIFEST)
    for number in range(RECORDS):
        found.read_bytes(cache_process.key_number(number))


def _look(root: Path) -> tuple[int, int]:
    """How many records a reader sees, and how many of them are wrong."""
    if not CachePaths(root, FINGERPRINT).manifest.exists():
        return 0, 0
    found = CacheReader(root, cache_process.MANIFEST)
    right = {cache_process.key_number(number): cache_process.features_of(number).tobytes() for number in range(RECORDS)}
    keys = list(found.keys())
    return len(keys), sum(found.read_bytes(key) != right[key] for key in keys)


def _kill_rows(what: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    kills = counts.pop("kills")
    note = f"of {kills} kills, at every step and each of the first times it comes there; asked for: 0"
    return [
        row(f"{what} killed: {name}", count, limit=kills, unit="count", note=note) for name, count in counts.items()
    ]


def _flip_rows(counts: dict[str, int]) -> list[dict[str, Any]]:
    flips = counts.pop("flips")
    note = f"of {flips} bits of shards and indexes, one at a time; asked for: 0"
    return [row(f"bit flipped: {name}", count, limit=flips, unit="count", note=note) for name, count in counts.items()]
