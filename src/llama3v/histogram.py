"""A histogram as SVG, in the manner of charts.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llama3v.charts import LETTER, Frame, label, literal, number, round_numbers


@dataclass(frozen=True)
class Histogram:
    """Attributes:
    counts: [bars].
    edges: [bars + 1], where they begin and end on the x axis.
    ticks: (x, what is written there); those outside the edges are left out.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def draw_histogram(bars: Histogram, x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> str:
    """Draw it; returns two SVG elements, of class `wide` and `narrow`.

    Args:
        mark: an upright line at x, and what is written beside it.
    """
    return "".join(
        _drawing(bars, x_label, y_label, mark, width, height, kind)
        for kind, width, height in (("wide", 760.0, 300.0), ("narrow", 360.0, 260.0))
    )


def _drawing(
    bars: Histogram, x_label: str, y_label: str, mark: tuple[float, str] | None, width: float, height: float, kind: str
) -> str:
    heights = round_numbers(0, max(bars.counts), False)
    frame = Frame(
        width=width,
        height=height,
        left=8 + LETTER * max(len(number(tick)) for tick in heights),
        right=12,
        bottom=40,
        x=(bars.edges[0], bars.edges[-1]),
        y=(0, heights[-1]),
        log_y=False,
    )
    about = literal(f"histogram of {x_label}")
    parts = [f'<svg class="plot {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{about}">']
    parts += [label(0, 12, y_label), *_grid(frame, heights)]
    for (left, right), count in zip(pairwise(bars.edges), bars.counts, strict=True):
        (x, y), (end, floor) = frame.place(left, count), frame.place(right, 0)
        place = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{end - x - 1:.1f}" height="{floor - y:.1f}"'
        parts.append(f'<rect class="series-0" {place}><title>{count:,}</title></rect>')
    parts += _below(frame, bars.ticks, x_label)
    if mark is not None and frame.x[0] <= mark[0] <= frame.x[1]:
        parts += _mark(frame, *mark)
    return "".join([*parts, "</svg>"])


def _grid(frame: Frame, heights: Sequence[float]) -> list[str]:
    parts = []
    for tick in heights:
        _, y = frame.place(frame.x[0], tick)
        ends = f'x1="{frame.left:.1f}" x2="{frame.width - frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(label(frame.left - 6, y + 4, number(tick), anchor="end"))
    return parts


def _below(frame: Frame, ticks: Sequence[tuple[float, str]], x_label: str) -> list[str]:
    """What is written below the axis: ticks, as far as there is room for them, and the axis' name."""
    parts, floor, free = [], frame.height - frame.bottom, 0.0
    for value, text in ticks:
        x, half = frame.place(value, 0)[0], LETTER * (len(text) + 1) / 2
        if frame.x[0] <= value <= frame.x[1] and x - half >= free:
            parts.append(label(x, floor + 16, text, anchor="middle"))
            free = x + half
    return [*parts, label((frame.left + frame.width - frame.right) / 2, floor + 33, x_label, anchor="middle")]


def _mark(frame: Frame, value: float, text: str) -> list[str]:
    (x, floor), (_, top) = frame.place(value, 0), frame.place(value, frame.y[1])
    is_left = x < frame.width / 2
    return [
        f'<path class="series-1" d="M{x:.1f} {floor:.1f}L{x:.1f} {top:.1f}"/>',
        label(x + (6 if is_left else -6), top + 10, text, anchor="start" if is_left else "end", style="series-1"),
    ]
