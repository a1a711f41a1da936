"""A GGUF pair: llama.cpp computes from it what this package computes, by stock code and through our engine."""

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama3v.cli import main
from llama3v.config import AskConfig, ExportConfig, Sampling
from llama3v.engines import llama_api
from llama3v.engines.ask import ask
from llama3v.engines.base import ImageFeatures
from llama3v.engines.torch import TorchEngine
from llama3v.errors import CheckpointError, ConfigError, PromptError
from llama3v.exporters.gguf import _rope_factors
from llama3v.exporters.quantise import type_of
from llama3v.exporters.verbs import export
from llama3v.model.llama3v import build_model, save_model
from llama3v.model.prompt import Turn

gguf = pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
pytest.importorskip("xllamacpp", reason="needs the extra llama3v[llamacpp]")
pytestmark = pytest.mark.timeout(900)  # each export starts a process: minutes on a busy machine

ASSETS = Path(llama_api.__file__).parents[1] / "assets"


def make(directory: Path, r: int) -> Path:
    """A model of the embedded weights whose projector differs from its start in every number."""
    vision, llm = (str(ASSETS / name) for name in ("siglip-scenes", "llama-scenes"))
    model, tokenizer = build_model(vision, llm, cut=2, scale_factor=r, max_tiles=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_model(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("gguf") / "model", 3)


@pytest.fixture(scope="module")
def exported(model_dir: Path) -> tuple[Path, dict]:
    out = model_dir.with_name("f32")
    return out, export(ExportConfig(out=out, model=str(model_dir), format="gguf"))


@pytest.fixture(scope="module")
def engines(model_dir: Path, exported):
    from llama3v.engines.llamacpp import LlamaCppEngine

    engine = LlamaCppEngine(exported[0], kv="f32", tower="torch")
    yield TorchEngine(model_dir, device="cpu"), engine
    engine.llm.close()


def picture(seed: int, size: tuple[int, int] = (150, 100)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def test_both_engines_give_the_same_json_for_a_schema(engines) -> None:
    pytest.importorskip("llguidance", reason="needs the extra llama3v[serve]")
    schema = json.dumps({"type": "array", "items": {"enum": ["red", "blue", 3]}, "minItems": 2, "maxItems": 4})
    turns = [Turn("user", "What is it?", (0,))]
    answers = {
        engine.answer(turns, [picture(1)], max_new_tokens=60, sampling=Sampling(json_schema=schema))
        for engine in engines
    }
    (answer,) = answers
    assert set(json.loads(answer)) <= {"red", "blue", 3}


def test_stock_llama_cpp_gives_our_visual_tokens_logits_and_greedy_tokens(exported) -> None:
    check = exported[1]["check"]
    assert check["visual_tokens"] < 5e-3
    assert check["logits"] < 1e-2
    assert check["greedy_equal"] == len(check["cases"]) == 3
    assert not check["tokenizer_gives_our_ids"]  # GPT-2's pattern cuts the line breaks after a header apart ...
    assert any("stock programs" in warning for warning in exported[1]["warnings"])  # ... and the user is told
    assert (exported[1]["weights"], exported[1]["form"]) == ("f32", "idefics3")


CONVERSATIONS = {
    "text": ([Turn("user", "What is on the table?")], []),
    "one tile": ([Turn("user", "What is it?", (0,))], [picture(1, (60, 60))]),
    "slices": ([Turn("system", "Be brief."), Turn("user", "Count them.", (0,))], [picture(2)]),
    "two images": (
        [Turn("user", "What?", (0,)), Turn("assistant", "A star."), Turn("user", "And here?", (1,))],
        [picture(2), picture(3, (72, 150))],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_engine_answers_token_for_token_as_torch_does(engines, name: str) -> None:
    turns, images = CONVERSATIONS[name]
    expected, found = (list(engine.stream(turns, images, max_new_tokens=24)) for engine in engines)
    assert found == expected
    assert any(found)


def test_streams_that_take_turns_do_not_disturb_one_another(engines) -> None:
    _, engine = engines
    questions = [CONVERSATIONS[name] for name in ("slices", "one tile")]
    alone = engine.answer_batch(questions, max_new_tokens=12)
    streams = [engine.stream(turns, images, max_new_tokens=12) for turns, images in questions]
    together = ["", ""]
    running = {0, 1}
    while running:
        for number in sorted(running):
            piece = next(streams[number], None)
            if piece is None:
                running.remove(number)
            else:
                together[number] += piece
    assert together == alone


def test_conversations_in_threads_have_a_kv_cache_each(exported, engines, monkeypatch) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine

    engine = LlamaCppEngine(exported[0], kv="f32", tower="torch", conversations=2, context_tokens=256)
    questions = [CONVERSATIONS[name] for name in ("slices", "two images")]
    expected = [engines[1].answer(turns, images, max_new_tokens=12) for turns, images in questions]
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        turns, images = questions[number]
        found[number] = engine.answer(turns, images, max_new_tokens=12)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected
    for number, (turns, images) in enumerate(questions):  # neither was read a second time, nor lost its cache
        again = engine.generate(turns, images, max_new_tokens=12)
        assert "".join(piece.text for piece in again) == expected[number]
        # whole blocks of the last run are kept, and more than one token is left (engines/batched.py)
        assert 2 <= again.counts.prompt_tokens - again.counts.cached_tokens <= 5
    engine.llm.close()


def test_a_second_question_reads_neither_the_image_nor_its_prompt_again(engines, monkeypatch) -> None:
    _, engine = engines
    image = picture(7)
    engine.answer([Turn("user", "What is it?", (0,))], [image], max_new_tokens=2)
    read = []
    original = engine.llm.read
    monkeypatch.setattr(
        engine.llm, "read", lambda position, new, **where: read.append(new) or original(position, new, **where)
    )
    monkeypatch.setattr(engine.vision, "encode", lambda _: pytest.fail("the tower ran again"))
    engine.answer([Turn("user", "How many?", (0,))], [image], max_new_tokens=2)
    assert not any(isinstance(new, np.ndarray) for new in read)


def test_features_of_the_cache_give_the_answer_that_the_image_gives(engines) -> None:
    ours, engine = engines
    image = picture(4)
    turns = [Turn("user", "What is it?", (0,))]
    seen = ours.features_of(image)
    assert engine.answer(turns, [seen], max_new_tokens=12) == engine.answer(turns, [image], max_new_tokens=12)
    with pytest.raises(PromptError, match="use the cache that was made for this model"):
        engine.answer(turns, [ImageFeatures(seen.features[:, :-1], seen.grid)], max_new_tokens=2)


def test_a_prompt_over_the_context_is_refused_before_any_output(exported, engines) -> None:
    with pytest.raises(PromptError, match="the model's context"):
        engines[1].stream([Turn("user", "What?")], max_new_tokens=engines[1].context_tokens)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_smaller_kv_cache_still_answers(exported, kv: str) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine

    engine = LlamaCppEngine(exported[0], kv=kv, tower="torch", context_tokens=256)
    turns, images = CONVERSATIONS["slices"]
    assert engine.answer(turns, images, max_new_tokens=8)
    assert engine.context_tokens == 256
    engine.llm.close()


def test_kv_and_context_of_the_command_line_reach_llama_cpp(exported, tmp_path: Path, monkeypatch, capsys) -> None:
    from llama3v.engines import llamacpp

    opened = []
    original = llamacpp.Llama
    monkeypatch.setattr(llamacpp, "Llama", lambda path, **how: opened.append(how) or original(path, **how))
    picture(1).save(tmp_path / "photo.png")
    options = ["--model", str(exported[0]), "--kv", "f32", "--context", "300", "--max-new-tokens", "4"]
    assert main(["ask", "What?", *options]) == 0
    assert main(["caption", str(tmp_path / "photo.png"), *options]) == 0
    assert [how["kv"] for how in opened] == ["f32", "f32"]
    assert all(how["context_tokens"] < 300 for how in opened)  # no more than the question needs
    assert main(["ask", "What? " * 200, *options]) == 2
    assert opened[-1]["context_tokens"] == 300
    assert "or give --context, up to 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv": "q5_1"}, "one of f32, f16, q8_0, q4_0, found q5_1"),
        ({"context_tokens": 100_000}, "at most 1024 tokens, for which this model was trained"),
        ({"context_tokens": 0}, "1 token or more"),
    ],
)
def test_a_kv_cache_that_cannot_be_is_refused_in_one_line(exported, options: dict, reason: str) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine

    with pytest.raises(ConfigError, match=reason):
        LlamaCppEngine(exported[0], tower="torch", **options)


def test_an_engine_with_room_for_one_question_answers_it_as_a_large_one_does(exported, engines) -> None:
    from llama3v.engines.base import Room
    from llama3v.engines.llamacpp import LlamaCppEngine

    turns, images = CONVERSATIONS["slices"]
    text = "".join(turn.text for turn in turns)
    engine = LlamaCppEngine(exported[0], kv="f32", tower="torch", room=Room(len(images), len(text.encode()), 12))
    assert engine.context_tokens < engines[1].context_tokens
    assert engine.answer(turns, images, max_new_tokens=12) == engines[1].answer(turns, images, max_new_tokens=12)
    engine.llm.close()


def test_ask_runs_a_pair_by_its_directory(exported, tmp_path: Path, capsys) -> None:
    picture(1).save(tmp_path / "photo.png")
    question = (str(tmp_path / "photo.png"), "What is it?")
    summary = ask(AskConfig(inputs=question, model=str(exported[0]), max_new_tokens=8))
    assert capsys.readouterr().out.strip() == summary["answer"].strip() != ""


@pytest.mark.parametrize("weights", ["f16", "q8_0", "q4_k_m"])
def test_rounded_weights_stay_close_and_are_smaller(model_dir: Path, exported, tmp_path: Path, weights: str) -> None:
    config = ExportConfig(out=tmp_path / "out", model=str(model_dir), format="gguf", weights=weights, tower="none")
    summary = export(config)
    assert summary["bytes"] < 0.75 * exported[1]["bytes"]
    assert 0 < summary["check"]["logits"] < {"f16": 0.1, "q8_0": 0.5, "q4_k_m": 1.0}[weights]


def test_all_729_tokens_go_through_the_janus_form(tmp_path: Path) -> None:
    model = str(make(tmp_path / "model", 1))
    summary = export(ExportConfig(out=tmp_path / "out", model=model, format="gguf", tower="none"))
    assert summary["form"] == "janus_pro"
    assert summary["check"]["visual_tokens"] < 1e-2
    assert summary["check"]["greedy_equal"] == 3


def test_the_mixture_of_four_bits_follows_llama_cpp(tmp_path: Path) -> None:
    def kind(name: str, shape=(64, 4096), tied: bool = False) -> str:
        return type_of("q4_k_m", name, shape, layers=32, tied=tied)

    assert kind("output.weight") == "Q6_K"
    assert kind("token_embd.weight") == "Q4_K"
    assert kind("token_embd.weight", tied=True) == "Q6_K"
    assert [kind(f"blk.{n}.ffn_down.weight") for n in (0, 4, 6, 31)] == ["Q6_K", "Q4_K", "Q6_K", "Q6_K"]
    assert kind("blk.0.attn_q.weight") == "Q4_K"
    assert kind("blk.0.attn_norm.weight", (4096,)) == "F32"
    assert kind("blk.4.attn_q.weight", (64, 576)) == "Q5_0"
    assert kind("blk.4.attn_q.weight", (64, 30)) == "F16"


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    factors = _rope_factors(config)
    torch.testing.assert_close(torch.from_numpy(factors).double(), plain / scaled.double(), rtol=1e-5, atol=0)
    assert factors.min() == 1
    assert factors.max() == 8


def damaged(source: Path, folder: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "keep", "reason"),
    [
        ("model.gguf", 0.6, "damaged"),
        ("mmproj.gguf", 0.6, "cut short"),
        ("model.gguf", 0, "not a GGUF file"),
        ("mmproj.gguf", None, "no GGUF file"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", 0.6, "cut short"),
    ],
)
def test_a_damaged_or_absent_file_is_one_line(exported, tmp_path: Path, name: str, keep, reason: str) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine

    data = (exported[0] / name).read_bytes()
    content = None if keep is None else data[: int(len(data) * keep)] or b"PK\3\4 a zip"
    folder = damaged(exported[0], tmp_path / "pair", name, content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        LlamaCppEngine(folder)
    assert "\n" not in str(caught.value)


def test_the_halves_in_each_others_place_are_refused(exported, tmp_path: Path) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine

    vision = damaged(exported[0], tmp_path / "a", "mmproj.gguf", (exported[0] / "model.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"no mmproj\.gguf of this package"):
        LlamaCppEngine(vision)
    llm = damaged(exported[0], tmp_path / "b", "model.gguf", (exported[0] / "mmproj.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="no language model"):
        LlamaCppEngine(llm)


def test_a_missing_extra_is_named_before_a_model_is_loaded(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llama3v\[llamacpp\]"):
        export(ExportConfig(out=tmp_path / "out", model=str(model_dir), format="gguf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a server process, which loads the library and the model: more than 20 seconds on a busy machine
def test_what_the_stock_server_answers_depends_on_the_picture(exported, model_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys, time, xllamacpp as x\n"
        "p = x.CommonParams()\n"
        f"p.model.path = {str(exported[0] / 'model.gguf')!r}\n"
        f"p.mmproj.path = {str(exported[0] / 'mmproj.gguf')!r}\n"
        f"p.hostnames, p.port, p.n_ctx, p.n_parallel = ['127.0.0.1'], {port}, 1024, 1\n"
        "server = x.Server(p)\n"
        "time.sleep(600)\n"
    )
    ours = TorchEngine(model_dir, device="cpu")
    side, tokens = ours.tile_size, ours.model.tokens_per_tile
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    try:
        blind = _post(address, _question(None), process)
        one, again, other = (_post(address, _question(picture(seed, (side, side))), process) for seed in (1, 1, 2))
    finally:
        process.kill()
        process.wait()
    assert one["choices"][0]["message"]["content"].strip()
    assert one["usage"]["prompt_tokens"] - blind["usage"]["prompt_tokens"] >= tokens  # and the marks around them
    assert _distance(one, again) < 1e-4
    assert _distance(one, other) > 1e-2
    assert _distance(one, blind) > 1e-2


def _question(image: Image.Image | None) -> dict:
    content: list[dict] = [{"type": "text", "text": "What is it?"}]
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    options = {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 20, "cache_prompt": False}
    return {"messages": [{"role": "user", "content": content}], **options}


def _first_odds(answer: dict) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens."""
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {token["token"]: token["logprob"] for token in first["top_logprobs"]}


def _distance(one: dict, other: dict) -> float:
    """Largest difference of the log-probabilities that two answers have for the same first tokens."""
    left, right = _first_odds(one), _first_odds(other)
    common = left.keys() & right.keys()
    return max((abs(left[name] - right[name]) for name in common), default=float("inf"))


def _post(url: str, body: dict, process: subprocess.Popen) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code != 503:  # which says that it loads the model
                pytest.fail(error.read().decode())
            assert process.poll() is None, process.stdout.read().decode()[-2000:]
            time.sleep(1)
    pytest.fail("the server does not answer")
    return {}
