"""Text-only documents for the tiny LLM of the embedded default: facts first, then questions about them.

An LLM trained on single captions cannot read a prefix; in these documents later text repeats earlier facts. In a share
of them the facts are *merged*: each place of a scene is one position that holds several words' embeddings (their sum over the root of their number),
laid out as visual tokens are (nine to a tile, "," and "\\n" between tiles). No picture is involved; a large LLM learns to
read superposed words from its size, a tiny one has to meet them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llama3v.data.synthetic.language import (
    CAPTION_PROMPTS,
    Question,
    caption,
    choose,
    name_item,
    place_of_item,
    place_of_page,
    questions,
)
from llama3v.data.synthetic.scenes import Item, Scene, make_scene

EMPTY = "."  # what stands at a place with nothing on it


@dataclass(frozen=True)
class Document:
    """`prefix` holds one entry a position: a string (plain text) or a tuple of words merged into one position."""

    prefix: tuple[str | tuple[str, ...], ...]
    turns: tuple[tuple[str, str], ...]  # (question, answer); a note has no question
    kinds: tuple[str, ...]  # of the questions; "caption" for a caption, "note" for a note
    conversation: bool = True  # in Llama 3's chat format; else questions and answers are bare lines


@dataclass(frozen=True)
class Mixture:
    """What documents are made of. All values but the first two are shares of the documents."""

    most_items: int = 9
    most_questions: int = 8
    merged: float = 0.9
    conversation: float = 0.5
    captions: float = (
        0.15  # also ask for the caption, which is learnt by copying in order; questions want one fact found
    )
    sheets: float = 0.25
    large: float = 0.08  # one page drawn so large that it is sliced too
    notes: float = 1.0  # of the bare lines: begin with notes


def make_document(seed: str, mixture: Mixture | None = None, weights: Mapping[str, float] | None = None) -> Document:
    """The document of a seed. Questions are drawn with the weights of their kinds (1 where none is given)."""
    mixture, weights = mixture or Mixture(), weights or {}
    rng = random.Random(seed + "/document")
    scene = _with_at_most(mixture.most_items, make_scene(seed, sheet=rng.random() < mixture.sheets), rng)

    asked = choose(questions(scene, rng), mixture.most_questions, weights, rng)
    if rng.random() < mixture.captions:
        described = Question("caption", rng.choice(CAPTION_PROMPTS), caption(scene))
        asked.insert(rng.randrange(len(asked) + 1), described)
    merged, large = rng.random() < mixture.merged, rng.random() < mixture.large
    conversation = rng.random() < mixture.conversation
    if not conversation and rng.random() < mixture.notes:
        asked = [Question("note", "", note) for note in notes(scene, rng)] + asked
    return Document(
        prefix=merged_prefix(scene, large=large) if merged else (caption(scene, rng),),
        turns=tuple((question.text, question.answer) for question in asked),
        kinds=tuple(question.kind for question in asked),
        conversation=conversation,
    )


def notes(scene: Scene, rng: random.Random) -> list[str]:
    """What is true of each thing, beginning with any of it: the shortest text that wants facts kept together.

    A question is read before it is answered; here every next word follows from the word before it. Of a page of a sheet
    the notes say what is on it, and of what is on it where the page is.
    """
    if scene.is_sheet:
        return _sheet_notes(scene, rng)
    lines = [
        " ".join(_beginning_anywhere([*_words_of(item), place_of_item(item)], rng))
        for item in rng.sample(scene.items, k=len(scene.items))
    ]
    related = [question for question in questions(scene, rng) if question.kind == "relation"]
    for question in related[:2]:  # "Where is the star from the red circle?" "left" -> "star red circle left"
        one, other = question.text.removeprefix("Where is the ").removesuffix("?").split(" from the ")
        lines.append(f"{one} {other} {question.answer}")
    return lines


def _sheet_notes(scene: Scene, rng: random.Random) -> list[str]:
    lines = []
    for number, (item,) in rng.sample(list(enumerate(scene.pages)), k=len(scene.pages)):
        where = f"{place_of_page(number, scene.columns, scene.rows)} page"
        content = " ".join(_beginning_anywhere(_words_of(item), rng))
        lines.append(f"{where} {content}" if rng.random() < 0.5 else f"{content} {where}")
    return lines


def _words_of(item: Item) -> list[str]:
    return [item.size if item.kind == "shape" else item.kind, item.colour, item.name]


def _beginning_anywhere(words: list[str], rng: random.Random) -> list[str]:
    first = rng.choice(words)
    return [first, *(word for word in words if word != first)]


def _with_at_most(count: int, scene: Scene, rng: random.Random) -> Scene:
    if scene.is_sheet or len(scene.items) <= count:
        return scene
    kept = sorted(rng.sample(range(len(scene.items)), count))
    if not any(scene.items[index].kind == "shape" for index in kept):  # every page shows a shape
        kept[0] = next(index for index, item in enumerate(scene.items) if item.kind == "shape")
    return replace(scene, pages=(tuple(scene.items[index] for index in sorted(kept)),))


def merged_prefix(scene: Scene, large: bool = False) -> tuple[str | tuple[str, ...], ...]:
    """The layout of a picture's visual tokens, with words in their place: overview, then slices by rows.

    A sheet's overview shows every page's thing at its place in the whole, too small to read: a word or a digit has only
    its colour there. Its slices are the pages. A `large` page is whole in the overview, and its slices hold what stands in
    the corners.
    """
    if not scene.is_sheet and not large:
        return (*_merged_page(scene.items), "\n")
    pages, columns = scene.pages, scene.columns
    overview = _merged_overview(scene) if scene.is_sheet else _merged_page(scene.items)
    if not scene.is_sheet:
        corners = [(row, column) for row in (0, 2) for column in (0, 2)]
        pages = tuple(tuple(item for item in scene.items if (item.row, item.column) == corner) for corner in corners)
        columns = 2
    positions: list[str | tuple[str, ...]] = [*overview, "\n"]
    for number, page in enumerate(pages):
        last = number % columns == columns - 1
        positions += [*_merged_page(page), "\n" if last else ","]
    return tuple(positions)


def _merged_page(items: tuple[Item, ...]) -> list[tuple[str, ...]]:
    at = {(item.row, item.column): item for item in items}
    places = [(row, column) for row in range(3) for column in range(3)]
    return [_merged_item(at[place]) if place in at else (EMPTY,) for place in places]


def _merged_overview(scene: Scene) -> list[tuple[str, ...]]:
    seen: dict[tuple[int, int], tuple[str, ...]] = {}
    for number, (item,) in enumerate(scene.pages):
        row, column = divmod(number, scene.columns)
        cell = (row * 3 + item.row) // scene.rows, (column * 3 + item.column) // scene.columns
        there = replace(item, kind="shape", size="small", row=cell[0], column=cell[1])
        what = item.name if item.kind == "shape" else item.kind
        seen[cell] = (*seen.get(cell, ()), *_merged_item(replace(there, name=what)))
    return [seen.get((row, column), (EMPTY,)) for row in range(3) for column in range(3)]


def _merged_item(item: Item) -> tuple[str, ...]:
    """What the caption says of the item, its place included: an encoder that was trained on captions tells that too."""
    words = (*name_item(item).split()[1:], *place_of_item(item).split())
    return tuple(f" {word}" for word in words)  # as they stand in a sentence
