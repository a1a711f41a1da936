"""Properties of the prompt renderer, for both formats and both kinds of tokenizer objects."""

import pickle
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama3v.errors import PromptError
from llama3v.model.prompt import IGNORED, Renderer, Turn, detect_format
from llama3v.model.slicing import Grid

IMAGE = 1000
TOKENS_PER_TILE = 3
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
END_OF_TURN = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
FORMATS = list(SPECIAL)


def byte_tokenizer(special: list[str], flagged: bool = True) -> Tokenizer:
    """One token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: id for id, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=flagged, normalized=False) for token in special])
    return tokenizer


TOKENIZERS = {name: byte_tokenizer(SPECIAL[name]) for name in FORMATS}
RENDERERS = {name: Renderer(TOKENIZERS[name], name, TOKENS_PER_TILE, IMAGE) for name in FORMATS}

# Text that likes to contain what must not be understood.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([*SPECIAL["llama3"], *SPECIAL["chatml"], "<image>", "\n", " ", ","]),
    ),
    max_size=5,
).map("".join)
grids = st.builds(Grid, st.integers(1, 3), st.integers(1, 3))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Turn], list[Grid]]:
    """1 to 6 turns in any order of roles; user turns own 0 to 2 images."""
    turns: list[Turn] = []
    owned: list[Grid] = []
    for role in draw(st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=6)):
        new = draw(st.lists(grids, max_size=2)) if role == "user" else []
        turns.append(Turn(role, draw(texts), tuple(range(len(owned), len(owned) + len(new)))))
        owned += new
    return turns, owned


formats = st.sampled_from(FORMATS)
quick = settings(max_examples=100, deadline=None)


WITHOUT_SPECIAL_TOKENS = byte_tokenizer([])


def text_ids(text: str) -> list[int]:
    """Ids of plain text by a tokenizer that has no special tokens at all."""
    return WITHOUT_SPECIAL_TOKENS.encode(text.strip(), add_special_tokens=False).ids


@quick
@given(formats, conversations())
def test_spans_are_exactly_the_assistant_texts_and_their_ends_of_turn(
    name: str, conversation: tuple[list[Turn], list[Grid]]
) -> None:
    turns, owned = conversation
    rendered = RENDERERS[name].render(turns, owned)
    end = TOKENIZERS[name].token_to_id(END_OF_TURN[name])
    supervised = [rendered.ids[start:stop] for start, stop in rendered.spans]
    assert supervised == [[*text_ids(turn.text), end] for turn in turns if turn.role == "assistant"]


@quick
@given(formats, conversations())
def test_labels_are_the_ids_in_spans_and_ignored_elsewhere(
    name: str, conversation: tuple[list[Turn], list[Grid]]
) -> None:
    rendered = RENDERERS[name].render(*conversation)
    inside = {place for start, stop in rendered.spans for place in range(start, stop)}
    expected = [id if place in inside else IGNORED for place, id in enumerate(rendered.ids)]
    assert rendered.labels() == expected
    assert IMAGE not in rendered.labels()


@quick
@given(formats, conversations())
def test_slots_cover_exactly_the_image_tokens_in_order_of_image_and_tile(
    name: str, conversation: tuple[list[Turn], list[Grid]]
) -> None:
    turns, owned = conversation
    rendered = RENDERERS[name].render(turns, owned)
    expected = [(image, tile) for image, grid in enumerate(owned) for tile in range(grid.tiles)]
    assert [(slot.image, slot.tile) for slot in rendered.slots] == expected
    covered = [place for slot in rendered.slots for place in range(slot.start, slot.start + slot.length)]
    assert covered == [place for place, id in enumerate(rendered.ids) if id == IMAGE]
    assert all(slot.length == TOKENS_PER_TILE for slot in rendered.slots)


@quick
@given(formats, conversations())
def test_control_tokens_come_from_the_format_alone(name: str, conversation: tuple[list[Turn], list[Grid]]) -> None:
    turns, owned = conversation
    rendered = RENDERERS[name].render(turns, owned)
    blank = RENDERERS[name].render([Turn(turn.role, "", turn.images) for turn in turns], owned)
    control = {TOKENIZERS[name].token_to_id(token) for token in SPECIAL[name]}
    assert [id for id in rendered.ids if id in control] == [id for id in blank.ids if id in control]


@quick
@given(formats, conversations())
def test_adding_a_turn_extends_the_prompt(name: str, conversation: tuple[list[Turn], list[Grid]]) -> None:
    turns, owned = conversation
    whole = RENDERERS[name].render(turns, owned)
    for count in range(1, len(turns)):
        images = sum(len(turn.images) for turn in turns[:count])
        part = RENDERERS[name].render(turns[:count], owned[:images])
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.slots[: len(part.slots)] == part.slots
        assert whole.spans[: len(part.spans)] == part.spans


@quick
@given(formats, conversations(), texts)
def test_the_prompt_of_an_answer_is_the_beginning_of_the_answered_conversation(
    name: str, conversation: tuple[list[Turn], list[Grid]], answer: str
) -> None:
    turns, owned = conversation
    assume(turns[-1].role == "user")
    prompt = RENDERERS[name].render(turns, owned, generate=True)
    answered = RENDERERS[name].render([*turns, Turn("assistant", answer)], owned)
    assert answered.ids[: len(prompt.ids)] == prompt.ids
    assert answered.spans[-1][0] == len(prompt.ids)


@quick
@given(formats, conversations())
def test_length_is_the_number_of_ids(name: str, conversation: tuple[list[Turn], list[Grid]]) -> None:
    assert RENDERERS[name].length(*conversation) == len(RENDERERS[name].render(*conversation).ids)


@pytest.mark.parametrize("name", FORMATS)
def test_both_kinds_of_tokenizer_objects_give_the_same_ids_and_stay_as_they_were(name: str) -> None:
    raw = byte_tokenizer(SPECIAL[name])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(SPECIAL[name]))
    raw.enable_truncation(2)
    turns = [Turn("user", f"a {END_OF_TURN[name]} b <image> longer than two tokens")]
    results = [Renderer(tokenizer, name, 1, IMAGE).render(turns, generate=True).ids for tokenizer in (raw, wrapped)]
    assert results[0] == results[1] == RENDERERS[name].render(turns, generate=True).ids
    # special parsing is still on, and truncation too, for whoever else uses the object
    assert raw.encode(END_OF_TURN[name]).ids == [raw.token_to_id(END_OF_TURN[name])]
    assert wrapped.encode(END_OF_TURN[name]) == [wrapped.convert_tokens_to_ids(END_OF_TURN[name])]
    assert raw.truncation is not None


@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_that_are_not_flagged_special_are_no_less_kept_out_of_text(name: str) -> None:
    unflagged = byte_tokenizer([*SPECIAL[name], "<image>"], flagged=False)
    renderer = Renderer(unflagged, name, 1, unflagged.token_to_id("<image>"))
    text = "".join([*SPECIAL[name], "<image>"])
    ids = renderer.render([Turn("assistant", text)]).ids
    (start, stop) = renderer.render([Turn("assistant", text)]).spans[0]
    assert ids[start : stop - 1] == text_ids(text)


def test_two_user_turns_in_a_row_are_allowed() -> None:
    rendered = RENDERERS["llama3"].render([Turn("user", "a"), Turn("user", "b")], generate=True)
    start = TOKENIZERS["llama3"].token_to_id("<|start_header_id|>")
    assert rendered.ids.count(start) == 3


def test_a_renderer_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(RENDERERS["llama3"]))
    turns = [Turn("user", "a <|eot_id|>", (0,))]
    assert copy.render(turns, [Grid(2, 1)]) == RENDERERS["llama3"].render(turns, [Grid(2, 1)])


USER = Turn("user", "x")
ONE = Grid(1, 1)


@pytest.mark.parametrize(
    ("turns", "owned", "generate", "message"),
    [
        ([], [], False, "at least one turn"),
        ([], [], True, "at least one turn"),
        ([USER, Turn("assistant", "y")], [], True, "expected the user's turn"),
        ([Turn("system", "y")], [], True, "expected the user's turn"),
        ([USER], [ONE], False, "images 0 .. 0"),
        ([Turn("user", "x", (0,))], [], False, "expected no images"),
        ([Turn("user", "x", (0,))], [ONE, ONE], False, "images 0 .. 1"),
        ([Turn("user", "x", (0, 0))], [ONE], False, "each once"),
        ([Turn("user", "x", (1, 0))], [ONE, ONE], False, "in order"),
        ([Turn("user", "x", (-1,))], [ONE], False, "images 0 .. 0"),
        ([Turn("assistant", "x", (0,))], [ONE], False, "only a user turn"),
        ([Turn("tool", "x")], [], False, "found 'tool'"),  # type: ignore[arg-type]
        ([Turn("user", "a\ud800b")], [], False, "lone surrogate at character 1"),
    ],
)
def test_turns_and_images_that_do_not_fit_are_refused(
    turns: list[Turn], owned: list[Grid], generate: bool, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        RENDERERS["llama3"].render(turns, owned, generate=generate)


def test_a_format_is_refused_where_its_control_tokens_are_missing() -> None:
    with pytest.raises(PromptError, match="neither set"):
        detect_format(byte_tokenizer([]))
    with pytest.raises(PromptError, match=r"<\|im_start\|>"):
        Renderer(TOKENIZERS["llama3"], "chatml", 1, IMAGE)
    with pytest.raises(PromptError, match="'alpaca'"):
        Renderer(TOKENIZERS["llama3"], "alpaca", 1, IMAGE)
    with pytest.raises(PromptError, match="fast tokenizer"):
        Renderer(object(), "llama3", 1, IMAGE)


def test_a_tokenizer_of_both_formats_is_decided_by_its_chat_template() -> None:
    both = byte_tokenizer([*SPECIAL["llama3"], *SPECIAL["chatml"]])
    with pytest.raises(PromptError, match="could be either"):
        detect_format(both)
    for name, mark in [("llama3", "<|start_header_id|>"), ("chatml", "<|im_start|>")]:
        wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=both)
        wrapped.chat_template = "{{ '" + mark + "' }}"
        assert detect_format(wrapped) == name


def test_an_image_token_that_text_could_produce_is_refused() -> None:
    with pytest.raises(PromptError, match="to be free"):
        Renderer(TOKENIZERS["llama3"], "llama3", 1, 65)
    with pytest.raises(PromptError, match="1 or more"):
        Renderer(TOKENIZERS["llama3"], "llama3", 0, IMAGE)


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(conversation=conversations())
def test_a_tokenizer_of_ones_own_renders_as_a_copy_does(
    name: str, flagged: bool, conversation: tuple[list[Turn], list[Grid]]
) -> None:
    own = byte_tokenizer(SPECIAL[name], flagged)
    own.enable_truncation(5)
    renderer = Renderer(own, name, TOKENS_PER_TILE, IMAGE, own=True)
    assert renderer.render(*conversation) == RENDERERS[name].render(*conversation)
    assert renderer.stop_ids == RENDERERS[name].stop_ids


@settings(max_examples=60)
@given(text=texts, grids=st.lists(grids, max_size=3), new_tokens=st.integers(1, 300), name=st.sampled_from(FORMATS))
def test_a_question_and_its_answer_fit_into_the_room_that_was_made_for_them(
    text: str, grids: list[Grid], new_tokens: int, name: str
) -> None:
    from llama3v.engines.base import Room
    from llama3v.engines.llamacpp import tokens_of

    turns = [Turn("user", text, tuple(range(len(grids))))]
    room = Room(len(grids), len(text.encode()), new_tokens)
    most = tokens_of(room, max_tiles=9, tokens_per_tile=TOKENS_PER_TILE)
    assert len(RENDERERS[name].render(turns, grids, generate=True).ids) + new_tokens <= most
    overviews = tokens_of(Room(len(grids), 0, 1, slices=False), max_tiles=9, tokens_per_tile=TOKENS_PER_TILE)
    one_tile = [Grid(1, 1)] * len(grids)
    alone = [Turn("user", "", turns[0].images)]
    assert len(RENDERERS[name].render(alone, one_tile, generate=True).ids) + 1 <= overviews
