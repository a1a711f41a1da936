"""A report in one HTML file: headline figures, tables, curves, bars and pictures, for people to look at.

The file needs nothing but a browser: pictures and curves are in it, there is no script, and a content security policy
forbids the page to load anything. It follows the reader's light or dark theme and reads on a phone.
"""

import base64
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama3v
from llama3v import charts
from llama3v.histogram import Histogram, draw_histogram

if TYPE_CHECKING:
    from PIL import Image

Value = str | int | float | bool | None

LARGEST_PICTURE = 640  # pixels on the longer side; twice the width of a card, for sharp screens
SMALL_PICTURE = 160  # pixels; below, enlarging by blurring hides what the model was given
LARGEST_PNG = 60_000  # bytes; a drawing stays below as PNG, a photograph becomes JPEG


@dataclass(frozen=True)
class GalleryItem:
    """A picture and what was said about it.

    `picture`: a Pillow image, or an image file's bytes. `lines`: (label, text, verdict); the verdict marks the
    text as right (True), wrong (False) or neither (None).
    """

    picture: "Image.Image | bytes"
    lines: Sequence[tuple[str, str, bool | None]]


@dataclass(frozen=True)
class Section:
    """One part of a report: the block of the template that shows it, and the values that block needs."""

    kind: str
    title: str
    note: str = ""
    values: dict[str, Any] = field(default_factory=dict)


class Report:
    """Collect sections in the order in which they shall stand, then `write` them as one HTML file.

    Every text is shown literally: it may come from a data set or a model and cannot become markup.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.sections: list[Section] = []

    def add_figures(self, figures: Sequence[tuple[str, Value, str]]) -> None:
        """Add headline figures as cards: (label, value, note)."""
        cards = [(label, show(value), note) for label, value, note in figures]
        self._add("figures", "", cards=cards)

    def add_text(self, title: str, paragraphs: str | Sequence[str]) -> None:
        """Add plain paragraphs; one string is split at its blank lines."""
        if isinstance(paragraphs, str):
            paragraphs = [part for part in paragraphs.split("\n\n") if part.strip()]
        self._add("text", title, paragraphs=list(paragraphs))

    def add_code(self, title: str, text: str, note: str = "") -> None:
        """Add text whose lines and spaces matter: a command, a log."""
        self._add("code", title, note, text=text)

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Value]], note: str = "") -> None:
        """Add a table; a column that holds only numbers is set to the right."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: a row has {len(row)} cells, expected {len(columns)}: {row!r}")
        numeric = [
            bool(rows) and all(isinstance(row[index], int | float) or row[index] is None for row in rows)
            for index in range(len(columns))
        ]
        cells = [[show(value) for value in row] for row in rows]
        self._add("table", title, note, columns=list(columns), rows=cells, numeric=numeric)

    def add_plot(
        self,
        title: str,
        series: Mapping[str, charts.Points],
        x_label: str,
        y_label: str,
        log_y: bool = False,
        note: str = "",
    ) -> None:
        """Add curves: name -> points (x, y). Long series are shown faintly, with their running mean."""
        drawing = charts.draw_lines(series, x_label, y_label, log_y=log_y)
        if not note and any(len(points) > charts.CLOUD for points in series.values()):
            note = "Faint: every value. Full colour: running mean."
        self._add("plot", title, note, drawing=drawing)

    def add_histogram(
        self,
        title: str,
        bars: Histogram,
        x_label: str,
        y_label: str,
        mark: tuple[float, str] | None = None,
        note: str = "",
    ) -> None:
        """Add a histogram; `mark`: an upright line at x, and what is written beside it."""
        self._add("plot", title, note, drawing=draw_histogram(bars, x_label, y_label, mark))

    def add_bars(self, title: str, groups: Mapping[str, Mapping[str, float]], note: str = "") -> None:
        """Add grouped bars: group -> series -> value, none below 0.

        Where no value is above 1 they are shares: shown in per cent, on a scale that ends at 100%.
        """
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        numbers = [value for values in groups.values() for value in values.values()]
        for value in numbers:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"bars {title!r}: a value is {value}; expected a finite number of 0 or more")
        shares = max(numbers, default=0.0) <= 1
        end = 1.0 if shares else max(numbers)
        bars = [
            (
                label,
                [
                    (index, name, values[name] / end, f"{values[name]:.0%}" if shares else show(values[name]))
                    for index, name in enumerate(names)
                    if name in values
                ],
            )
            for label, values in groups.items()
        ]
        self._add("bars", title, note, names=names, groups=bars)

    def add_gallery(self, title: str, items: Sequence[GalleryItem], note: str = "") -> None:
        """Add pictures with what was asked, expected and answered."""
        self._add("gallery", title, note, items=[(_embed(item.picture), list(item.lines)) for item in items])

    def write(self, path: str | Path) -> Path:
        """Write the report to `path` (its directory is made) and return that path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, from a file's name or a damaged data set, must not cost the whole report.
        path.write_bytes(self.to_html().encode("utf-8", errors="backslashreplace"))
        return path

    def to_html(self) -> str:
        """The whole page as a string."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("llama3v"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html").render(
            title=self.title,
            subtitle=self.subtitle,
            sections=self.sections,
            light=charts.LIGHT,
            dark=charts.DARK,
            version=llama3v.__version__,
            date=datetime.date.today().isoformat(),
        )

    def _add(self, kind: str, title: str, note: str = "", **values: Any) -> None:
        self.sections.append(Section(kind, title, note, values))


def show(value: Value) -> str:
    """A value as people read it: 4 significant digits, thousands set apart, a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return value


def _embed(picture: "Image.Image | bytes") -> dict[str, Any]:
    """Turn a picture into a data URI, re-encoded: what the file carried besides its pixels stays outside."""
    from PIL import Image

    from llama3v.model.tiles import decode_image

    image = decode_image(picture) if isinstance(picture, bytes) else picture.convert("RGB")
    is_small = max(image.size) < SMALL_PICTURE
    width, height = image.size
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
    uri = _data_uri(_encode(image, "png", optimize=True), "png")
    if len(uri) > LARGEST_PNG:
        uri = _data_uri(_encode(image, "jpeg", quality=85), "jpeg")
    return {"uri": uri, "width": width, "height": height, "is_small": is_small}


def _encode(image: "Image.Image", form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def _data_uri(data: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}"
