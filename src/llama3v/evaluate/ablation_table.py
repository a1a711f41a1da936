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

# Student's t, two-sided 95%, by degrees of freedom: few seeds make wide intervals, and that must show
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rows_of(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each variant.

    Args:
        runs: name -> the summary of each seed's training, seeds in the same order everywhere; the first is the base.

    Returns rows of {name, trained_parameters, visual_tokens_per_tile, seconds, dollars, and for each measure its mean,
    the seeds' values, and `difference` from the base: {value, low, high}, paired by seed; bounds are None of one seed}.
    """
    base = next(iter(runs.values()))
    return [_row(name, summaries, None if summaries is base else base) for name, summaries in runs.items()]


def _row(name: str, summaries: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "trained_parameters": summaries[0]["trained_parameters"],
        "visual_tokens_per_tile": summaries[0]["visual_tokens"] / max(1, summaries[0]["tiles"]),
        "seconds": mean(summary["seconds"] for summary in summaries),
        "dollars": sum(summary["dollars"] for summary in summaries),
    }
    for measure, key in MEASURES.items():
        values = [summary[key] for summary in summaries]
        row[measure] = {"value": mean(values), "seeds": values}
        if base is not None:
            row[measure]["difference"] = interval([a - b[key] for a, b in zip(values, base, strict=True)])
    return row


def interval(differences: list[float]) -> dict[str, float | None]:
    """Mean of paired differences and the 95% interval of Student's t; no bounds for one pair."""
    count, value = len(differences), mean(differences)
    if count < 2:
        return {"value": value, "low": None, "high": None}
    t95 = _T95[count - 2] if count - 2 < len(_T95) else 1.96
    half = t95 * stdev(differences) / math.sqrt(count)
    return {"value": value, "low": value - half, "high": value + half}


def verdict(difference: dict[str, Any] | None, *, lower_is_better: bool) -> str:
    """better, worse, or hidden by the seeds' noise."""
    if difference is None or difference["low"] is None:
        return ""
    if difference["low"] <= 0 <= difference["high"]:
        return "within noise"
    return "better" if (difference["value"] < 0) == lower_is_better else "worse"
