"""Answers that llama.cpp makes in the same passes are, to the last bit, those that it makes alone."""

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llama3v.config import ExportConfig, Sampling
from llama3v.engines import llama_api
from llama3v.engines.base import Token
from llama3v.errors import CheckpointError
from llama3v.exporters.verbs import export
from llama3v.model.llama3v import build_model, save_model
from llama3v.model.prompt import Turn

pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
pytest.importorskip("xllamacpp", reason="needs the extra llama3v[llamacpp]")
from llama3v.engines.llamacpp import LlamaCppEngine

ASSETS = Path(llama_api.__file__).parents[1] / "assets"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF pairs of the embedded weights, in a format; q4_k_m of a random LLM that is wide enough for it."""
    folder = tmp_path_factory.mktemp("together")

    def make(weights: str) -> Path:
        out = folder / weights
        if not out.exists():
            llm = wide_llm(folder / "wide") if weights == "q4_k_m" else ASSETS / "llama-scenes"
            model, tokenizer = build_model(str(ASSETS / "siglip-scenes"), str(llm), max_tiles=4)
            source = folder / f"{weights}-model"
            save_model(model, tokenizer, source)
            export(ExportConfig(out=out, model=str(source), format="gguf", weights=weights, tower="none", check=False))
        return out

    return make


def wide_llm(folder: Path) -> Path:
    """Random weights whose rows are multiples of 256 numbers: k-quants take no others."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ASSETS / "llama-scenes")
    config.update(
        {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 2}
        | {"initializer_range": 0.2}
    )
    shutil.copytree(ASSETS / "llama-scenes", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(pair: Callable[[str], Path]) -> Iterator[LlamaCppEngine]:
    engine = opened(pair("f16"))
    yield engine
    engine.llm.close()


def opened(pair: Path, kv: str = "f16", conversations: int = 3) -> LlamaCppEngine:
    """An engine whose answers have all the tokens that they may have."""
    engine = LlamaCppEngine(pair, kv=kv, tower="torch", conversations=conversations, context_tokens=512, threads=1)
    engine.renderer.stop_ids = ()
    return engine


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        forget(request.getfixturevalue("engine"))


def forget(engine: LlamaCppEngine) -> None:
    for cache in engine._caches._caches:
        assert cache.owner is None
        cache.shorten(0)


def picture(seed: int, size: tuple[int, int] = (150, 100)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


Asked = tuple[list[Turn], list[Image.Image], int, Sampling]


def asked(number: int) -> Asked:
    """Texts and pictures of several sizes, greedy and drawn, of several lengths."""
    text = ("What is on the table?", "How many shapes are there, and where?", "Why?")[number % 3] + f" {number}"
    images = [[], [picture(number, (80, 80))], [picture(number)], [picture(number, (90, 300)), picture(7)]][number % 4]
    greedy = number % 5 != 4
    sampling = Sampling(
        temperature=0.0 if greedy else 1.5, seed=number, logprobs=3, repetition_penalty=1 + 0.2 * greedy
    )
    return [Turn("user", text, tuple(range(len(images))))], images, 10 + 7 * (number % 3), sampling


def begin(engine: LlamaCppEngine, number: int) -> Any:
    turns, images, tokens, sampling = asked(number)
    return engine.generate(turns, images, max_new_tokens=tokens, sampling=sampling)


def alone(engine: LlamaCppEngine, numbers: range) -> dict[int, list[Token]]:
    found = {}
    for number in numbers:
        forget(engine)
        found[number] = [token for piece in begin(engine, number) for token in piece.tokens]
    forget(engine)
    return found


class Crowd:
    """Answers that are made at the same time, each in a thread that waits for it."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self.engine = engine
        self.heard: dict[int, list[Token]] = {}
        self.errors: dict[int, BaseException] = {}
        self._threads: list[threading.Thread] = []

    def ask(
        self,
        number: int,
        generation: Any = None,
        then: Callable[[int], None] = lambda heard: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`then` is called with the number of tokens so far, after each piece; `ended` at the end."""
        generation = generation or begin(self.engine, number)
        heard = self.heard.setdefault(number, [])

        def hear(piece: Any) -> None:
            heard.extend(piece.tokens)
            then(len(heard))

        def run() -> None:
            try:
                self.engine.run(generation, hear)
            except CheckpointError as error:
                self.errors[number] = error
            ended()

        thread = threading.Thread(target=run)
        thread.start()  # before it is listed: another thread may wait for all that are
        self._threads.append(thread)

    @contextmanager
    def gathered(self, count: int) -> Iterator[None]:
        """So many are asked in the body, and begin with the same step."""
        lock = self.engine._together._lock
        with lock:
            yield
            end = time.monotonic() + 60
            while len(lock._waiting) < count:
                assert time.monotonic() < end
                time.sleep(0.005)

    def wait(self) -> None:
        for thread in self._threads:  # grows while it is read
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("weights", "kv", "conversations"),
    [("f32", "f32", 3), ("f16", "f16", 3), ("q8_0", "f16", 3), ("q8_0", "q8_0", 3), ("q4_k_m", "f16", 5)],
)
def test_answers_and_their_log_probabilities_are_bit_for_bit_those_given_alone(
    pair: Any, weights: str, kv: str, conversations: int
) -> None:
    """Twelve answers over a few caches: they begin and end at different times, and caches are taken over."""
    engine = opened(pair(weights), kv, conversations)
    expected = alone(engine, range(12))
    passes = Passes(engine)
    crowd = Crowd(engine)
    waiting = list(range(conversations, 12))

    def next_one() -> None:
        if waiting:
            crowd.ask(waiting.pop(0), ended=next_one)

    with crowd.gathered(conversations):
        for number in range(conversations):
            crowd.ask(number, ended=next_one)
    crowd.wait()
    assert crowd.heard == expected
    assert max(passes.members) == conversations
    assert len({token.id for tokens in expected.values() for token in tokens}) > 20
    engine.llm.close()


@pytest.mark.parametrize("weights", ["f16", "q8_0", "q4_k_m"])
def test_what_was_asked_before_changes_no_answer(pair: Any, weights: str) -> None:
    """Prompts that begin alike and go on differently, in all orders: other texts, other pictures after the first one."""
    engine = opened(pair(weights), conversations=2)
    a, b = picture(1), picture(2)
    talks = [
        ("What is on the table?", [a]),
        ("What is on the table, and where?", [a]),
        ("What is on the table?", [a, b]),
        ("What is on the table?", []),
        ("What is on the tables?", [a, b]),
    ]

    def answer(talk: tuple[str, list[Image.Image]]) -> list[Token]:
        text, images = talk
        turns = [Turn("user", text, tuple(range(len(images))))]
        generation = engine.generate(turns, images, max_new_tokens=8, sampling=Sampling(logprobs=3))
        reused.append(generation.counts)
        return [token for piece in generation for token in piece.tokens]

    reused: list[Any] = []
    expected = []
    for talk in talks:
        forget(engine)
        expected.append(answer(talk))
    for order in itertools.permutations(range(5), 3):
        forget(engine)
        assert [answer(talks[number]) for number in order] == [expected[number] for number in order], order
    assert any(counts.cached_tokens for counts in reused)
    engine.llm.close()


class Passes:
    """How many conversations each pass of single tokens had, and what prompts were read in pieces."""

    def __init__(self, engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        group = engine._caches._group  # type: ignore[attr-defined]
        self.members: list[int] = []
        self.pieces: list[Any] = []
        singles, piece = group.read_singles, group.read_piece
        patch = monkeypatch.setattr if monkeypatch else setattr

        def read_singles(members: Any, tokens: Any) -> Any:
            self.members.append(len(members))
            return singles(members, tokens)

        def read_piece(member: int, new: Any) -> Any:
            self.pieces.append(new)
            return piece(member, new)

        patch(group, "read_singles", read_singles)
        patch(group, "read_piece", read_piece)


def test_closing_one_in_the_middle_leaves_its_neighbours_tokens_as_they_are(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(engine, range(3))
    crowd = Crowd(engine)
    leaving = begin(engine, 1)
    steps: list[int] = []
    original = engine._caches.read_together

    def leave_at_the_eighth(talks: Any) -> Any:
        steps.append(len(talks))
        if len(steps) == 8:
            leaving.close()
        return original(talks)

    monkeypatch.setattr(engine._caches, "read_together", leave_at_the_eighth)
    with crowd.gathered(3):
        crowd.ask(0)
        crowd.ask(1, leaving)
        crowd.ask(2)
    crowd.wait()
    assert steps[:9] == [3] * 8 + [2]
    assert (crowd.heard[0], crowd.heard[2]) == (expected[0], expected[2])
    assert 0 < leaving.counts.new_tokens < len(expected[1])
    assert crowd.heard[1] == expected[1][: len(crowd.heard[1])]
    assert leaving.finish == "closed"
    forget(engine)  # nobody owns a cache


def test_an_answer_closed_in_its_prompt_or_before_it_costs_the_others_nothing(engine: LlamaCppEngine) -> None:
    expected = alone(engine, range(2))
    crowd = Crowd(engine)
    never, reading = begin(engine, 2), begin(engine, 3)
    never.close()
    original = reading._caches.read_together

    def close_first(talks: Any) -> Any:
        reading.close()
        return original(talks)

    engine._caches.read_together = close_first  # type: ignore[method-assign]
    try:
        for number, generation in ((0, None), (1, None), (2, never), (3, reading)):
            crowd.ask(number, generation)
        crowd.wait()
    finally:
        del engine._caches.read_together
    assert crowd.heard == {**expected, 2: [], 3: []}
    assert (never.finish, reading.finish) == ("closed", "closed")


def test_one_that_fails_harms_no_other(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(engine, range(3))
    images = asked(1)[1]
    monkeypatch.setattr(engine, "_visual_tokens_of_tiles", lambda tiles: np.full((4 * 81, engine.llm.hidden), np.nan))
    engine._seen.clear()
    broken = engine.generate([Turn("user", "What?", (0,))], images, max_new_tokens=5)
    crowd = Crowd(engine)
    crowd.ask(1, broken)
    crowd._threads[0].join(60)
    monkeypatch.undo()
    engine._seen.clear()
    crowd.ask(0)
    crowd.ask(2)
    crowd.wait()
    assert "NaN" in str(crowd.errors[1])
    assert (crowd.heard[0], crowd.heard[2]) == (expected[0], expected[2])
    forget(engine)


def test_a_pass_that_fails_is_tried_again_one_by_one(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(engine, range(3))
    decode, failed = engine.llm.decode, []

    def fails_sometimes(new: Any, places: Any, members: Any, wanted: Any = 1) -> Any:
        if isinstance(members, list) and len(members) == 3 and len(failed) < 3:
            failed.append(new)
            decode(new, places, members, wanted)  # and nobody knows how far it came
            raise CheckpointError("llama.cpp failed")
        return decode(new, places, members, wanted)

    monkeypatch.setattr(engine.llm, "decode", fails_sometimes)
    crowd = Crowd(engine)
    with crowd.gathered(3):
        for number in range(3):
            crowd.ask(number)
    crowd.wait()
    assert failed
    assert crowd.heard == expected


def test_a_picture_that_a_neighbour_talks_about_is_not_read_again(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def about(text: str) -> Any:
        turns = [Turn("user", text, (0,))]
        return engine.generate(turns, [picture(3)], max_new_tokens=20, sampling=Sampling(logprobs=1))

    expected = [token for piece in about("How many?") for token in piece.tokens]
    forget(engine)
    passes = Passes(engine, monkeypatch)
    monkeypatch.setattr(engine._caches._group, "worth_copying", 4)  # a tile of this model has four visual tokens
    crowd = Crowd(engine)
    second: list[Any] = []

    def then(heard: int) -> None:
        if heard >= 3 and not second:
            second.append(about("How many?"))
            threading.Timer(0, lambda: crowd.ask(1, second[0])).start()

    crowd.ask(0, about("What is it?"), then)
    crowd.wait()
    while len(crowd._threads) < 2:
        threading.Event().wait(0.01)
    crowd.wait()
    assert crowd.heard[1] == expected
    assert second[0].counts.cached_tokens > second[0].counts.visual_tokens > 0
    tiles = sum(len(new) for new in passes.pieces if isinstance(new, np.ndarray))
    assert tiles == second[0].counts.visual_tokens  # once, for the first


def test_what_is_forgotten_has_room_again(engine: LlamaCppEngine) -> None:
    """Prompts that nearly fill their contexts, again and again, in every cache at the same time."""
    for start in range(0, 9, 3):
        crowd = Crowd(engine)
        for number in range(start, start + 3):
            turns = [Turn("user", f"{number} " + "table " * 100)]
            crowd.ask(number, engine.generate(turns, max_new_tokens=40, sampling=Sampling(logprobs=0)))
        crowd.wait()
        assert all(len(tokens) > 0 for tokens in crowd.heard.values())
        assert not crowd.errors
    group = engine._caches._group  # type: ignore[attr-defined]
    assert group._lengths == [len(cache.cells) for cache in engine._caches._caches]
