"""Text-only documents for the tiny LLM of the embedded default: facts first, then questions about them.

An LLM trained on single captions cannot read a prefix; in these documents later text repeats earlier facts. In a share
of them the facts are *merged*: each place of a scene is one position that holds several words' embeddings (their sum over the root of their number),
laid out as visual tokens are (nine to a tile, "," and "\\n" between tiles). No picture is involved; a large LLM learns to
read superposed words from its size, a tiny one has to meet them.
"""

import random
from dataclasses import dataclass, replace

from llama3v.data.synthetic.language import CAPTION_PROMPTS, caption, name_item, place_of_item, questions
from llama3v.data.synthetic.scenes import Item, Scene, make_scene

MERGED_SHARE = 0.8
EMPTY = "."  # what stands at a place with nothing on it


@dataclass(frozen=True)
class Document:
    """`prefix` holds one entry a position: a string (plain text) or a tuple of words merged into one position."""

    prefix: tuple[str | tuple[str, ...], ...]
    turns: tuple[tuple[str, str], ...]  # (question, answer)


def make_document(
    seed: str, most_items: int = 9, most_questions: int = 6, caption_share: float = 1.0, sheet_share: float = 0.3
) -> Document:
    """The document of a seed. Fewer items and questions make a shorter one, for the beginning of training.

    A `caption_share` of the documents also ask for the caption, which is learnt by copying in order; what the others
    ask can only be answered by finding the one fact that is meant.
    """
    rng = random.Random(seed + "/document")
    scene = _with_at_most(most_items, make_scene(seed, sheet=rng.random() < sheet_share), rng)
    asked = [(question.text, question.answer) for question in questions(scene, rng)[:most_questions]]
    described = (rng.choice(CAPTION_PROMPTS), caption(scene))
    if rng.random() < caption_share:
        asked.insert(rng.randrange(len(asked) + 1), described)
    if rng.random() < MERGED_SHARE:
        return Document(merged_prefix(scene, rng), tuple(asked))
    return Document((caption(scene, rng),), tuple(asked))


def _with_at_most(count: int, scene: Scene, rng: random.Random) -> Scene:
    if scene.is_sheet or len(scene.items) <= count:
        return scene
    kept = sorted(rng.sample(range(len(scene.items)), count))
    if not any(scene.items[index].kind == "shape" for index in kept):  # every page shows a shape
        kept[0] = next(index for index, item in enumerate(scene.items) if item.kind == "shape")
    return replace(scene, pages=(tuple(scene.items[index] for index in sorted(kept)),))


def merged_prefix(scene: Scene, rng: random.Random) -> tuple[str | tuple[str, ...], ...]:
    """The layout of a picture's visual tokens, with words in their place: overview, then slices by rows."""
    if not scene.is_sheet:
        return (*_merged_page(scene.items), "\n")
    overview = _merged_page(tuple(rng.sample([page[0] for page in scene.pages], k=min(2, len(scene.pages)))))
    positions: list[str | tuple[str, ...]] = [*overview, "\n"]
    for number, page in enumerate(scene.pages):
        last = number % scene.columns == scene.columns - 1
        positions += [*_merged_page(page), "\n" if last else ","]
    return tuple(positions)


def _merged_page(items: tuple[Item, ...]) -> list[tuple[str, ...]]:
    at = {(item.row, item.column): item for item in items}
    places = [(row, column) for row in range(3) for column in range(3)]
    return [_merged_item(at[place]) if place in at else (EMPTY,) for place in places]


def _merged_item(item: Item) -> tuple[str, ...]:
    """What the caption says of the item, its place included: an encoder that was trained on captions tells that too."""
    return (*name_item(item).split()[1:], *place_of_item(item).split())
