"""Which engine runs a model: what is named, what the model is, and what is refused with a way out."""

import weakref
from pathlib import Path
from typing import ClassVar

import pytest

from llama3v.config import AnswerWeights, Running, Runtime
from llama3v.engines import choose
from llama3v.engines.choose import NEEDS, open_engine
from llama3v.errors import ConfigError


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path


def test_a_model_directory_runs_in_torch_unless_something_else_is_said(tiny_model_dir: Path) -> None:
    choice = open_engine(tiny_model_dir, conversations=3)
    assert (choice.engine.name, choice.engine.conversations, choice.reason) == ("torch", 3, "")


@pytest.mark.parametrize("runtime", ["torch", "mlx"])
def test_a_gguf_pair_is_refused_by_other_engines(pair: Path, runtime: Runtime, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, runtime, ())
    with pytest.raises(ConfigError, match="give --engine llamacpp"):
        open_engine(pair, Running(engine=runtime))


def test_llama_cpp_refuses_a_directory_that_is_no_pair(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "llamacpp", ())
    with pytest.raises(ConfigError, match="llama3v export --format gguf"):
        open_engine(tiny_model_dir, Running(engine="llamacpp"))


@pytest.mark.parametrize(("weights", "told"), [("int8", "q8_0"), ("int4", "q4_k_m")])
def test_the_bits_of_a_pair_are_decided_when_it_is_written(pair: Path, weights: AnswerWeights, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_engine(pair, Running(weights=weights))


def test_an_extra_that_is_missing_is_named(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "mlx", ("no_such_module",))
    with pytest.raises(ConfigError, match=r"no module no_such_module.*llama3v\[mlx\]"):
        open_engine(tiny_model_dir, Running(engine="mlx"))


def test_auto_takes_the_only_one_that_can_and_says_why_not_the_others(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "mlx", ("no_such_module",))
    choice = open_engine(tiny_model_dir, Running(engine="auto"))
    assert choice.engine.name == "torch"
    assert "left out: llamacpp" in choice.reason
    assert "the engine mlx is not installed (there is no module no_such_module)" in choice.reason


@pytest.mark.parametrize("options", [{"kv": "q8_0"}, {"context": 4096}])
def test_options_of_llama_cpp_are_refused_by_other_engines(tiny_model_dir: Path, options: dict) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"--{name} .* is for the engine llamacpp, and the engine torch"):
        open_engine(tiny_model_dir, Running(**options))


class Timed:
    """An engine that knows how fast it is, and is one of its kind in memory."""

    alive: ClassVar[set[int]] = set()

    def __init__(self, name: str, speed: float) -> None:
        self.name, self.speed, self.itself = name, speed, self  # a circle, as engines have them
        assert not Timed.alive, "two engines are held at the same time"
        Timed.alive.add(id(self))
        weakref.finalize(self, Timed.alive.discard, id(self))


@pytest.mark.parametrize("speeds", [(1.0, 3.0, 2.0), (3.0, 1.0, 2.0), (1.0, 2.0, 3.0)])
def test_auto_takes_the_fastest_and_holds_one_engine_at_a_time(speeds: tuple[float, ...], monkeypatch) -> None:
    Timed.alive.clear()
    known = dict(zip(NEEDS, speeds, strict=True))
    monkeypatch.setattr(choose, "_open", lambda name, *_: Timed(name, known[name]))
    monkeypatch.setattr(choose, "tokens_per_second", lambda engine: engine.speed)
    choice = open_engine("a model", Running(engine="auto"))
    assert choice.engine.name == max(known, key=known.__getitem__)
    assert choice.reason.startswith(f"engine {choice.engine.name}: 3 tokens/s; ")
    assert len(Timed.alive) == 1
