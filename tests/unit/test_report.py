"""The HTML report: hostile text stays text, the file needs nothing else, and pictures and curves are in it."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from llama3v import charts
from llama3v.histogram import Histogram, draw_histogram
from llama3v.report import GalleryItem, Report, show

HOSTILE = """<script>alert(1)</script><img src=https://evil.example/x onerror='x'>" & {{ 7*7 }} \ud800"""
PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))


class Page(HTMLParser):
    """Tags, the addresses they load and the text, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "action", "data"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def full_report(text: str) -> Report:
    """A report with every kind of section, and `text` in every place that takes text."""
    report = Report(text, text)
    report.add_figures([(text, text, text), ("accuracy", 0.93, "")])
    report.add_text(text, [text, text])
    report.add_code(text, text, text)
    report.add_table(text, [text, "n"], [[text, 1], [None, 2]], text)
    report.add_plot(text, {text: [(0, 1.0), (1, 0.5)], "b": [(0, 2.0)]}, text, text, note=text)
    report.add_histogram(text, Histogram([3, 1], [0, 1, 2], [(0.5, text)]), text, text, (1.5, text), text)
    report.add_bars(text, {text: {text: 0.5, "blind": 0.25}}, text)
    report.add_gallery(text, [GalleryItem(PICTURE, [(text, text, True), (text, text, False)])], text)
    return report


def png_size(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size


def jpeg_with_orientation(size: tuple[int, int], orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Camera Maker"
    buffer = io.BytesIO()
    Image.new("RGB", size, "navy").save(buffer, "jpeg", exif=exif)
    return buffer.getvalue()


def embedded(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)]


@pytest.fixture(scope="module")
def hostile_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = full_report(HOSTILE).write(tmp_path_factory.mktemp("report") / "deep" / "report.html")
    return path.read_text(encoding="utf-8")


def test_hostile_text_stays_text_in_every_section(hostile_html: str) -> None:
    page = Page(hostile_html)
    assert "script" not in page.tags
    assert page.handlers == []
    assert page.tags.count("img") == 1  # the picture
    assert page.tags.count("svg") == 4  # plot and histogram in two widths
    assert page.text.count("<script>alert(1)</script>") >= 15
    assert "{{ 7*7 }}" in page.text


def test_the_file_loads_nothing_from_anywhere(hostile_html: str) -> None:
    page = Page(hostile_html)
    assert len(page.addresses) == 1  # the picture
    assert all(address.startswith("data:image/") for address in page.addresses)
    style = hostile_html.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"https?:|@import|url\(", style)
    assert "link" not in page.tags
    assert "default-src 'none'" in hostile_html


def test_every_embedded_picture_opens_and_large_ones_are_made_small() -> None:
    report = Report("r")
    report.add_gallery("g", [GalleryItem(Image.new("L", (3000, 1500)), []), GalleryItem(PICTURE, [])])
    assert [png_size(data) for data in embedded(report.to_html())] == [(640, 320), (40, 30)]


def test_a_picture_given_as_bytes_is_upright_and_loses_its_metadata() -> None:
    report = Report("r")
    report.add_gallery("g", [GalleryItem(jpeg_with_orientation((40, 20), orientation=6), [])])
    (data,) = embedded(report.to_html())
    assert png_size(data) == (20, 40)
    assert b"Camera Maker" not in data


def test_a_photograph_is_embedded_in_moderate_size() -> None:
    noise = Image.effect_noise((1200, 900), 80).convert("RGB")
    report = Report("r")
    report.add_gallery("g", [GalleryItem(noise, [])])
    assert len(report.to_html()) < 400_000


def test_the_gallery_does_not_change_the_callers_picture() -> None:
    picture = Image.new("RGB", (2000, 1000))
    Report("r").add_gallery("g", [GalleryItem(picture, [])])
    assert picture.size == (2000, 1000)


def test_verdicts_are_told_by_words_not_only_by_colour() -> None:
    report = Report("r")
    report.add_gallery("g", [GalleryItem(PICTURE, [("a", "x", True), ("b", "y", False), ("c", "z", None)])])
    html = report.to_html()
    assert html.count('aria-label="right"') == 1
    assert html.count('aria-label="wrong"') == 1


def test_shares_are_shown_in_per_cent_and_other_values_against_the_largest() -> None:
    report = Report("r")
    report.add_bars("shares", {"colour": {"right image": 0.5}})
    report.add_bars("seconds", {"encode": {"cpu": 8.0}, "train": {"cpu": 2.0}})
    shares, seconds = (section.values["groups"] for section in report.sections)
    assert shares == [("colour", [(0, "right image", 0.5, "50%")])]
    assert [bars[0][2:] for _, bars in seconds] == [(1.0, "8"), (0.25, "2")]


def test_a_missing_series_in_a_group_leaves_a_gap_and_keeps_colours() -> None:
    report = Report("r")
    report.add_bars("b", {"one": {"x": 0.1, "y": 0.2}, "two": {"y": 0.3}})
    assert report.sections[0].values["groups"][1] == ("two", [(1, "y", 0.3, "30%")])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_bars_refuse_what_cannot_be_a_length(value: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        Report("r").add_bars("b", {"group": {"series": value}})


def test_a_row_that_does_not_fit_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells, expected 2"):
        Report("r").add_table("t", ["a", "b"], [["only one"]])


def paths(svg: str) -> list[str]:
    return re.findall(r' d="([^"]*)"', svg)


def test_a_plot_without_any_value_is_drawn_as_such() -> None:
    for series in ({}, {"loss": []}, {"loss": [(0, float("nan")), (1, None)]}):
        assert charts.draw_lines(series, "step", "loss").count("no values") == 2


def test_a_log_plot_leaves_out_what_has_no_logarithm() -> None:
    points = [(0, 1.0), (1, 0.5), (2, 0.0), (3, -1.0), (4, 0.1), (5, 0.2)]
    for path in paths(charts.draw_lines({"loss": points}, "step", "loss", log_y=True)):
        assert re.sub(r"[^ML]", "", path) == "MLML"  # a gap


def test_curves_stay_within_their_drawing_and_high_values_stand_high() -> None:
    points = [(step, 3.0 / (1 + step)) for step in range(50)]
    wide, narrow = paths(charts.draw_lines({"loss": points}, "step", "loss"))
    for path, width, height in ((wide, 760, 340), (narrow, 360, 290)):
        places = [tuple(map(float, place.split())) for place in re.findall(r"[ML]([^ML]+)", path)]
        assert len(places) == 50
        assert all(0 < x < width and 0 < y < height for x, y in places)
        assert places == sorted(places)  # to the right, and downwards


def test_a_million_points_make_a_small_drawing_that_keeps_the_extremes() -> None:
    points = [(float(step), 5.0 if step == 777_777 else float(step % 7)) for step in range(1_000_000)]
    points[123_456] = (123_456.0, 40.0)
    svg = charts.draw_lines({"loss": points}, "step", "loss")
    assert len(svg) < 100_000
    cloud = paths(svg)[0]
    heights = [float(place.split()[1]) for place in re.findall(r"[ML]([^ML]+)", cloud)]
    assert sorted(heights)[0] < 40 < 200 < sorted(heights)[1]  # the one spike, and nothing like it


def test_bars_of_a_histogram_stand_side_by_side_on_the_axis_with_heights_in_proportion() -> None:
    bars = Histogram([4, 0, 2], [-1.0, 0.0, 1.0, 2.0], [(-1.0, "a"), (0.0, "b"), (5.0, "outside")])
    svg = draw_histogram(bars, "x", "n", (0.5, "here"))
    for drawing, width in zip(svg.split("</svg>")[:2], (760, 360), strict=True):
        found = re.findall(r'<rect class="series-0" x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)">', drawing)
        (x0, y0, w0, h0), (x1, _, w1, h1), (x2, y2, w2, h2) = [tuple(map(float, bar)) for bar in found]
        assert 0 < x0 < x0 + w0 < x1 < x1 + w1 < x2 < x2 + w2 < width
        assert (h1, h0) == (0, pytest.approx(2 * h2, abs=0.2))
        assert y0 + h0 == pytest.approx(y2 + h2, abs=0.2)
        assert ">here</text>" in drawing
        assert ">b</text>" in drawing
        assert "outside" not in drawing


def test_a_running_mean_keeps_a_constant_and_skips_what_is_not_finite() -> None:
    assert charts.running_mean([2.0] * 7, 3) == [2.0] * 7
    assert charts.running_mean([1.0, float("nan"), 3.0], 3) == [1.0, 2.0, 3.0]


def test_names_at_the_end_of_lines_do_not_overlap_and_keep_their_order() -> None:
    heights = [0.5, 0.5, 0.1, 0.51]
    placed = charts.spread(heights, 0.1)
    in_order = sorted(placed)
    assert all(above - below >= 0.1 - 1e-9 for below, above in pairwise(in_order))
    assert placed[2] == min(placed)
    assert placed[3] == max(placed)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"), (12345.6, "12,346"), ("a", "a")],
)
def test_values_are_shown_as_people_read_them(value: object, shown: str) -> None:
    assert show(value) == shown  # type: ignore[arg-type]
