"""The table of an ablation: each variant's losses over the seeds, and its differences from the base with intervals."""

import math
from statistics import mean, stdev
from typing import Any

MEASURES = {
    "loss": "validation_loss",
    "shuffled": "validation_loss_shuffled",
    "gap": "validation_gap",
}
"""Name in the table -> name in a training's summary."""


def rows_of(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each variant.

    Args:
        runs: name -> the summary of each seed's training, seeds in the same order everywhere; the first is the base.

    Returns rows of {name, trained_parameters, visual_tokens_per_tile, seen, left_out, validation_samples, seconds, dollars,
    and for each measure its mean, the seeds' values, and `difference` from the base: {value, low, high}, paired by seed;
    bounds are None of one seed}. `seen`: samples that the steps had; `left_out`: those that fit in no row.
    """
    base = next(iter(runs.values()))
    return [_row(name, summaries, None if summaries is base else base) for name, summaries in runs.items()]


def _row(name: str, summaries: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "trained_parameters": summaries[0]["trained_parameters"],
        "visual_tokens_per_tile": summaries[0]["visual_tokens"] / max(1, summaries[0]["tiles"]),
        "seen": round(mean(summary["epochs"] * summary["samples"] for summary in summaries)),
        "left_out": summaries[0]["left_out"],
        "validation_samples": summaries[0]["validation_samples"],
        "seconds": mean(summary["seconds"] for summary in summaries),
        "dollars": sum(summary["dollars"] for summary in summaries),
    }
    for measure, key in MEASURES.items():
        values = [summary[key] for summary in summaries]
        row[measure] = {"value": mean(values), "seeds": values}
        if base is not None:
            row[measure]["difference"] = interval([a - b[key] for a, b in zip(values, base, strict=True)])
    return row


def unlike_the_base(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each variant whose trainings had other samples, or are measured on others, than the base's.

    Steps have as many tokens everywhere: with more visual tokens for an image a step holds fewer samples, and long samples may
    fit in no row.
    """
    base, *others = rows
    said = []
    for row in others:
        if row["left_out"] != base["left_out"] or row["validation_samples"] != base["validation_samples"]:
            said.append(
                f"{row['name']} left out {row['left_out']:,} samples that fit in no row (the base {base['left_out']:,}) and is "
                f"measured on {row['validation_samples']:,} ({base['validation_samples']:,}): its losses are of other samples; "
                "give longer rows."
            )
        elif abs(row["seen"] - base["seen"]) > 0.05 * base["seen"]:
            said.append(f"{row['name']} saw {row['seen']:,} samples in its steps, the base {base['seen']:,}.")
    return said


def interval(differences: list[float]) -> dict[str, float | None]:
    """Mean of paired differences and the 95% interval of Student's t; no bounds for one pair."""
    count, value = len(differences), mean(differences)
    if count < 2:
        return {"value": value, "low": None, "high": None}
    half = student_t(count - 1) * stdev(differences) / math.sqrt(count)
    return {"value": value, "low": value - half, "high": value + half}


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The two-sided quantile of Student's t: few seeds make wide intervals, and that must show."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < confidence else (low, middle)
    return low


def _t_within(t: float, freedom: int) -> float:
    """The probability that |T| < t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def verdict(difference: dict[str, Any] | None, *, lower_is_better: bool) -> str:
    """better, worse, or hidden by the seeds' noise."""
    if difference is None or difference["low"] is None:
        return ""
    if difference["low"] <= 0 <= difference["high"]:
        return "within noise"
    return "better" if (difference["value"] < 0) == lower_is_better else "worse"
