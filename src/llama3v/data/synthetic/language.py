"""Scenes in words: captions, and questions with exact answers.

`KINDS` are the kinds of question that the report breaks accuracy down by.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llama3v.data.synthetic.scenes import Item, Scene

KINDS = ("colour", "shape", "size", "count", "relation", "word", "digit", "sheet")
NUMBERS = ("no", "one", "two", "three", "four", "five")
_PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
CAPTION_PROMPTS = ("Describe the image.", "What is in the picture?", "Say what you see.")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def place_of_item(item: Item) -> str:
    """In words where an item stands; a word takes a whole row."""
    if item.kind == "word":
        return ("top", "middle", "bottom")[item.row]
    return _PLACES[item.row][item.column]


def place_of_page(number: int, columns: int, rows: int) -> str:
    """In words which page of a sheet it is: "top right", "left", "middle" ..."""
    row, column = divmod(number, columns)
    across = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}[columns][column]
    down = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}[rows][row]
    return " ".join(part for part in (down, across) if part)


def name_item(item: Item) -> str:
    """The item as a caption names it, without its place."""
    if item.kind == "shape":
        return f"a {item.size} {item.colour} {item.name}"
    return f"the {item.colour} {item.kind} {item.name}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Everything in the scene. Row by row, or in an order drawn from `rng`."""
    if scene.is_sheet:
        parts = [
            f"{name_item(page[0])} at the {place_of_page(number, scene.columns, scene.rows)}"
            for number, page in enumerate(scene.pages)
        ]
        opening = f"a sheet of {NUMBERS[len(parts)]} pages: "
    else:
        parts = [f"{name_item(item)} at the {place_of_item(item)}" for item in scene.items]
        opening = ""
    if rng is not None:
        rng.shuffle(parts)
    return opening + ", ".join(parts) + "."


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question that the scene answers without doubt, in an order drawn from `rng`, one of each form."""
    asked = _sheet_questions(scene, rng) if scene.is_sheet else _page_questions(scene.items, rng)
    rng.shuffle(asked)
    return asked


def choose(asked: list[Question], count: int, weights: Mapping[str, float], rng: random.Random) -> list[Question]:
    """Some of the questions, in an order drawn from `rng`: a weighted draw without replacement, by kind (1 if not given)."""

    def key(question: Question) -> float:
        return -(rng.random() ** (1 / weights.get(question.kind, 1.0)))

    chosen = sorted(asked, key=key)[:count]
    rng.shuffle(chosen)
    return chosen


def _sheet_questions(scene: Scene, rng: random.Random) -> list[Question]:
    asked = []
    for number, (item,) in enumerate(scene.pages):
        where = place_of_page(number, scene.columns, scene.rows)
        asked.append(Question("sheet", f"What {item.kind} is on the {where} page?", item.name))
        asked.append(Question("sheet", f"What colour is on the {where} page?", item.colour))
    return asked


def _page_questions(items: tuple[Item, ...], rng: random.Random) -> list[Question]:
    shapes = [item for item in items if item.kind == "shape"]
    makers: tuple[Callable[..., list[Question]], ...] = (_attributes, _counts, _relations, _print)
    return [question for make in makers for question in make(items, shapes, rng)]


def _attributes(items: tuple[Item, ...], shapes: list[Item], rng: random.Random) -> list[Question]:
    asked = []
    for item in shapes:
        if [other.name for other in shapes].count(item.name) == 1:
            asked.append(Question("colour", f"What colour is the {item.name}?", item.colour))
            asked.append(Question("size", f"Is the {item.name} big or small?", item.size))
        else:
            asked.append(Question("size", f"Is the {item.colour} {item.name} big or small?", item.size))
        if [other.colour for other in shapes].count(item.colour) == 1:
            asked.append(Question("shape", f"What shape is {item.colour}?", item.name))
        asked.append(Question("shape", f"What shape is at the {place_of_item(item)}?", item.name))
    return asked


def _counts(items: tuple[Item, ...], shapes: list[Item], rng: random.Random) -> list[Question]:
    names = sorted({item.name for item in shapes})
    name = rng.choice(names)
    repeated = [name for name in names if sum(item.name == name for item in shapes) > 1]
    if repeated:
        name = rng.choice(repeated)
    count = sum(item.name == name for item in shapes)
    return [
        Question("count", "How many shapes are there?", NUMBERS[len(shapes)]),
        Question("count", f"How many shapes are {plural(name)}?", NUMBERS[count]),
    ]


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _relations(items: tuple[Item, ...], shapes: list[Item], rng: random.Random) -> list[Question]:
    """Left, right, above or below: asked only where one direction is the only one that holds."""
    asked = []
    for one in shapes:
        for other in shapes:
            down, across = one.row - other.row, one.column - other.column
            if (down == 0) == (across == 0):
                continue
            answer = ("above" if down < 0 else "below") if down else ("left" if across < 0 else "right")
            asked.append(
                Question(
                    "relation", f"Where is the {_shortest(one, shapes)} from the {_shortest(other, shapes)}?", answer
                )
            )
    rng.shuffle(asked)
    return asked[:3]


def _shortest(item: Item, shapes: list[Item]) -> str:
    alone = [other.name for other in shapes].count(item.name) == 1
    return item.name if alone else f"{item.colour} {item.name}"


def _print(items: tuple[Item, ...], shapes: list[Item], rng: random.Random) -> list[Question]:
    asked = []
    for item in items:
        if item.kind in ("word", "digit"):
            asked.append(Question(item.kind, f"What {item.kind} is printed?", item.name))
            if rng.random() < 0.5:
                asked.append(Question("colour", f"What colour is the {item.kind}?", item.colour))
    return asked
