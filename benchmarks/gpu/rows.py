"""From the figures of the parts to rows of results, and to the price of the whole run."""

from collections.abc import Mapping
from typing import Any

from benchmarks.common import row
from benchmarks.gpu.parts import PARTS, Part

SAMPLES = {1: 600_000, 2: 1_000_000}
TILES = 0.6e6 + 7e6
"""The seed's run: 600,000 captions with one tile, a million conversations with seven tiles."""
GOALS = {1: 0.50, 2: 0.45}
"""MFU that issue 4 asks for, by stage."""
GOAL_DOLLARS = 100
REAL_SHAPE = "llama3-8b"
GIB = 2**30

Figures = Mapping[str, Mapping[str, Any]]


def rows_of(figures: Figures, dollars_per_hour: float, shape: str) -> list[dict[str, Any]]:
    """The rows of all parts that have figures by now, and the dollars as far as they can be known."""
    rows: list[dict[str, Any]] = []
    peak = rate_of(figures)
    for part in PARTS:
        found = figures.get(part.name)
        if found is None or "error" in found:
            continue
        if part.kind == "gemm":
            rows += _gemm_rows(found)
        elif part.kind == "encode":
            rows += _encode_rows(part, found, peak)
        else:
            rows += _training_rows(part, found, peak, figures)
    rows += _dollar_rows(figures, dollars_per_hour)
    if shape != REAL_SHAPE:
        for entry in rows:
            entry["note"] = f"shape {shape}: shows that it runs, and means nothing else; {entry['note']}"
    return rows


def rate_of(figures: Figures) -> float | None:
    """The GEMM rate that was measured, FLOP/s: the better of the two shapes."""
    gemm = figures.get("gemm", {})
    return None if "square" not in gemm else max(gemm["square"], gemm["widest_layer"])


def _gemm_rows(gemm: Mapping[str, Any]) -> list[dict[str, Any]]:
    sheet = gemm["datasheet"]
    limit = None if sheet is None else sheet / 1e12
    return [
        row(
            "GEMM, bf16, square",
            gemm["square"] / 1e12,
            limit=limit,
            unit="TFLOP/s",
            note="the limit is the datasheet's",
        ),
        row("GEMM, bf16, the LLM's widest layer", gemm["widest_layer"] / 1e12, limit=limit, unit="TFLOP/s"),
    ]


def _encode_rows(part: Part, found: Mapping[str, Any], peak: float | None) -> list[dict[str, Any]]:
    utilisation = f"MFU {found['model_flops_per_second'] / peak:.1%} of the measured GEMM rate; " if peak else ""
    note = (
        f"{utilisation}{found['layers']} layers, {found['flops_per_tile'] / 1e12:.3g} TFLOP a tile, "
        f"{found['tiles_in_pass']} tiles a pass, bf16; the tower alone, without copies from and to host memory: "
        f"{found['tower_alone_tiles_per_second']:.4g}; first pass after {found['opening_seconds']:.0f} s; "
        f"{_shares(found)}"
    )
    return [row(f"{part.name}: tiles/s", found["tiles_per_second"], unit="tiles/s", note=note)]


def _training_rows(part: Part, found: Mapping[str, Any], peak: float | None, figures: Figures) -> list[dict[str, Any]]:
    training = part.training
    assert training is not None
    sheet = figures.get("gemm", {}).get("datasheet")
    memory = figures.get("gemm", {}).get("environment", {}).get("accelerator_bytes")
    rate = found["model_flops_per_second"]
    of_sheet = f"; {rate / sheet:.1%} of the datasheet's {sheet / 1e12:.0f}" if sheet else ""
    passes = f"{found['rows_per_pass']} x {found['row_tokens']} tokens a pass, {found['passes_per_step']} passes a step"
    left = f"; too large for the memory: {', '.join(found['too_large'])}" if found["too_large"] else ""
    rows = [
        row(
            f"{part.name}: model FLOP/s beside the measured GEMM rate (MFU)",
            rate / 1e12,
            peak / 1e12 if peak else None,
            limit=sheet / 1e12 if sheet else None,
            unit="TFLOP/s",
            note=f"{training.what}; {passes}, rows {found['row_fill']:.1%} full{left}{of_sheet}; goal {GOALS[training.stage]:.0%}",
        ),
        row(
            f"{part.name}: tokens/s",
            found["tokens_per_second"],
            unit="tokens/s",
            note=f"{found['samples_per_second']:.4g} samples/s, {found['tiles_per_second']:.4g} tiles/s; "
            f"{found['trained_parameters']:,} parameters train",
        ),
        row(
            f"{part.name}: step beside forward and backward alone on the same rows",
            found["step_seconds"],
            found["forward_backward_seconds"],
            unit="s",
            note=f"the rest is the optimizer and clipping, copies to the GPU, and waiting for rows ({found['wait_share']:.1%})",
        ),
        row(f"{part.name}: where a step's time goes", _busy(found), unit="share that the device works",
            note=_shares(found)),
    ]  # fmt: skip
    if found["peak_bytes"] is not None:
        limit = memory / GIB if memory else None
        rows.append(row(f"{part.name}: peak memory", found["peak_bytes"] / GIB, limit=limit, unit="GiB"))
    return rows


def _busy(found: Mapping[str, Any]) -> float | None:
    shares = found["kernels"]["shares"]
    return 1 - shares["idle"] if shares else None


def _shares(found: Mapping[str, Any]) -> str:
    kernels = found["kernels"]
    if "error" in kernels:
        return f"not profiled: {kernels['error']}"
    shares = sorted(kernels["shares"].items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares)


def _dollar_rows(figures: Figures, price: float) -> list[dict[str, Any]]:
    """One row for each way to train stage 2 of which everything is measured."""
    encode = _best(figures, "encode", "tiles_per_second")
    stage1 = _best(figures, "stage1", "samples_per_second")
    rows = []
    for name, way in (("stage2-full", "full fine-tuning"), ("stage2-lora", "LoRA")):
        stage2 = _best(figures, name, "samples_per_second")
        if encode is None or stage1 is None or stage2 is None:
            continue
        hours = {
            f"encode ({encode[0]})": TILES / encode[1] / 3600,
            f"stage 1 ({stage1[0]})": SAMPLES[1] / stage1[1] / 3600,
            f"stage 2 ({stage2[0]})": SAMPLES[2] / stage2[1] / 3600,
        }
        parts = "; ".join(f"{part} {taken:.3g} h" for part, taken in hours.items())
        note = f"600k captions of one tile, 1M conversations of seven, at ${price:g} an hour: {parts}; the limit is the goal"
        rows.append(
            row(f"the whole run, {way}", sum(hours.values()) * price, limit=GOAL_DOLLARS, unit="dollars", note=note)
        )
    return rows


def _best(figures: Figures, prefix: str, figure: str) -> tuple[str, float] | None:
    """(part, figure) of the fastest part of those whose names begin so."""
    found = [(name, part[figure]) for name, part in figures.items() if name.startswith(prefix) and figure in part]
    return max(found, key=lambda item: item[1], default=None)
