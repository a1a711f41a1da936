"""Curves as PNG, in two themes, without any global state (no pyplot): for reports and for a run's curves.png."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float | None]]
"""(x, y); None is no value, as in a metrics file whose loss was not finite."""

# More points than this are a cloud: they are drawn faintly, with their running mean on top.
CLOUD = 200


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing; `series` are told apart also by readers who do not see red and green apart."""

    background: str
    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1c1f23", "#5d6570", "#e4e7eb", ("#1f6fc4", "#d4681c", "#7a8391", "#178a6a", "#a63d8f"))
DARK = Theme("#191c20", "#e8eaed", "#a2aab5", "#30353c", ("#6cb0f5", "#f29a55", "#9aa3b0", "#4cc9a4", "#e08bcb"))


@dataclass(frozen=True)
class End:
    """Where a line ends, in the data's units."""

    name: str
    color: str
    x: float
    y: float


def draw_lines(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    theme: Theme = LIGHT,
    narrow: bool = False,
) -> bytes:
    """Draw curves and return a PNG, about 1300 pixels wide (`narrow`, for phones: 900, with larger letters).

    `series`: name -> points (x, y). What cannot be drawn (None, not finite, or not above 0 where `log_y`) leaves a
    gap. A series of more than `CLOUD` points is drawn faintly, with its running mean in full colour.
    """
    figure, axes = _empty_axes(x_label, y_label, log_y, theme, narrow)
    ends: list[End] = []
    for index, (name, points) in enumerate((_drawn(name), points) for name, points in series.items()):
        color = theme.series[index % len(theme.series)]
        x, y = _drawable(points, log_y)
        if len(x) > CLOUD:
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
            y = running_mean(y, max(3, len(y) // 40))
        marker = "o" if len(x) == 1 else None
        axes.plot(x, y, color=color, linewidth=2, solid_capstyle="round", marker=marker, label=name)
        drawn = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        if drawn:
            ends.append(End(name, color, *drawn[-1]))
    if not ends:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=theme.muted)
    elif narrow or len(ends) > 5 or max(len(end.name) for end in ends) > 18:
        _add_legend(axes, theme)
    elif len(series) > 1:
        _name_lines(axes, ends)
    return _to_png(figure, theme)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window of up to `window` values, shorter at both ends; what is not finite is left out."""
    half = window // 2
    means = []
    for index in range(len(values)):
        near = [v for v in values[max(0, index - half) : index + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _empty_axes(x_label: str, y_label: str, log_y: bool, theme: Theme, narrow: bool) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(3.8, 3.2) if narrow else (7.6, 3.7), dpi=240 if narrow else 170)
    axes = figure.add_subplot(facecolor=theme.background)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if narrow else 8, steps=[1, 2, 2.5, 5, 10]))
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=10, length=0, which="both", pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    label: dict[str, Any] = {"color": theme.muted, "fontsize": 10.5, "parse_math": False}  # a dollar sign is just that
    axes.set_xlabel(_drawn(x_label), labelpad=6, **label)
    # Along the top and upright: a rotated label is hard to read.
    axes.set_title(_drawn(y_label), loc="left", pad=10, **label)
    axes.margins(x=0.01, y=0.08)
    return figure, axes


def _drawable(points: Points, log_y: bool) -> tuple[list[float], list[float]]:
    x = [float(a) for a, _ in points]
    y = [math.nan if b is None or (log_y and b <= 0) or math.isinf(b) else float(b) for _, b in points]
    return x, y


def _add_legend(axes: "Axes", theme: Theme) -> None:
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, frameon=False, fontsize=10, handlelength=1.2
    )
    for text in legend.get_texts():
        text.set_color(theme.text)
        text.set_parse_math(False)


def _name_lines(axes: "Axes", ends: list[End]) -> None:
    """Write each line's name at its end; names at the right edge are moved apart where they would overlap."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((end.x, end.y)) for end in ends]
    at_edge = [index for index, (x, _) in enumerate(places) if x > 0.85]
    apart = dict(zip(at_edge, spread([float(places[i][1]) for i in at_edge], 0.085), strict=True))
    for index, (end, (x, y)) in enumerate(zip(ends, places, strict=True)):
        right = 1.0 if index in apart else float(x)
        axes.text(
            right + 0.012,
            apart.get(index, float(y)),
            end.name,
            parse_math=False,
            transform=axes.transAxes,
            color=end.color,
            fontsize=10.5,
            va="center",
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours are `gap` from each other, keeping their order and staying near."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    overshoot = (sum(placed) - sum(heights)) / max(1, len(heights))
    return [height - overshoot for height in placed]


def _drawn(text: str) -> str:
    """The text without lone surrogates, which no font can draw."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _to_png(figure: "Figure", theme: Theme) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure)
    options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08, "facecolor": theme.background}
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()
