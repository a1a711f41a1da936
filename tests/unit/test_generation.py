"""What a server relies on (engines/base.py): threads, closing, several conversations, prefix reuse, counts."""

import gc
import threading
from pathlib import Path

import pytest
from PIL import Image

from llama3v.config import AnswerWeights, Sampling
from llama3v.engines.base import Engine
from llama3v.engines.torch import TorchEngine
from llama3v.errors import CheckpointError, ConfigError, PromptError
from llama3v.model.prompt import Turn

ASK = [Turn("user", "What is it?", (0,))]
AGAIN = [Turn("user", "How many are there?", (0,))]


def picture(seed: int, size: tuple[int, int] = (84, 42)) -> Image.Image:
    channels = [Image.radial_gradient("L").resize(size).rotate(40 * seed), Image.new("L", size, 20 * seed)]
    return Image.merge("RGB", [*channels, Image.linear_gradient("L").resize(size)])


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu")


@pytest.fixture
def engine(alone: TorchEngine) -> TorchEngine:
    return TorchEngine.of(alone.model, alone.tokenizer, conversations=2)


@pytest.fixture
def reads(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what the LLM reads."""
    lengths: list[int] = []
    forward = engine.model.llm.forward
    monkeypatch.setattr(
        engine.model.llm, "forward", lambda **given: lengths.append(given["inputs_embeds"].shape[1]) or forward(**given)
    )
    return lengths


def test_a_second_question_about_an_image_costs_neither_vision_nor_its_prefill(
    engine: TorchEngine, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.generate(ASK, [picture(1)], max_new_tokens=4)
    list(first)
    assert (first.counts.cached_tokens, reads[0]) == (0, first.counts.prompt_tokens)
    assert first.counts.visual_tokens == 3  # an overview and two slices, of one token each
    monkeypatch.setattr(engine.model.vision, "trunk", lambda pixels: pytest.fail("the tower ran again"))
    monkeypatch.setattr(engine.model, "visual_tokens", lambda features: pytest.fail("the projector ran again"))
    del reads[:]
    second = engine.generate(AGAIN, [picture(1)], max_new_tokens=4)
    text = "".join(piece.text for piece in second)
    assert second.counts.cached_tokens > second.counts.visual_tokens
    assert reads[0] == second.counts.prompt_tokens - second.counts.cached_tokens
    monkeypatch.undo()
    assert text == TorchEngine.of(engine.model, engine.tokenizer).answer(AGAIN, [picture(1)], max_new_tokens=4)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(engine: TorchEngine, reads: list[int]) -> None:
    first = engine.generate(ASK, [picture(1)], max_new_tokens=6)
    answer = "".join(piece.text for piece in first)
    engine.answer([Turn("user", "Something else")], max_new_tokens=6)  # another conversation, in the other cache
    del reads[:]
    turns = [*ASK, Turn("assistant", answer), Turn("user", "Why?")]
    follow = engine.generate(turns, [picture(1)], max_new_tokens=4)
    text = "".join(piece.text for piece in follow)
    assert reads[0] == follow.counts.prompt_tokens - follow.counts.cached_tokens
    assert follow.counts.cached_tokens >= first.counts.prompt_tokens
    assert text == TorchEngine.of(engine.model, engine.tokenizer).answer(turns, [picture(1)], max_new_tokens=4)


def test_threads_get_the_answers_that_they_get_alone(alone: TorchEngine, engine: TorchEngine) -> None:
    """More of them than there are caches."""
    questions = [([Turn("user", f"What is {n}?", (0,))], [picture(n)]) for n in range(6)]
    expected = [alone.answer(turns, images, max_new_tokens=12) for turns, images in questions]
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = engine.answer(*questions[number], max_new_tokens=12)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == expected
    assert len(set(expected)) > 3


def test_closing_one_answer_ends_it_at_once_and_leaves_its_neighbour_alone(
    alone: TorchEngine, engine: TorchEngine
) -> None:
    expected = alone.answer(AGAIN, [picture(2)], max_new_tokens=20)
    one = engine.generate(ASK, [picture(1)], max_new_tokens=300)
    two = engine.generate(AGAIN, [picture(2)], max_new_tokens=20)
    heard = [next(two).text]
    next(one)
    one.close()
    one.close()
    assert list(one) == []
    assert (one.finish, one.counts.new_tokens < 10) == ("closed", True)
    assert "".join(heard + [piece.text for piece in two]) == expected
    assert two.finish in ("stop", "length")


def test_an_answer_can_be_closed_from_another_thread_while_it_is_read(engine: TorchEngine) -> None:
    generation = engine.generate([Turn("user", "Hello")], max_new_tokens=480)
    started, pieces = threading.Event(), []

    def read() -> None:
        for piece in generation:
            pieces.append(piece)
            started.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(20)
    generation.close()
    thread.join(20)
    assert not thread.is_alive()
    assert generation.finish == "closed"
    assert generation.counts.new_tokens < 480
    assert engine.answer([Turn("user", "Hello")], max_new_tokens=2)  # and its cache is free again


def test_an_answer_that_is_closed_before_it_is_read_costs_nothing(
    engine: TorchEngine, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model.vision, "trunk", lambda pixels: pytest.fail("the tower ran"))
    generation = engine.generate(ASK, [picture(5)], max_new_tokens=4)
    generation.close()
    assert list(generation) == []
    assert (generation.finish, reads) == ("closed", [])


def test_a_dropped_answer_gives_its_cache_back(engine: TorchEngine) -> None:
    for _ in range(3):
        next(engine.generate([Turn("user", "Hello")], max_new_tokens=20))
    gc.collect()
    assert [cache.owner for cache in engine._caches._caches] == [None, None]


def test_a_failure_in_the_middle_of_a_prompt_leaves_no_half_read_cache(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.answer(ASK, [picture(1)], max_new_tokens=8)
    forward = engine.model.llm.forward
    monkeypatch.setattr(engine.model.llm, "forward", lambda **given: forward(**given) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.answer(AGAIN, [picture(1)], max_new_tokens=8)
    monkeypatch.undo()
    assert engine.answer(ASK, [picture(1)], max_new_tokens=8) == expected


def test_a_long_prompt_is_read_in_parts_to_the_same_answer(
    alone: TorchEngine, engine: TorchEngine, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [Turn("user", "What is on the table? " * 3, (0, 1))]
    images = [picture(1), picture(2)]
    expected = TorchEngine.of(alone.model, alone.tokenizer).answer(turns, images, max_new_tokens=12)
    del reads[:]
    monkeypatch.setattr("llama3v.engines.prefix.PART_TOKENS", 7)
    generation = engine.generate(turns, images, max_new_tokens=12)
    assert "".join(piece.text for piece in generation) == expected
    whole, rest = divmod(generation.counts.prompt_tokens, 7)
    assert reads[: whole + bool(rest)] == [7] * whole + [rest] * bool(rest)


def test_pieces_carry_every_token_with_its_log_probability_when_asked(engine: TorchEngine) -> None:
    sampling = Sampling(logprobs=2)
    generation = engine.generate(ASK, [picture(1)], max_new_tokens=16, sampling=sampling)
    pieces = list(generation)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert len(tokens) == generation.counts.new_tokens
    assert all(token.alternatives[0].id == token.id for token in tokens)  # greedy
    assert all(token.logprob == token.alternatives[0].logprob >= token.alternatives[1].logprob for token in tokens)
    assert engine.tokenizer.decode([token.id for token in tokens]) == "".join(piece.text for piece in pieces)
    assert not any(piece.tokens for piece in engine.generate(ASK, [picture(1)], max_new_tokens=4))


def test_an_answer_says_why_it_ended_and_what_it_took(engine: TorchEngine) -> None:
    generation = engine.generate(ASK, [picture(1)], max_new_tokens=12)
    assert generation.finish is None
    text = "".join(piece.text for piece in generation)
    counts = generation.counts
    assert (generation.finish, counts.new_tokens) == ("length", 12)
    assert min(counts.vision_seconds, counts.prefill_seconds, counts.decode_seconds) > 0
    stop = text[4:7]
    stopped = engine.generate(ASK, [picture(1)], max_new_tokens=12, sampling=Sampling(stop=(stop,)))
    assert "".join(piece.text for piece in stopped) == text[: text.index(stop)]
    assert (stopped.finish, stopped.counts.new_tokens < 12) == ("stop", True)


def test_greedy_is_what_little_temperature_draws_and_top_k_of_one(engine: TorchEngine) -> None:
    greedy = engine.answer(ASK, [picture(1)], max_new_tokens=12)
    for sampling in (Sampling(temperature=1e-6), Sampling(temperature=3.0, top_k=1), Sampling(top_p=0.5)):
        assert engine.answer(ASK, [picture(1)], max_new_tokens=12, sampling=sampling) == greedy


def test_what_cannot_be_made_is_refused_with_a_reason(engine: TorchEngine, tiny_model_dir: Path) -> None:
    with pytest.raises(PromptError, match="1 token or more"):
        engine.generate(ASK, [picture(1)], max_new_tokens=0)
    with pytest.raises(ConfigError, match="1 conversation or more"):
        TorchEngine(tiny_model_dir, conversations=0)


def test_a_model_that_breaks_while_it_is_read_ends_only_that_answer(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.model.llm.forward

    def broken(**given):
        out = forward(**given)
        out.logits[:] = float("nan")
        return out

    monkeypatch.setattr(engine.model.llm, "forward", broken)
    with pytest.raises(CheckpointError, match="NaN"):
        engine.answer(ASK, [picture(1)], max_new_tokens=4)
    monkeypatch.undo()
    protocol: Engine = engine  # what the verbs and the server see
    assert protocol.answer(ASK, [picture(1)], max_new_tokens=4)


@pytest.mark.parametrize(("weights", "largest"), [("int8", 0.1), ("int4", 1.0)])
def test_an_llm_in_fewer_bits_answers_nearly_as_the_whole_one(
    alone: TorchEngine, tiny_model_dir: Path, weights: AnswerWeights, largest: float
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra lora is not installed")
    held = TorchEngine(tiny_model_dir, device="cpu", weights=weights)
    sampling = Sampling(logprobs=300)
    whole, rounded = (
        next(engine.generate(ASK, [picture(1)], max_new_tokens=1, sampling=sampling)).tokens[0].alternatives
        for engine in (alone, held)
    )
    known = {token.id: token.logprob for token in whole}
    differences = [abs(known[token.id] - token.logprob) for token in rounded if token.id in known]
    assert 0 < sum(differences) / len(differences) < largest
