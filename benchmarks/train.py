"""Training: a step from the cache beside the usual way, what surrounds it, its memory, and where its time goes.

    python -m benchmarks.train --json benchmarks/results/train.json

Random weights at real shapes, in fp32 on a CPU. *The usual way*: transformers' SiglipVisionModel in the loop, samples
padded to the longest, LlamaForCausalLM with logits at every position; the same projector, samples and optimizer. Both
sides run in turn in one process, and medians are compared. So400m has 27 layers, too many for a CPU: two of them run
in the usual step, two more beside it are timed alone, and the time of the 25 others is added from those. The LLM has
all of its layers. The limit is the rate of fp32 matrix products, measured before and after.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
import tyro

from benchmarks.common import interleaved, write_results
from benchmarks.train_logits import HAS_PEAK_MEMORY, measure_memory
from benchmarks.train_overlap import measure_overlap
from benchmarks.train_profile import measure_quickstart
from benchmarks.train_ratio import BOTH, measure_llava, measure_ratio, measure_sources
from benchmarks.train_shapes import QUARTER_8B, SMOLLM2_135M, TINY, random_samples

BEGUN = perf_counter()
PACKAGES = ("transformers", "numpy")
CAPTIONS = {"tiles": [1], "text": (20, 100), "answer_share": 0.7}
CONVERSATIONS = {"tiles": [1, 1, 1, 3], "text": (50, 200), "answer_share": 0.5}
Measured = Literal["ratio", "llava", "sources", "overlap", "memory", "profile"]


@dataclass
class Options:
    """What to run."""

    json: Path | None = None
    """File for the results."""
    quick: bool = False
    """Everything at toy size, in seconds: does it run?"""
    rounds: int = 2
    """Rounds of each comparison; medians are reported."""
    samples: int = 4
    """Samples of a step."""
    parts: tuple[Measured, ...] = ("ratio", "llava", "sources", "overlap", "memory", "profile")
    """What to measure."""


def gemm_rate(side: int, rounds: int) -> float:
    """FLOP/s of a square fp32 product."""
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    seconds = interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, rounds)["gemm"]
    return 2 * side**3 / median(seconds)


def _tell(done: str) -> None:
    print(f"{perf_counter() - BEGUN:.0f} s: {done} is measured", file=sys.stderr, flush=True)


def main(options: Options) -> list[dict[str, Any]]:
    """Measure everything and return the rows."""
    smol, quarter = (TINY, TINY) if options.quick else (SMOLLM2_135M, QUARTER_8B)
    captions = random_samples(options.samples, **CAPTIONS)  # type: ignore[arg-type]
    conversations = random_samples(options.samples, **CONVERSATIONS)  # type: ignore[arg-type]
    load = [round(value, 1) for value in os.getloadavg()]
    side = 256 if options.quick else 2048
    gemm = gemm_rate(side, 5)
    rows: list[dict[str, Any]] = []
    if "ratio" in options.parts:
        for stage, trains, samples in (
            ("stage 1, the projector trains", ("projector",), captions),
            ("stage 2, projector and LLM train", BOTH, conversations),
            ("stage 2, the LLM trains", ("llm",), conversations),
        ):
            name = f"SmolLM2-135M with so400m, {stage}"
            rows += measure_ratio(name, smol, samples, options.rounds, trains=trains, gemm=gemm)
            _tell(name)
    if "llava" in options.parts:
        rows.append(measure_llava(smol, captions, max(1, options.rounds - 1)))
        _tell("LLaVA's projector")
    if "sources" in options.parts:
        rows += measure_sources("a quarter of Llama 3 8B and so400m", quarter, conversations, options.rounds)
        _tell("a quarter of Llama 3 8B")
    if "overlap" in options.parts:
        rows += measure_overlap(steps=6, rounds=options.rounds, quick=options.quick)
        _tell("overlap")
    if "memory" in options.parts and HAS_PEAK_MEMORY:
        rows += measure_memory(*((256, 16_384) if options.quick else (4096, 128_256)))
        _tell("memory")
    if "profile" in options.parts:
        rows.append(measure_quickstart())
    write_results(
        options.json,
        rows,
        PACKAGES,
        gemm_gflops=[round(rate / 1e9, 1) for rate in (gemm, gemm_rate(side, 5))],
        load_at_start=load,
        seconds=round(perf_counter() - BEGUN),
    )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
