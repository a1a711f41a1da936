"""The reference engine: streaming, batches, cached features and refusals; Conversation; the detokenizer."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llama3v.engines.torch
from llama3v.config import AnswerWeights, ChatConfig
from llama3v.engines.base import ImageFeatures
from llama3v.engines.cached import REMEMBERED_IMAGES
from llama3v.engines.chat import Conversation
from llama3v.engines.detokenizer import Detokenizer
from llama3v.engines.torch import TorchEngine
from llama3v.errors import CheckpointError, ImageError, PromptError
from llama3v.feature_cache.encoders.torch import best_device
from llama3v.model.frozen import hold
from llama3v.model.llama3v import load_model, save_model
from llama3v.model.prompt import Turn
from llama3v.model.slicing import Grid
from llama3v.model.tiles import decode_image


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu")


def picture(width: int, height: int, color: str = "red") -> Image.Image:
    image = Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", [image, image.rotate(90), Image.new("L", (width, height), len(color) * 20)])


ASK = [Turn("user", "What is it?", (0,))]
QUESTIONS: list[tuple[list[Turn], list[Any]]] = [
    (ASK, [picture(50, 50)]),
    ([Turn("user", "Hello")], []),
    ([Turn("user", "Describe the image. What is on the table?", (0, 1))], [picture(100, 40), picture(40, 60, "green")]),
    ([Turn("system", "Be brief."), *ASK, Turn("assistant", "A dog."), Turn("user", "Why?")], [picture(90, 90)]),
]


def test_streamed_pieces_join_to_the_answer_that_generate_gives(engine: TorchEngine) -> None:
    """The loop here against transformers' generate, which knows nothing of it."""
    for turns, images in QUESTIONS:
        pieces = list(engine.stream(turns, images, max_new_tokens=24))
        assert len(pieces) > 1
        assert "".join(pieces) == engine.answer(turns, images, max_new_tokens=24)
        seen = [engine.features_of(image) for image in images]
        ids = torch.tensor([engine.renderer.render(turns, [image.grid for image in seen], generate=True).ids])
        tokens = engine.model.generate(
            input_ids=ids,
            features=torch.cat([image.features for image in seen]) if seen else None,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(engine.renderer.stop_ids),
        )
        new = [token for token in tokens[0, ids.shape[1] :].tolist() if token not in engine.renderer.stop_ids]
        assert "".join(pieces) == engine.tokenizer.decode(new, skip_special_tokens=True)


def test_a_padded_batch_answers_as_one_by_one(engine: TorchEngine) -> None:
    single = [engine.answer(turns, images, max_new_tokens=24) for turns, images in QUESTIONS]
    assert engine.answer_batch(QUESTIONS, max_new_tokens=24) == single
    assert len(set(single)) == len(single)
    assert engine.answer_batch([], max_new_tokens=24) == []


def test_cached_features_answer_as_the_picture_does(engine: TorchEngine) -> None:
    seen = engine.features_of(picture(84, 42))
    assert seen.grid == Grid(2, 1)
    assert engine.answer(ASK, [seen], max_new_tokens=12) == engine.answer(ASK, [picture(84, 42)], max_new_tokens=12)
    stored = ImageFeatures(seen.features.to(torch.bfloat16), seen.grid)  # as the feature cache stores them
    assert len(engine.answer_batch([(ASK, [stored])], max_new_tokens=12)) == 1


def test_an_answer_ends_at_a_stop_token_in_every_way_of_asking(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, images = QUESTIONS[0]
    whole = engine.answer(turns, images, max_new_tokens=24)
    ids = engine.renderer.render(turns, [engine.features_of(images[0]).grid], generate=True).ids
    tokens = engine.model.generate(
        input_ids=torch.tensor([ids]),
        features=engine.features_of(images[0]).features,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=-1,
    )[0, len(ids) :].tolist()
    stop = next(token for token in tokens[4:] if token not in tokens[:4])
    monkeypatch.setattr(engine.renderer, "stop_ids", (stop,))
    short = engine.answer(turns, images, max_new_tokens=24)
    assert whole.startswith(short)
    assert 0 < len(short) < len(whole)
    assert engine.answer_batch([QUESTIONS[0], QUESTIONS[1]], max_new_tokens=24)[0] == short


def test_the_context_is_used_to_its_last_token_and_not_beyond(engine: TorchEngine) -> None:
    turns = [Turn("user", "Hello")]
    room = engine.context_tokens - engine.renderer.length([*turns]) - 10
    used = len(engine.renderer.render(turns, generate=True).ids)
    assert room > 0
    assert engine.answer(turns, max_new_tokens=engine.context_tokens - used) is not None
    for ask in (
        lambda tokens: engine.stream(turns, max_new_tokens=tokens),  # refused at once, not at the first piece
        lambda tokens: engine.answer_batch([(turns, [])], max_new_tokens=tokens),
    ):
        with pytest.raises(PromptError, match="at most 512 tokens"):
            ask(engine.context_tokens - used + 1)


def test_what_cannot_be_answered_is_refused_before_any_output(engine: TorchEngine) -> None:
    with pytest.raises(PromptError, match="images 0"):
        engine.stream([Turn("user", "Hello")], [picture(9, 9)], max_new_tokens=4)
    with pytest.raises(ImageError):
        engine.stream(ASK, [b"no picture"], max_new_tokens=4)
    seen = engine.features_of(picture(50, 50))
    with pytest.raises(PromptError, match="use the cache that was made for this model"):
        engine.stream(ASK, [ImageFeatures(seen.features, Grid(2, 2))], max_new_tokens=4)


def test_a_damaged_model_is_told_and_not_heard(tiny_model_dir: Path) -> None:
    damaged = TorchEngine(tiny_model_dir, device="cpu")
    with torch.no_grad():
        damaged.model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        damaged.answer([Turn("user", "Hello")], max_new_tokens=4)


def test_pictures_that_differ_in_their_palettes_alone_are_different_pictures(engine: TorchEngine) -> None:
    red, blue = (Image.new("P", (50, 40)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert engine._look_at(red).key != engine._look_at(blue).key
    assert engine._look_at(red).key == engine._look_at(red.convert("RGB")).key  # what the model sees is its name


@pytest.mark.parametrize("kind", ["turned", "transparent", "transparent palette"])
def test_a_picture_is_seen_as_its_file_is(engine: TorchEngine, kind: str) -> None:
    """EXIF is obeyed once and transparency is white, whether a caller gives a file, opens it, or decodes it."""
    image = picture(90, 40)
    options: dict[str, Any] = {}
    if kind == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        options = {"exif": exif}
    else:
        image.putalpha(Image.radial_gradient("L").resize(image.size))
        image = image.quantize(16) if kind.endswith("palette") else image
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    expected = engine.features_of(file.getvalue())
    for opened in (Image.open(file), decode_image(file.getvalue())):
        found = engine.features_of(opened)
        assert torch.equal(found.features, expected.features)
        assert found.grid == engine._look_at(opened).grid == expected.grid
    assert not torch.equal(expected.features, engine.features_of(image.convert("RGB")).features)


def test_apples_gpu_is_used_where_it_is_there_and_computes_in_bf16(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == torch.device("mps")
    meta = torch.device("meta")  # stands for a device that is not the CPU: no mps tensor can be made here
    monkeypatch.setattr("llama3v.engines.torch.best_device", lambda: meta)
    engine = TorchEngine(tiny_model_dir)
    assert (engine.device, engine.dtype) == (meta, torch.bfloat16)
    types = {parameter.dtype for parameter in engine.model.parameters()}
    assert types == {torch.bfloat16}
    frequencies = engine.model.llm.model.rotary_emb.inv_freq  # in bf16 positions beyond 256 would blur
    assert frequencies.dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "device", "dtype"),
    [
        ("full", "cpu", torch.float32),
        ("int8", "cpu", torch.bfloat16),
        ("int4", "cpu", torch.bfloat16),
        ("full", "meta", torch.bfloat16),
    ],
)
def test_an_llm_is_read_in_fp32_only_where_it_answers_in_fp32(
    tiny_model_dir: Path, monkeypatch, weights: AnswerWeights, device: str, dtype: torch.dtype
) -> None:
    read = []
    original = llama3v.engines.torch.load_model
    monkeypatch.setattr(
        llama3v.engines.torch, "load_model", lambda name, llm_dtype: read.append(llm_dtype) or original(name, llm_dtype)
    )
    engine = TorchEngine(tiny_model_dir, device=device, weights=weights)
    assert read == [dtype]
    computing = torch.float32 if device == "cpu" else torch.bfloat16
    assert engine.dtype == engine.model.llm.get_input_embeddings().weight.dtype == computing


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_checkpoint_in_bf16_is_quantised_to_the_same_values_as_from_fp32(
    tiny_model_dir: Path, tmp_path: Path, weights: AnswerWeights, engine: TorchEngine
) -> None:
    model, tokenizer = load_model(tiny_model_dir, torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "bf16")
    found = TorchEngine(tmp_path / "bf16", device="cpu", weights=weights)
    expected, tokenizer = load_model(tmp_path / "bf16")  # all of it in fp32
    hold(expected.llm, {"int8": "int8", "int4": "nf4"}[weights])
    ids = torch.arange(12)[None]
    assert torch.equal(found.model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_only_the_latest_images_are_remembered(engine: TorchEngine) -> None:
    for width in range(10, 10 + REMEMBERED_IMAGES + 3):
        engine.generate(ASK, [picture(width, 10)], max_new_tokens=1)
    assert len(engine._seen) == REMEMBERED_IMAGES


class ScriptedEngine:
    """Answers with given pieces; a KeyboardInterrupt among them is the ^C of the person at the terminal."""

    def __init__(self, *answers: Sequence[str | type[BaseException]]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[Turn], int]] = []

    def stream(self, turns: Sequence[Turn], images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        self.asked.append((list(turns), len(images)))
        return self._pieces(self.answers.pop(0))

    def _pieces(self, answer: Sequence[str | type[BaseException]]) -> Iterator[str]:
        for piece in answer:
            if not isinstance(piece, str):
                raise piece
            yield piece


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_went() -> None:
    engine = ScriptedEngine(["A ", "dog", KeyboardInterrupt], ["Yes."])
    conversation = Conversation(engine, ChatConfig())  # type: ignore[arg-type]
    conversation.waiting.append(b"picture")
    heard: list[str] = []
    assert not conversation.ask("What?", heard.append)
    assert heard == ["A ", "dog"]
    assert conversation.ask("Sure?", heard.append)
    said = [Turn("user", "What?", (0,)), Turn("assistant", "A dog"), Turn("user", "Sure?")]
    assert engine.asked[1] == (said, 1)


def test_a_question_that_was_stopped_before_any_answer_never_happened() -> None:
    engine = ScriptedEngine([KeyboardInterrupt], ["A cat."])
    conversation = Conversation(engine, ChatConfig())  # type: ignore[arg-type]
    conversation.waiting.append(b"picture")
    assert not conversation.ask("What?", print)
    assert conversation.turns == []
    assert conversation.ask("What is it?", lambda piece: None)
    assert engine.asked[1] == ([Turn("user", "What is it?", (0,))], 1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: id for id, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in BYTES.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + detokenizer.rest() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all(len(piece) <= 1 for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_decode_as_they_do_at_once(tokens: list[int]) -> None:
    assert Detokenizer(BYTES).text_of(tokens) == BYTES.decode(tokens, clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_drops_the_first_space_streams_its_spaces() -> None:
    vocabulary = {"▁Hello": 0, "▁wide": 1, "▁world": 2, "!": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    detokenizer = Detokenizer(wrapped)
    assert [detokenizer.push(token) for token in (0, 1, 2, 3)] == ["Hello", " wide", " world", "!"]
