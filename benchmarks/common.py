"""What every benchmark shares: where and with what it ran, interleaved timing, and the file of results.

A row is {name, ours, peer, ratio, limit, unit, note}: `peer` is what ours is compared with and `ratio` is ours / peer;
`limit` is what the hardware gave in the same run. What a row does not have is null.
"""

import datetime
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


def row(
    name: str,
    ours: float | None,
    peer: float | None = None,
    *,
    limit: float | None = None,
    unit: str,
    note: str = "",
) -> dict[str, Any]:
    """One row of the results, rounded to 4 digits."""
    ratio = ours / peer if ours is not None and peer else None
    values = {"ours": ours, "peer": peer, "ratio": ratio, "limit": limit}
    rounded = {key: None if value is None else float(f"{value:.4g}") for key, value in values.items()}
    return {"name": name, **rounded, "unit": unit, "note": note}


def machine() -> dict[str, Any]:
    """The machine in words, without names of hosts or paths."""
    import torch

    memory = Path("/proc/meminfo")
    kilobytes = int(memory.read_text().split()[1]) if memory.is_file() else 0
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(kilobytes / 2**20, 1) or None,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, llama3v and `packages`; null for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("llama3v", "torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def interleaved(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    between: Callable[[], Any] | None = None,
    patience: float = float("inf"),
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call: all sides in every round, one after another, after one round that is not counted.

    Of a side that takes more than `patience` times the fastest's time that first round is all there is. Without
    `warm_up` the first round is one of `rounds`, and counts: for calls of many seconds, which are hardly slower then.
    """

    def timed(call: Callable[[], Any]) -> float:
        if between is not None:
            between()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    first = {name: timed(call) for name, call in sides.items()}
    given_up = {name for name, value in first.items() if value > patience * min(first.values())}
    counted = given_up if warm_up else set(sides)
    seconds: dict[str, list[float]] = {name: [first[name]] if name in counted else [] for name in sides}
    for _ in range(rounds if warm_up else rounds - 1):
        for name, call in sides.items():
            if name not in given_up:
                seconds[name].append(timed(call))
    return seconds


def medians(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, interleaved."""
    return {name: median(values) for name, values in interleaved(sides, rounds).items()}


def write_results(
    path: Path | None,
    rows: Sequence[Mapping[str, Any]],
    packages: Sequence[str] = (),
    *,
    show: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> None:
    """Print the rows, or those to `show`, and write all of them to `path` with the machine, versions, commit and command."""
    for entry in rows if show is None else show:
        print(in_words(entry))
    if path is None:
        return
    results = document(rows, machine=machine(), versions=versions(*packages), **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def document(rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """What a file of results holds: when, from which commit and with which command, what is given, and the rows."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": _command(),
        **more,
        "rows": list(rows),
    }


def in_words(entry: Mapping[str, Any]) -> str:
    """One row in one line, for people."""
    words = [f"{entry['name']}: {entry['ours']} {entry['unit']}"]
    if entry["peer"] is not None:
        words.append(f"peer {entry['peer']}, ratio {entry['ratio']}")
    if entry["limit"] is not None:
        words.append(f"limit {entry['limit']}")
    return "; ".join([*words, entry["note"]] if entry["note"] else words)


def _command() -> str:
    """The command line; a file outside the repository by its name alone."""
    program = Path(sys.argv[0])
    module = f"benchmarks.{program.parent.name if program.stem == '__main__' else program.stem}"
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return f"python -m {module} {shlex.join(arguments)}".strip()


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
