"""Scenes, what is said about them, and the files they become."""

import json
import random
from collections import Counter

import pytest

from llama3v.data.sources.base import Sample, open_source
from llama3v.data.synthetic.dataset import magnification_of, make_scenes, write_scenes
from llama3v.data.synthetic.documents import EMPTY, Mixture, make_document, merged_prefix, notes
from llama3v.data.synthetic.language import KINDS, NUMBERS, caption, place_of_page, questions
from llama3v.data.synthetic.scenes import SCENE_SIZE, Item, Scene, draw, make_scene
from llama3v.model.slicing import choose_grid

SCENES = [make_scene(f"test/{number}", sheet=number % 4 == 0) for number in range(400)]


def test_the_same_seed_gives_the_same_picture_and_words() -> None:
    for scene in SCENES[:20]:
        again = make_scene(scene.seed, sheet=scene.is_sheet)
        assert again == scene
        assert draw(again).tobytes() == draw(scene).tobytes()


def test_every_colour_and_shape_named_together_is_one_thing() -> None:
    for scene in SCENES:
        if not scene.is_sheet:
            named = Counter((item.colour, item.name) for item in scene.items if item.kind == "shape")
            assert max(named.values()) == 1


def test_things_stand_at_different_places() -> None:
    for scene in SCENES:
        for page in scene.pages:
            rows_of_words = {item.row for item in page if item.kind == "word"}
            places = [(item.row, item.column) for item in page]
            assert len(set(places)) == len(places)
            assert all(item.kind == "word" or item.row not in rows_of_words for item in page)


def test_answers_are_what_a_second_reading_of_the_scene_says() -> None:
    """The answers again, from the items alone and by other code."""
    asked = 0
    for scene in SCENES:
        if scene.is_sheet:
            continue
        shapes = {item.name: item for item in scene.items if item.kind == "shape"}
        count = Counter(item.name for item in scene.items if item.kind == "shape")
        for question in questions(scene, random.Random(1)):
            words = question.text.rstrip("?").split()
            if question.text.startswith("What colour is the") and words[-1] in shapes:
                assert count[words[-1]] == 1
                assert question.answer == shapes[words[-1]].colour
            elif question.text == "How many shapes are there?":
                assert question.answer == NUMBERS[sum(count.values())]
            elif question.kind == "word":
                assert question.answer in [item.name for item in scene.items if item.kind == "word"]
            else:
                continue
            asked += 1
    assert asked > 300


@pytest.mark.parametrize(
    ("row", "column", "answer"), [(0, 1, "above"), (2, 1, "below"), (1, 0, "left"), (1, 2, "right")]
)
def test_relations_are_asked_where_one_direction_holds(row: int, column: int, answer: str) -> None:
    star, circle = Item("shape", "star", "red", "big", row, column), Item("shape", "circle", "blue", "big", 1, 1)
    found = {q.text: q.answer for q in questions(Scene(((star, circle),), 1, 1, "x"), random.Random(0))}
    assert found["Where is the star from the circle?"] == answer


def test_every_kind_of_question_is_asked() -> None:
    kinds = {question.kind for scene in SCENES for question in questions(scene, random.Random(0))}
    assert kinds == set(KINDS)


def test_a_sheet_is_sliced_into_its_pages() -> None:
    for scene in SCENES:
        width, height = draw(scene).size
        grid = choose_grid(width, height, tile_size=SCENE_SIZE, max_tiles=6)
        assert (grid.columns, grid.rows) == (scene.columns, scene.rows)


def test_pages_of_a_sheet_have_different_names() -> None:
    for columns, rows in ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)):
        names = [place_of_page(number, columns, rows) for number in range(columns * rows)]
        assert len(set(names)) == len(names)


def test_a_caption_names_everything() -> None:
    for scene in SCENES:
        text = caption(scene, random.Random(0))
        assert all(item.name in text and item.colour in text for page in scene.pages for item in page)


def test_merged_facts_lie_where_the_visual_tokens_of_the_picture_would() -> None:
    for scene in SCENES:
        prefix = merged_prefix(scene)
        tiles = 1 if not scene.is_sheet else 1 + len(scene.pages)
        assert sum(isinstance(part, tuple) for part in prefix) == 9 * tiles
        assert prefix.count("\n") == 1 + (scene.rows if scene.is_sheet else 0)
        if not scene.is_sheet:
            full = [place for place, part in enumerate(prefix) if part != (EMPTY,) and part != "\n"]
            assert full == [3 * item.row + item.column for item in scene.items]


def test_documents_ask_about_what_they_state() -> None:
    for number in range(200):
        document = make_document(f"test/{number}")
        stated = " ".join(" ".join(part) if isinstance(part, tuple) else part for part in document.prefix)
        for question, answer in document.turns:
            if question.startswith(("What colour", "What shape", "What word")):
                assert answer in stated


def test_a_large_page_is_whole_in_the_overview_and_its_corners_are_in_the_slices() -> None:
    for scene in SCENES:
        if scene.is_sheet:
            continue
        prefix = merged_prefix(scene, large=True)
        assert prefix[:10] == merged_prefix(scene)
        assert sum(isinstance(part, tuple) for part in prefix) == 9 * 5
        corners = [item for item in scene.items if item.row != 1 and item.column != 1]
        filled = [part for part in prefix[10:] if isinstance(part, tuple) and part != (EMPTY,)]
        assert sorted(map(len, filled)) == sorted(len(prefix[3 * item.row + item.column]) for item in corners)


def test_notes_state_only_what_the_scene_shows() -> None:
    for scene in SCENES:
        if scene.is_sheet:
            continue
        lines = notes(scene, random.Random(0))
        said = caption(scene)
        directions = {"left", "right", "above", "below"}
        for line in lines[: len(scene.items)]:
            assert any(set(line.split()) >= {item.colour, item.name} for item in scene.items)
        assert all(line.split()[-1] in directions for line in lines[len(scene.items) :])
        assert all(word in said or word in directions for line in lines for word in line.split())


def test_questions_of_a_kind_with_more_weight_are_drawn_more_often() -> None:
    def share_of_counts(weight: float) -> float:
        mixture = Mixture(most_questions=1, sheets=0, captions=0, conversation=1)
        kinds = [make_document(f"test/{number}", mixture, {"count": weight}).kinds[0] for number in range(300)]
        return kinds.count("count") / len(kinds)

    assert share_of_counts(0.1) < share_of_counts(1.0) < share_of_counts(20.0)


def test_some_one_page_scenes_are_drawn_large_and_show_the_same(tmp_path) -> None:
    large = [scene for scene in SCENES if magnification_of(scene) > 1]
    assert 0.04 < len(large) / len(SCENES) < 0.12
    assert not any(scene.is_sheet for scene in large)
    picture = draw(large[0], 3)
    assert picture.size == (3 * SCENE_SIZE, 3 * SCENE_SIZE)
    small = picture.reduce(3).tobytes()
    difference = [abs(a - b) for a, b in zip(small, draw(large[0]).tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 3


def test_splits_share_no_picture() -> None:
    train, held_out = make_scenes("train-0", 200), make_scenes("held-out", 200)
    assert not {draw(scene).tobytes() for scene in train} & {draw(scene).tobytes() for scene in held_out}


def test_written_scenes_are_a_data_set_like_any_other(tmp_path) -> None:
    files = write_scenes(tmp_path, "test", 12)
    for path in (files.captions, files.conversations):
        samples = list(open_source(str(path)))
        assert len(samples) == 12
        assert all(isinstance(sample, Sample) and len(sample.images) == 1 for sample in samples)
    first = json.loads(files.captions.read_text())[0]
    assert first["conversations"][1]["value"] == caption(files.scenes[0])
