"""What is in a picture, decided by a seed, and how it is drawn with Pillow.

A *scene* lies on 3 x 3 places; on them stand shapes, at most one digit, and at most one printed word (a whole row).
A *sheet* is a table of pages, each as large as a scene and holding one thing: too large to read without slicing.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 215, 45),
    "green": (45, 155, 65),
    "blue": (45, 85, 215),
    "purple": (130, 50, 165),
    "pink": (245, 140, 190),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("big", "small")
WORDS = (
    *("cat", "dog", "sun", "tree", "fish", "bird", "boat", "milk", "moon", "rain"),
    *("book", "door", "lamp", "fire", "snow", "wolf", "frog", "bear", "kite", "jump"),
)
SCENE_SIZE = 72  # pixels a side; also the tile size of the embedded vision tower
SHEET_GRIDS = ((2, 1), (1, 2), (2, 2))  # columns x rows
_OVERSAMPLING = 3
_RADIUS = {"big": 10.0, "small": 5.5}  # of a shape, in pixels of a 72-pixel scene


@dataclass(frozen=True)
class Item:
    """One thing in a scene. `name` is a shape, a digit or a word, by `kind`; `row`, `column` are 0 to 2."""

    kind: str  # "shape" | "digit" | "word"
    name: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A picture: one page, or a sheet of `columns` x `rows` pages in row-major order."""

    pages: tuple[tuple[Item, ...], ...]
    columns: int
    rows: int
    seed: str

    @property
    def items(self) -> tuple[Item, ...]:
        """What is on a one-page scene, row by row."""
        return self.pages[0]

    @property
    def is_sheet(self) -> bool:
        return len(self.pages) > 1


def make_scene(seed: str, sheet: bool = False) -> Scene:
    """Decide a scene. The same seed gives the same scene on every machine."""
    rng = random.Random(seed)
    if sheet:
        columns, rows = rng.choice(SHEET_GRIDS)
        return Scene(tuple((_lone_item(rng),) for _ in range(columns * rows)), columns, rows, seed)
    return Scene((_page(rng),), 1, 1, seed)


def _page(rng: random.Random) -> tuple[Item, ...]:
    items: list[Item] = []
    free = [(row, column) for row in range(3) for column in range(3)]
    rng.shuffle(free)
    if rng.random() < 0.4:
        row = rng.randrange(3)
        items.append(Item("word", rng.choice(WORDS), rng.choice(tuple(COLOURS)), "big", row, 1))
        free = [place for place in free if place[0] != row]
    if rng.random() < 0.4:
        items.append(Item("digit", str(rng.randrange(10)), rng.choice(tuple(COLOURS)), "big", *free.pop()))
    kinds: dict[
        str, bool
    ] = {}  # one scene shows a shape twice more often than chance would, so that counting is worth asking
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4))):
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if kinds and rng.random() < 0.35:
            shape = rng.choice(sorted(kinds))
        if (colour, shape) in {(item.colour, item.name) for item in items}:
            continue  # "the red circle" must name one thing
        kinds[shape] = True
        items.append(Item("shape", shape, colour, rng.choice(SIZES), *free.pop()))
    return tuple(sorted(items, key=lambda item: (item.row, item.column)))


def _lone_item(rng: random.Random) -> Item:
    kind = rng.choice(("word", "digit", "shape"))
    name = {"word": rng.choice(WORDS), "digit": str(rng.randrange(10)), "shape": rng.choice(SHAPES)}[kind]
    size = rng.choice(SIZES) if kind == "shape" else "big"
    return Item(
        kind, name, rng.choice(tuple(COLOURS)), size, rng.randrange(3), 1 if kind == "word" else rng.randrange(3)
    )


def draw(scene: Scene, magnification: int = 1) -> Image.Image:
    """RGB picture of columns * 72 x rows * 72 pixels, times `magnification`."""
    rng = random.Random(scene.seed + "/drawing")
    shade = tuple(rng.randrange(225, 256) for _ in range(3))
    unit = _OVERSAMPLING * magnification  # of a pixel of a 72-pixel scene, on the canvas
    scale = SCENE_SIZE * unit
    canvas = Image.new("RGB", (scene.columns * scale, scene.rows * scale), shade)
    pen = ImageDraw.Draw(canvas)
    for number, page in enumerate(scene.pages):
        row, column = divmod(number, scene.columns)
        for item in page:
            _draw_item(pen, item, column * scale, row * scale, unit, rng)
    if scene.is_sheet:
        for column in range(1, scene.columns):
            pen.line([(column * scale, 0), (column * scale, canvas.height)], fill=(185, 185, 185), width=unit)
        for row in range(1, scene.rows):
            pen.line([(0, row * scale), (canvas.width, row * scale)], fill=(185, 185, 185), width=unit)
    return canvas.reduce(_OVERSAMPLING)


def _draw_item(pen: ImageDraw.ImageDraw, item: Item, left: int, top: int, unit: int, rng: random.Random) -> None:
    cell = SCENE_SIZE / 3
    jitter = 1.5
    x = left + unit * (cell * (item.column + 0.5) + rng.uniform(-jitter, jitter))
    y = top + unit * (cell * (item.row + 0.5) + rng.uniform(-jitter, jitter))
    colour = tuple(max(0, min(255, channel + rng.randrange(-12, 13))) for channel in COLOURS[item.colour])
    if item.kind == "shape":
        radius = unit * _RADIUS[item.size] * rng.uniform(0.93, 1.07)
        _draw_shape(pen, item.name, x, y, radius, colour)
    else:
        font = _font(unit * (19 if item.kind == "word" else 21))
        pen.text((x, y), item.name, fill=colour, font=font, anchor="mm")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the font that Pillow carries: the same everywhere


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
        return
    if shape == "cross":
        arm = radius * 0.32
        pen.rectangle([x - radius, y - arm, x + radius, y + arm], fill=colour)
        pen.rectangle([x - arm, y - radius, x + arm, y + radius], fill=colour)
        return
    # corners as (turn, share of the radius), a turn of 0 pointing up
    corners = {
        "square": [(turn / 8, 1.15) for turn in (1, 3, 5, 7)],
        "triangle": [(turn / 3, 1.1) for turn in range(3)],
        "diamond": [(0, 1.15), (0.25, 0.75), (0.5, 1.15), (0.75, 0.75)],
        "star": [(turn / 10, 1.15 if turn % 2 == 0 else 0.46) for turn in range(10)],
    }[shape]
    points = [
        (x + share * radius * math.sin(2 * math.pi * turn), y - share * radius * math.cos(2 * math.pi * turn))
        for turn, share in corners
    ]
    pen.polygon(points, fill=colour)


def without_words(scene: Scene) -> Scene:
    """The same scene with its printed words left out (for pictures that need none)."""
    return replace(scene, pages=tuple(tuple(item for item in page if item.kind != "word") for page in scene.pages))
