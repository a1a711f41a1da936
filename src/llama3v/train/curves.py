"""The curves of a run as one PNG: loss (with validation, where there is one) above, learning rate below."""

from pathlib import Path
from typing import Any

import numpy as np

from llama3v.train.meter import read_metrics

SMOOTHING = 0.05  # share of the run over which the bold line averages


def draw(metrics: Path, png: Path, title: str) -> None:
    """Draw metrics.jsonl. A run without a finite loss gives empty axes."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    records = list(read_metrics(metrics))
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_loss(above, records)
    steps, rates = _series(records, "learning_rate")
    below.plot(steps, rates, color="#8a5a00", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    above.set_title(title, loc="left", fontweight="bold")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(png)


def _draw_loss(axes: Any, records: list[dict[str, Any]]) -> None:
    steps, losses = _series(records, "loss")
    axes.plot(steps, losses, color="#2f6db5", alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(losses), color="#2f6db5", linewidth=2, label="training")
    for key, label, color in (
        ("validation_loss", "validation", "#1b7f4b"),
        ("validation_loss_shuffled", "validation, shuffled images", "#c0392b"),
    ):
        at, values = _series(records, key)
        if len(at):
            axes.plot(at, values, "o-", color=color, label=label, markersize=4, linewidth=1.5)
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last few steps; fewer at the start."""
    window = max(1, round(len(values) * SMOOTHING))
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts) if len(values) else values
