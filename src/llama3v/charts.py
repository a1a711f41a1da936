"""Curves as SVG: text that a report holds within itself. Their colours are the page's, so they follow its theme.

A drawing has two widths, one for phones; `.wide` and `.narrow` in the page's style show the one that fits. Nothing but
the standard library is needed, and a drawing takes milliseconds: every training run ends with some.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float | None]]
"""(x, y); None is no value, as in a metrics file whose loss was not finite."""

CLOUD = 200
"""More points than this are a cloud: they are drawn faintly, with their running mean on top."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page; `series` are told apart also by readers who do not see red and green apart."""

    background: str
    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1c1f23", "#5d6570", "#e4e7eb", ("#1f6fc4", "#d4681c", "#7a8391", "#178a6a", "#a63d8f"))
DARK = Theme("#191c20", "#e8eaed", "#a2aab5", "#30353c", ("#6cb0f5", "#f29a55", "#9aa3b0", "#4cc9a4", "#e08bcb"))

LETTER = 6.2  # mean width of a letter at the size that the page's style sets, in the drawing's units
LINE = 15.0  # height of a line of text


@dataclass(frozen=True)
class Frame:
    """Where the curves lie within a drawing, and how values become places."""

    width: float
    height: float
    left: float
    right: float  # distance from the right edge, where names of curves stand
    bottom: float  # height below the axis: numbers, its name, and a legend if there is one
    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool
    top = 26.0  # height above: the name of the vertical axis

    def place(self, x: float, y: float) -> tuple[float, float]:
        low, high = self._scaled(self.y[0]), self._scaled(self.y[1])
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (self._scaled(y) - low) / ((high - low) or 1)
        floor = self.height - self.bottom
        return self.left + across * (self.width - self.left - self.right), floor - up * (floor - self.top)

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.log_y else y


def draw_lines(series: Mapping[str, Points], x_label: str, y_label: str, *, log_y: bool = False) -> str:
    """Draw curves; returns two SVG elements, of class `wide` and `narrow`.

    Args:
        series: name -> points. What cannot be drawn (None, not finite, or not above 0 where `log_y`) leaves a gap. A
            series of more than CLOUD points is drawn faintly, with its running mean in full colour.
    """
    curves = {name: [(float(x), _value(y, log_y)) for x, y in points] for name, points in series.items()}
    return "".join(
        _drawing(curves, x_label, y_label, log_y, width=width, height=height, kind=kind)
        for kind, width, height in (("wide", 760.0, 340.0), ("narrow", 360.0, 290.0))
    )


def _value(y: float | None, log_y: bool) -> float:
    return math.nan if y is None or not math.isfinite(y) or (log_y and y <= 0) else float(y)


def _drawing(
    curves: Mapping[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    log_y: bool,
    *,
    width: float,
    height: float,
    kind: str,
) -> str:
    drawn = [point for points in curves.values() for point in points if not math.isnan(point[1])]
    about = literal(f"{y_label} over {x_label}: {', '.join(curves)}")
    head = f'<svg class="plot {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{about}">'
    if not drawn:
        return f"{head}{label(width / 2, height / 2, 'no values', anchor='middle')}</svg>"
    names = [name for name, points in curves.items() if any(not math.isnan(y) for _, y in points)]
    longest = max(map(len, names))
    has_legend = kind == "narrow" or len(names) > 5 or longest > 24
    names_at_end = len(names) > 1 and not has_legend
    ticks = round_numbers(min(y for _, y in drawn), max(y for _, y in drawn), log_y)
    legend_rows = sum(_legend_rows(names, width)) if has_legend and len(curves) > 1 else 0
    frame = Frame(
        width=width,
        height=height,
        left=8 + LETTER * max(len(number(tick)) for tick in ticks),
        right=14 + LETTER * longest if names_at_end else 12,
        bottom=40 + LINE * legend_rows,
        x=(min(x for x, _ in drawn), max(x for x, _ in drawn)),
        y=(min(ticks[0], *(y for _, y in drawn)), max(ticks[-1], *(y for _, y in drawn))),
        log_y=log_y,
    )
    parts = [head, *_axes(frame, ticks, x_label, y_label)]
    ends: list[tuple[str, int, float, float]] = []
    for index, (name, points) in enumerate(curves.items()):
        parts += _curve(frame, points, index)
        last = [point for point in points if not math.isnan(point[1])][-1:]
        ends += [(name, index, *frame.place(*point)) for point in last]
    if names_at_end:
        parts += _names(ends)
    elif legend_rows:
        parts += _legend(ends, frame)
    return "".join([*parts, "</svg>"])


def _axes(frame: Frame, ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    parts = [label(0, 12, y_label)]  # along the top and upright: a rotated label is hard to read
    for tick in ticks:
        _, y = frame.place(frame.x[0], tick)
        ends = f'x1="{frame.left:.1f}" x2="{frame.width - frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(label(frame.left - 6, y + 4, number(tick), anchor="end"))
    floor = frame.height - frame.bottom
    for tick in round_numbers(*frame.x, False, most=4 if frame.width < 500 else 8):
        if frame.x[0] <= tick <= frame.x[1]:
            parts.append(label(frame.place(tick, frame.y[0])[0], floor + 16, number(tick), anchor="middle"))
    middle = (frame.left + frame.width - frame.right) / 2
    return [*parts, label(middle, floor + 33, x_label, anchor="middle")]


def _curve(frame: Frame, points: list[tuple[float, float]], index: int) -> list[str]:
    style = f"series-{index % len(LIGHT.series)}"
    if len(points) == 1:
        x, y = frame.place(*points[0])
        return [] if math.isnan(y) else [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>']
    parts = []
    if len(points) > CLOUD:
        parts.append(f'<path class="cloud {style}" d="{_path(frame, _thinned(points, frame.width))}"/>')
        means = running_mean([y for _, y in points], max(3, len(points) // 40))
        smooth = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
        points = [*smooth[:: max(1, len(smooth) // CLOUD)], smooth[-1]]
    parts.append(f'<path class="{style}" d="{_path(frame, points)}"/>')
    return parts


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    steps, pen = [], "M"
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        across, down = frame.place(x, y)
        steps.append(f"{pen}{across:.1f} {down:.1f}")
        pen = "L"
    return "".join(steps)


def _thinned(points: list[tuple[float, float]], width: float) -> list[tuple[float, float]]:
    """The lowest and the highest point of each column of pixels: drawn, they look like all."""
    size = -(-len(points) // int(width))
    if size <= 2:
        return points
    kept = []
    for first in range(0, len(points), size):
        column = [point for point in points[first : first + size] if not math.isnan(point[1])]
        if column:
            kept += sorted({min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])})
        else:
            kept.append((points[first][0], math.nan))
    return kept


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window of up to `window` values, shorter at both ends; what is not finite is left out."""
    half = window // 2
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index in range(len(values)):
        first, end = max(0, index - half), min(len(values), index + half + 1)
        count = counts[end] - counts[first]
        means.append((sums[end] - sums[first]) / count if count else math.nan)
    return means


def round_numbers(low: float, high: float, log_y: bool, most: int = 6) -> list[float]:
    """Round numbers that enclose the values, at most about `most` of them."""
    if log_y:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks = [m * 10.0**power for power in range(first, last + 1) for m in ((1, 2, 5) if last - first < 3 else (1,))]
        inside = [mark for mark in marks if low <= mark <= high]
        below, above = [mark for mark in marks if mark < low][-1:], [mark for mark in marks if mark > high][:1]
        return [*below, *inside, *above] or [low]
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12) for count in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A value of an axis."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _names(ends: Sequence[tuple[str, int, float, float]]) -> list[str]:
    """Each curve's name beside its end, moved apart where names would overlap."""
    heights = spread([y for *_, y in ends], LINE)
    right = max(x for _, _, x, _ in ends)
    return [
        label((right if x > 0.85 * right else x) + 7, height + 4, name, style=f"series-{index % len(LIGHT.series)}")
        for (name, index, x, _), height in zip(ends, heights, strict=True)
    ]


def _legend_rows(names: Sequence[str], width: float) -> list[int]:
    """For each name, 1 where it begins a new row."""
    rows, used = [], width
    for name in names:
        needed = 26 + LETTER * len(name)
        starts = used + needed > width
        rows.append(int(starts))
        used = needed if starts else used + needed
    return rows


def _legend(ends: Sequence[tuple[str, int, float, float]], frame: Frame) -> list[str]:
    parts, x, y = [], 0.0, frame.height - frame.bottom + 37
    for (name, index, *_), starts in zip(ends, _legend_rows([end[0] for end in ends], frame.width), strict=True):
        x, y = (0.0, y + LINE) if starts else (x, y)
        style = f"series-{index % len(LIGHT.series)}"
        parts.append(f'<rect class="{style}" x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" rx="2"/>')
        parts.append(label(x + 15, y, name))
        x += 26 + LETTER * len(name)
    return parts


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours are `gap` from each other, keeping their order and staying near."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _low(groups[-1], heights, gap) < _low(groups[-2], heights, gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = list(heights)
    for group in groups:
        for place, index in enumerate(group):
            placed[index] = _low(group, heights, gap) + gap * place
    return placed


def _low(group: Sequence[int], heights: Sequence[float], gap: float) -> float:
    """Where the lowest of a group stands when the group is centred on its members' own heights."""
    return sum(heights[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def label(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    """A text as an SVG element; `style` is its class."""
    look = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{literal(text)}</text>'


def literal(text: str) -> str:
    """Literal text: what a data set or a model says cannot become markup."""
    return escape(text, quote=True)
