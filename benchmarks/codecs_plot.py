"""The plot of benchmarks/codecs.py: error and size on each set of features, and the held-out loss of every run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSS = "held-out loss in bf16"
COLOURS = {
    "bf16": "#555555",
    "int8 without channel scales": "#e0a030",
    "int8": "#2f6db5",
    "fp8": "#c0392b",
    "fp8 with channel scales": "#8e5ea2",
}


def plot(rows: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[str, list[float]]], png: Path) -> None:
    """Draw what there is: features, training or both."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    values = {entry["name"]: entry["ours"] for entry in rows}
    sets = [name for name in ("scenes", "photos") if f"{name}, bf16: size" in values]
    panels = len(sets) + bool(losses)
    if not panels:
        return
    figure = Figure(figsize=(4.6 * panels, 4.2), dpi=130, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for name in sets:
        _draw_errors(axes.pop(0), name, values)
    if losses:
        _draw_losses(axes.pop(0), losses)
    figure.savefig(png)


def _draw_errors(axes: Any, name: str, values: Mapping[str, float]) -> None:
    """Size across, error up: lower left is better. The line ends at the worst token."""
    full = values[f"{name}, bf16: size"]
    for codec, colour in COLOURS.items():
        size = values[f"{name}, {codec}: size"] / full
        middle, worst = (values[f"{name}, {codec}: relative error, {which}"] for which in ("mean", "worst token"))
        axes.plot([size, size], [100 * middle, 100 * worst], "-", color=colour, linewidth=2)
        axes.plot(size, 100 * middle, "o", color=colour, markersize=8, label=codec)
        axes.plot(size, 100 * worst, "_", color=colour, markersize=12)
    axes.set_yscale("log")
    for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_ticks("{x:g}")
    axes.set_xlim(0.4, 1.1)
    axes.set_xlabel("bytes, as a share of bf16")
    axes.set_ylabel("relative error of a token, % (dot: mean, bar: worst)")
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, f"{name}: error and size")


def _draw_losses(axes: Any, losses: Mapping[str, Mapping[str, list[float]]]) -> None:
    """A dot for each seed, joined seed by seed; the line is the mean."""
    names = list(losses)
    for seed, found in enumerate(zip(*(losses[name][LOSS] for name in names), strict=True)):
        axes.plot(range(len(names)), found, "-", color="#cccccc", linewidth=1, zorder=1)
        axes.text(len(names) - 0.9, found[-1], f"seed {seed}", fontsize=8, va="center")
    for place, name in enumerate(names):
        found = losses[name][LOSS]
        axes.plot([place] * len(found), found, "o", color=COLOURS[name], markersize=6)
        average = sum(found) / len(found)
        axes.plot([place - 0.25, place + 0.25], [average, average], "-", color=COLOURS[name], linewidth=2.5)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.3)
    axes.set_xlabel("codec of the cache that was trained on")
    axes.set_ylabel("held-out loss on bf16 features, nats/token")
    _finish(axes, "training: loss by seed, and mean")


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
