"""A dry run says what the real run would be, from configuration files and headers of images alone, and writes nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training import make_pictures

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.errors import CacheError, ConfigError
from llama3v.model.frozen import hold
from llama3v.train import run
from llama3v.train.memory import memory_of
from llama3v.train.shapes import LAYERS, VISION, run_on_meta
from llama3v.train.skeleton import skeleton
from llama3v.train.stages import apply, what_trains


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir, tiny_vision_dir, tiny_llm_dir):
    """Data, and models of which only the configuration and the tokenizer are here."""
    directory = tmp_path_factory.mktemp("dry")
    make_pictures(directory / "pictures")
    for name, source in (("model", tiny_model_dir), ("vision", tiny_vision_dir), ("llm", tiny_llm_dir)):
        shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


def common(place: Path, **changes):
    return {
        "data": (str(place / "pictures" / "train.json"),),
        "cache": place / "no-cache",
        "out": place / "out",
        "row_tokens": 128,
        "rows_per_step": 2,
        "epochs": 3.0,
        "dry_run": True,
        **changes,
    }


def stage1(place: Path, **changes):
    models = {"vision": str(place / "vision"), "llm": str(place / "llm"), "max_tiles": 4}
    return PretrainConfig(**{**common(place), **models, **changes})


def stage2(place: Path, **changes):
    return SftConfig(**{**common(place), "model": str(place / "model"), **changes})


def recording():
    return Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: PTH123


def files_below(directory: Path):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (run.pretrain, lambda place: stage1(place)),
        (run.sft, lambda place: stage2(place, lora_rank=4, llm_weights="nf4")),
    ],
)
def test_it_needs_no_weights_writes_nothing_and_takes_a_real_step(place, verb, config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before, console = files_below(place), recording()
    plan = verb(config(place), console=console)
    assert files_below(place) == before
    assert not list(tmp_path.iterdir())
    assert plan["scaled_down"]["loss"] > 0
    assert plan["scaled_down"]["skipped_steps"] == 0
    printed = console.export_text()
    for words in (
        "What would train",
        "optimizer",
        "activations: LLM layers",
        "H100",
        "at an assumed 40%",
        "one real step",
    ):
        assert words in printed


def test_the_plan_is_that_of_the_run_itself(place, tmp_path, tiny_vision_dir, tiny_llm_dir):
    from llama3v.feature_cache.encode import encode

    models = {"vision": str(tiny_vision_dir), "llm": str(tiny_llm_dir)}
    plan = run.pretrain(stage1(place), console=recording())
    data = str(place / "pictures" / "train.json")
    encode(EncodeConfig(data=data, vision=str(tiny_vision_dir), cache=tmp_path / "cache", max_tiles=4))
    options = {**models, "cache": tmp_path / "cache", "out": tmp_path / "out", "dry_run": False}
    summary = run.pretrain(stage1(place, **options), console=recording())
    assert plan["what_trains"] == summary["what_trains"]
    assert (plan["samples"], plan["left_out"]) == (summary["samples"], 0)
    assert plan["steps"] == pytest.approx(summary["steps"], abs=1)
    for name in ("visual_tokens", "text_tokens", "supervised_tokens", "tiles"):
        assert plan["per_step"][name] * summary["steps"] == pytest.approx(summary[name], rel=0.1), name


def marked(config, policy="projector+llm"):
    model, _ = skeleton(config)
    stage = "pretrain" if isinstance(config, PretrainConfig) else "sft"
    apply(what_trains(model, stage, policy, learning_rate=1e-3, llm_learning_rate=1e-3), model)
    return model


def test_activations_grow_with_the_rows_and_shrink_under_recompute(place):
    model = marked(stage2(place))
    one, two = (run_on_meta(model, rows=rows, length=128, tiles=4 * rows, supervised=40, bf16=False) for rows in (1, 2))
    assert all(two.parts[part] == pytest.approx(2 * one.parts[part], rel=0.05) for part in (VISION, LAYERS))
    layers = model.config.text_config.num_hidden_layers
    assert one.layer_inputs == layers * 128 * 32 * 4
    assert (
        one.activations(layers=layers, recompute=True)[LAYERS] < one.activations(layers=layers, recompute=False)[LAYERS]
    )
    halved = run_on_meta(model, rows=1, length=128, tiles=4, supervised=40, bf16=True)
    assert halved.parts[LAYERS] < one.parts[LAYERS]
    assert halved.copies > 0
    assert one.copies == 0


def test_what_autograd_keeps_on_the_meta_device_is_what_it_keeps_on_a_cpu(place, tiny_model_dir):
    from llama3v.model.llama3v import load_model
    from llama3v.train.loss import supervised_loss

    kept = run_on_meta(marked(stage2(place)), rows=1, length=128, tiles=4, supervised=40, bf16=False)
    model, _ = load_model(tiny_model_dir)
    apply(what_trains(model, "sft", "projector+llm", learning_rate=1e-3, llm_learning_rate=1e-3), model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(1, 128, dtype=torch.long)
    ids[0, : 4 * model.tokens_per_tile] = model.config.image_token_id
    features = torch.randn(4, model.vision.grid_side**2, model.vision.width)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.llm.model(inputs_embeds=model.embed(ids, features), attention_mask=mask).last_hidden_state
        supervised_loss(hidden[0, :40], ids[0, 40:80] * 0, model.get_output_embeddings().weight, 40)
    found = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert sum(kept.parts.values()) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_the_bytes_of_an_llm_in_few_bits_are_foreseen(weights):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    llm = LlamaForCausalLM(config)

    class Shell(torch.nn.Module):
        vision = projector = torch.nn.Linear(1, 1)

    shell = Shell()
    shell.llm = llm
    foreseen = memory_of(shell, weights, {}, 0).parts["LLM"]
    hold(llm, weights)
    found = sum(parameter.nbytes for parameter in llm.parameters())
    for parameter in llm.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += state.absmax.nbytes + state.state2.absmax.nbytes
    assert foreseen == pytest.approx(found, rel=0.02)


def test_memory_that_gpus_share_is_divided_among_them(place):
    model = marked(stage2(place))
    memory = memory_of(model, "fp32", {"LLM layers": 800}, 0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory.parts["optimizer"] == 8 * trained
    assert memory.parts["gradients"] == 4 * trained
    fixed = memory.parts["activations: LLM layers"] + memory.parts["logits, in chunks"]
    assert memory.on(8) == pytest.approx((memory.total - fixed) / 8 + fixed, abs=8)


def test_mistakes_of_the_run_show_in_the_dry_run(place, tmp_path):
    with pytest.raises(ConfigError, match="matches no linear layer"):
        run.sft(stage2(place, lora_rank=4, lora_targets=("query",)), console=recording())
    with pytest.raises(ConfigError, match="top is empty"):
        run.sft(stage2(place, policy="seed"), console=recording())
    shutil.copy(place / "pictures" / "train.json", tmp_path / "alone.json")
    with pytest.raises(CacheError, match="run it where the images lie"):
        run.sft(stage2(place, data=(str(tmp_path / "alone.json"),)), console=recording())
