"""Which engine runs a model: what is named, what the model is, and what is refused with a way out."""

from pathlib import Path

import pytest

from llama3v.config import AnswerWeights, Runtime
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
        open_engine(pair, runtime)


def test_llama_cpp_refuses_a_directory_that_is_no_pair(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "llamacpp", ())
    with pytest.raises(ConfigError, match="llama3v export --format gguf"):
        open_engine(tiny_model_dir, "llamacpp")


@pytest.mark.parametrize(("weights", "told"), [("int8", "q8_0"), ("int4", "q4_k_m")])
def test_the_bits_of_a_pair_are_decided_when_it_is_written(pair: Path, weights: AnswerWeights, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_engine(pair, weights=weights)


def test_an_extra_that_is_missing_is_named(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "mlx", ("no_such_module",))
    with pytest.raises(ConfigError, match=r"no module no_such_module.*llama3v\[mlx\]"):
        open_engine(tiny_model_dir, "mlx")


def test_auto_takes_the_only_one_that_can_and_says_why_not_the_others(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(NEEDS, "mlx", ("no_such_module",))
    choice = open_engine(tiny_model_dir, "auto")
    assert choice.engine.name == "torch"
    assert "left out: llamacpp" in choice.reason
    assert "the engine mlx is not installed (there is no module no_such_module)" in choice.reason
