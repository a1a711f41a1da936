"""The MLX engine against torch, token for token, on whatever MLX runs on here."""

import threading
from pathlib import Path

import pytest
from PIL import Image

from llama3v.config import AnswerWeights, AskConfig
from llama3v.engines.ask import ask
from llama3v.engines.torch import TorchEngine
from llama3v.errors import ConfigError
from llama3v.model.prompt import Turn

pytest.importorskip("mlx_lm", reason="the extra mlx is not installed")
from llama3v.engines.mlx import MlxEngine


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    gradient = Image.linear_gradient("L").resize(size).rotate(50 * seed)
    return Image.merge("RGB", [gradient, Image.radial_gradient("L").resize(size), Image.new("L", size, 40 * seed)])


CONVERSATIONS = {
    "text": ([Turn("user", "What is on the table?")], []),
    "one tile": ([Turn("user", "What is it?", (0,))], [picture(1, (42, 42))]),
    "two images": (
        [Turn("user", "What?", (0,)), Turn("assistant", "A star."), Turn("user", "And here?", (1,))],
        [picture(2, (84, 42)), picture(3, (40, 60))],
    ),
}


@pytest.fixture(scope="module")
def torch_engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> MlxEngine:
    return MlxEngine(tiny_model_dir, conversations=2)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_engine_answers_token_for_token_as_torch_does(
    engine: MlxEngine, torch_engine: TorchEngine, name: str
) -> None:
    turns, images = CONVERSATIONS[name]
    expected, found = (list(each.stream(turns, images, max_new_tokens=24)) for each in (torch_engine, engine))
    assert found == expected
    assert len(found) > 4


def test_a_second_question_reads_only_what_is_new(engine: MlxEngine, torch_engine: TorchEngine, monkeypatch) -> None:
    image = picture(4, (84, 42))
    engine.answer([Turn("user", "What is it?", (0,))], [image], max_new_tokens=4)
    monkeypatch.setattr(engine.vision, "encode", lambda tiles: pytest.fail("the tower ran again"))
    turns = [Turn("user", "How many?", (0,))]
    second = engine.generate(turns, [image], max_new_tokens=12)
    assert "".join(piece.text for piece in second) == torch_engine.answer(turns, [image], max_new_tokens=12)
    assert second.counts.cached_tokens > second.counts.visual_tokens > 0


def test_answers_may_be_read_in_any_thread(engine: MlxEngine, torch_engine: TorchEngine) -> None:
    expected = {name: torch_engine.answer(*CONVERSATIONS[name], max_new_tokens=12) for name in CONVERSATIONS}
    found: dict[str, str] = {}

    def ask_in_thread(name: str) -> None:
        found[name] = engine.answer(*CONVERSATIONS[name], max_new_tokens=12)

    threads = [threading.Thread(target=ask_in_thread, args=(name,)) for name in CONVERSATIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fewer_bits_still_answer(tiny_model_dir: Path, weights: AnswerWeights) -> None:
    engine = MlxEngine(tiny_model_dir, weights=weights)
    assert engine.answer(*CONVERSATIONS["one tile"], max_new_tokens=8)


def test_heads_that_a_quantised_kv_cache_cannot_hold_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="heads of 8"):
        MlxEngine(tiny_model_dir, kv_bits=8)


def test_ask_runs_a_model_in_mlx(tiny_model_dir: Path, torch_engine: TorchEngine, tmp_path: Path, capsys) -> None:
    picture(1, (42, 42)).save(tmp_path / "photo.png")
    config = AskConfig(
        (str(tmp_path / "photo.png"), "What is it?"), str(tiny_model_dir), max_new_tokens=12, engine="mlx"
    )
    summary = ask(config)
    assert summary["engine"] == "mlx"
    expected = torch_engine.answer(*CONVERSATIONS["one tile"], max_new_tokens=12)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_auto_measures_what_is_here_and_says_what_it_took(tiny_model_dir: Path, capsys) -> None:
    summary = ask(AskConfig(("Hello",), str(tiny_model_dir), max_new_tokens=4, engine="auto"))
    said = " ".join(capsys.readouterr().err.split())
    assert f"engine {summary['engine']}:" in said
    for word in ("torch", "mlx", "tokens/s", "left out: llamacpp"):
        assert word in said


def test_a_model_of_another_kind_is_one_line_that_says_what_to_do(tiny_model_dir: Path, monkeypatch) -> None:
    for runtime, told in (("llamacpp", "llama3v export --format gguf"),):
        with pytest.raises(ConfigError, match=told):
            ask(AskConfig(("Hello",), str(tiny_model_dir), engine=runtime))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llama3v\[mlx\]"):
        ask(AskConfig(("Hello",), str(tiny_model_dir), engine="mlx"))
