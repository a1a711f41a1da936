"""Training: a step from the cache beside the usual way, what surrounds it, its memory, and where its time goes.

    python -m benchmarks.train --json benchmarks/results/train.json

Random weights at real shapes, in fp32 on a CPU. *The usual way*: transformers' SiglipVisionModel in the loop, samples
padded to the longest, LlamaForCausalLM with logits at every position; the same projector, samples and optimizer. Both
sides run in turn in one process, and medians are compared. So400m has 27 layers, too many for a CPU: two of them run
in the usual step, two more beside it are timed alone, and the time of the 25 others is added from those. The LLM has
all of its layers. The limit is the rate of fp32 matrix products, measured before and after each part.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, get_args

import torch
import tyro

from benchmarks.common import interleaved, write_results
from benchmarks.train_logits import HAS_PEAK_MEMORY, measure_memory
from benchmarks.train_overlap import measure_overlap
from benchmarks.train_profile import measure_quickstart
from benchmarks.train_ratio import BOTH, measure_llava, measure_ratio, measure_sources
from benchmarks.train_shapes import QUARTER_8B, SMOLLM2_135M, TINY, Sample, random_samples

BEGUN = perf_counter()
PACKAGES = ("transformers", "numpy")
CAPTIONS = {"tiles": [1], "text": (20, 100), "answer_share": 0.7}
CONVERSATIONS = {"tiles": [1], "text": (50, 250), "answer_share": 0.5}
Measured = Literal["stage1", "stage2", "memory", "overlap", "sources", "stage2-llm", "quickstart", "llava"]


@dataclass
class Options:
    """What to run."""

    json: Path | None = None
    """File for the results."""
    quick: bool = False
    """Everything at toy size, in seconds: does it run?"""
    rounds: int = 3
    """Rounds of each comparison; medians are reported."""
    samples: int = 3
    """Samples of a step."""
    parts: tuple[Measured, ...] = get_args(Measured)
    """What to measure."""
    minutes: float = 7.0
    """After so many no other part is begun; those that are left out are named."""


def gemm_rate(side: int, rounds: int) -> float:
    """FLOP/s of a square fp32 product."""
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    seconds = interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, rounds)["gemm"]
    return 2 * side**3 / median(seconds)


def measures(options: Options, gemm: float) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """What measures each part, the important ones first."""
    smol, quarter = (TINY, TINY) if options.quick else (SMOLLM2_135M, QUARTER_8B)
    captions = random_samples(options.samples, **CAPTIONS)  # type: ignore[arg-type]
    conversations = random_samples(options.samples, **CONVERSATIONS)  # type: ignore[arg-type]
    fewer = max(1, options.rounds - 1)

    def ratio(stage: str, trains: tuple[str, ...], samples: list[Sample], rounds: int) -> list[dict[str, Any]]:
        return measure_ratio(f"SmolLM2-135M with so400m, {stage}", smol, samples, rounds, trains=trains, gemm=gemm)

    return {
        "stage1": lambda: ratio("stage 1, the projector trains", ("projector",), captions, options.rounds),
        "stage2": lambda: ratio("stage 2, projector and LLM train", BOTH, conversations, options.rounds),
        "memory": lambda: measure_memory(*((256, 16_384) if options.quick else (4096, 128_256))),
        "overlap": lambda: measure_overlap(steps=6, rounds=fewer, quick=options.quick),
        "sources": lambda: measure_sources(
            "a quarter of Llama 3 8B and so400m", quarter, conversations, options.rounds
        ),
        "stage2-llm": lambda: ratio("stage 2, the LLM trains", ("llm",), conversations, fewer),
        "quickstart": lambda: [measure_quickstart()],
        "llava": lambda: [measure_llava(smol, captions, fewer)],
    }


def main(options: Options) -> list[dict[str, Any]]:
    """Measure everything and return the rows; the file is written anew after each part."""
    side, load = 256 if options.quick else 2048, [round(value, 1) for value in os.getloadavg()]
    gemm = [gemm_rate(side, 5)]
    rows: list[dict[str, Any]] = []
    left_out = []
    for part, measure in measures(options, gemm[0]).items():
        if part not in options.parts or (part == "memory" and not HAS_PEAK_MEMORY):
            continue
        if perf_counter() - BEGUN > 60 * options.minutes:
            left_out.append(part)
            continue
        found = measure()
        rows += found
        gemm.append(gemm_rate(side, 3))
        rates = [round(rate / 1e9, 1) for rate in gemm]
        more = {"gemm_gflops": rates, "load_at_start": load, "seconds": round(perf_counter() - BEGUN)}
        write_results(options.json, rows, PACKAGES, show=found, **more)
    if left_out:
        print(f"left out, because --minutes {options.minutes:g} were over: {', '.join(left_out)}")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
