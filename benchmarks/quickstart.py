"""The quickstart over several seeds: accuracy with the right image, a wrong one and none, seconds and dollars.

    python -m benchmarks.quickstart --out runs/quickstart-seeds --json benchmarks/results/quickstart.json

A seed whose summary.json is there is not run again.
"""

import datetime
import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import tyro

import llama3v
from llama3v.config import QuickstartConfig

ACCURACIES = ("accuracy_right_image", "accuracy_wrong_image", "accuracy_blind")


@dataclass
class Options:
    """What to run."""

    out: Path = Path("runs/quickstart-seeds")
    """Directory of the runs, one for each seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training scenes, the projector and the order; held-out scenes are always the same."""
    json: Path | None = None
    """File for the results."""


def run(seed: int, out: Path) -> dict:
    summary = out / "summary.json"
    if summary.is_file() and "accuracy_right_image" in (found := json.loads(summary.read_text())):
        return found
    return llama3v.quickstart(QuickstartConfig(out=out, seed=seed))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = {seed: run(seed, options.out / f"seed-{seed}") for seed in options.seeds}
    rows = [
        {"seed": seed} | {name: summary[name] for name in (*ACCURACIES, "questions", "seconds", "dollars", "by_kind")}
        for seed, summary in runs.items()
    ]
    results = {
        "mean": {name: round(mean(row[name] for row in rows), 4) for name in (*ACCURACIES, "seconds")},
        "rows": rows,
        "machine": f"{platform.machine()}, {_processor()}, {_cores()} cores",
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("llama3v", "torch", "transformers")},
        "python": platform.python_version(),
        "command": f"python -m benchmarks.quickstart --seeds {' '.join(map(str, options.seeds))}",
    }
    print(json.dumps(results["mean"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {options.json}", file=sys.stderr)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or "unknown processor"


def _cores() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
