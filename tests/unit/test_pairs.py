"""Which text an image is judged with, and how a text that is too long is cut."""

import re

from hypothesis import given
from hypothesis import strategies as st

from llama3v.data.pairs import texts_of
from llama3v.data.sources.base import BytesImage, Sample
from llama3v.model.prompt import Turn
from llama3v.model.text_pieces import cut_text

TEXTS = st.text(st.sampled_from("ab .!?\n。é"), max_size=120)


def sample(*turns: Turn, images: int = 1) -> Sample:
    return Sample("a", tuple(BytesImage(f"{number}.png", b"") for number in range(images)), turns)


def test_an_image_is_judged_with_the_answer_to_the_turn_that_owns_it() -> None:
    conversation = sample(
        Turn("system", "Be brief."),
        Turn("user", "What is it?", (0,)),
        Turn("assistant", " A dog on grass.\n"),
        Turn("user", "And these?", (1, 2)),
        Turn("assistant", "Two cats."),
        Turn("user", "Thanks."),
        Turn("assistant", "You are welcome."),
        images=3,
    )
    assert texts_of(conversation) == ("A dog on grass.", "Two cats.", "Two cats.")


def test_an_image_without_an_answer_has_no_text() -> None:
    assert texts_of(sample()) == ("",)
    assert texts_of(sample(images=0)) == ()


def words_of(text: str) -> str:
    return re.sub(r"\s", "", text)


@given(TEXTS, st.integers(1, 40))
def test_pieces_fit_and_hold_all_of_the_text_in_order(text: str, longest: int) -> None:
    pieces = cut_text(text, lambda part: len(part) <= longest)
    assert words_of("".join(pieces)) == words_of(text)
    assert all(len(piece) <= longest for piece in pieces)
    assert len(text) > longest or pieces == [text]


def test_pieces_end_where_sentences_do_as_long_as_these_fit() -> None:
    text = "A dog runs. It is brown! Behind it is a very long fence of wood. Grass?"
    assert cut_text(text, lambda part: len(part) <= 26) == [
        "A dog runs. It is brown!", "Behind it is a very long", "fence of wood. Grass?",
    ]  # fmt: skip


def test_as_many_sentences_as_fit_are_read_together() -> None:
    pieces = cut_text(" ".join(["One two."] * 10), lambda part: part.count(".") <= 4)
    assert [piece.count(".") for piece in pieces] == [4, 4, 2]
