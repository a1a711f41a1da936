"""Adapters and an LLM in few bits: what is saved, merged and released computes what was trained."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from llama3v.config import MergeConfig, SftConfig
from llama3v.engines.torch import TorchEngine
from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters.merge import merge
from llama3v.model.frozen import element_count, hold, release
from llama3v.model.llama3v import load_model, save_model
from llama3v.model.llm import load_llm
from llama3v.model.lora import LoraOptions, add_lora, merge_lora, without_lora
from llama3v.model.on_base import PARTS, load_on_base
from llama3v.model.prompt import Turn
from llama3v.train import stages, start

OPTIONS = LoraOptions(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))


def config_of(model: Path, **changes):
    values = {"data": ("unused",), "mode": "stream", "out": Path("unused"), "lora_rank": 4, "seed": 3, **changes}
    return SftConfig(model=str(model), **values)


def stir(llm):
    """As after training: adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)


def adapted(model: Path, out: Path, **changes):
    """A model with adapters as a run leaves it in memory, saved in `out`."""
    trained, tokenizer = start.trained_model(config_of(model, **changes))
    stir(trained.llm)
    save_model(trained, tokenizer, out)
    return trained


@torch.inference_mode()
def logits(model):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, model.vision.grid_side**2, model.vision.width, generator=generator)
    ids = torch.cat(
        [torch.full((1, 2 * model.tokens_per_tile), model.config.image_token_id), torch.arange(20)[None]], 1
    )
    return model.eval()(input_ids=ids, features=features).logits


@pytest.fixture(scope="module")
def fp32_run(tmp_path_factory, tiny_model_dir):
    out = tmp_path_factory.mktemp("lora") / "stage2"
    return adapted(tiny_model_dir, out), out


def test_adapters_start_as_nothing_and_the_same_seed_gives_the_same(tiny_model_dir):
    plain, _ = load_model(tiny_model_dir)
    one, other = (start.trained_model(config_of(tiny_model_dir))[0] for _ in range(2))
    assert torch.equal(logits(plain), logits(one))
    weights = dict(other.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in one.named_parameters())


@pytest.mark.parametrize("weights", ["fp32", "nf4", "int8"])
def test_the_directory_of_a_run_computes_what_the_run_computed(tmp_path, tiny_model_dir, weights):
    trained = adapted(tiny_model_dir, tmp_path / "out", llm_weights=weights)
    expected = logits(trained)
    unmerged, _ = load_on_base(tmp_path / "out", merge=False)
    merged, _ = load_model(tmp_path / "out")
    assert torch.equal(logits(unmerged), expected)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    plain = logits(load_model(tiny_model_dir)[0])
    assert (expected - plain).abs().max() > 0.01  # or all of this would prove nothing
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())


def test_bf16_weights_are_those_that_were_trained_beside(tmp_path, tiny_model_dir):
    trained = adapted(tiny_model_dir, tmp_path / "out", llm_weights="bf16", precision="bf16")
    assert trained.llm.model.layers[0].self_attn.k_proj.base_layer.weight.dtype == torch.bfloat16
    assert trained.projector.norm.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for n, p in trained.named_parameters() if "lora" in n)
    loaded, _ = load_on_base(tmp_path / "out", merge=False)
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(parameter.float(), weights[name]) for name, parameter in trained.named_parameters())


def test_the_directory_holds_everything_but_the_frozen_llm(fp32_run):
    from safetensors import safe_open

    _, out = fp32_run
    with safe_open(out / PARTS, framework="pt") as parts:
        assert {name.split(".")[0] for name in parts.keys()} == {"vision", "projector"}  # noqa: SIM118
    assert not list(out.glob("model*.safetensors"))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_peft_itself_loads_the_adapter_on_the_stock_llm(fp32_run):
    from peft import PeftModel

    trained, out = fp32_run
    stock, _ = load_model(start.read_base(out).source)
    theirs = PeftModel.from_pretrained(stock.llm, out / "adapter").eval()
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, trained.llm.eval()(ids).logits)


def test_merge_writes_a_model_that_stands_alone_with_the_adapters_logits(fp32_run, tmp_path, capsys):
    trained, out = fp32_run
    summary = merge(MergeConfig(str(out), out=tmp_path / "merged"))
    assert summary["logits"] < 1e-5
    assert "stands alone" in capsys.readouterr().out
    merged, _ = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=1e-5)
    # to the bit what ask, chat and export make of the directory in memory
    assert torch.equal(logits(merged), logits(load_model(out)[0]))
    assert not (tmp_path / "merged" / "base.json").exists()
    with pytest.raises(CheckpointError, match="nothing to merge"):
        merge(MergeConfig(str(tmp_path / "merged"), out=tmp_path / "again"))
    merge(MergeConfig(str(out), out=tmp_path / "merged", precision="bf16"))  # over an earlier one
    halved, _ = load_model(tmp_path / "merged")
    for name, weight in halved.named_parameters():
        assert torch.equal(weight, merged.get_parameter(name).bfloat16().float())


def test_merge_touches_no_directory_that_holds_something_else(fp32_run, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        merge(MergeConfig(str(fp32_run[1]), out=tmp_path))


def test_the_engine_answers_from_the_directory_as_from_the_merged_model(fp32_run, tmp_path):
    _, out = fp32_run
    merge(MergeConfig(str(out), out=tmp_path / "merged"))
    answers = [
        TorchEngine(path, "cpu").answer([Turn("user", "What is it?")], max_new_tokens=12)
        for path in (out, tmp_path / "merged")
    ]
    assert answers[0] == answers[1]


def test_a_moved_pair_of_directories_still_finds_its_base(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "a" / "stage1")
    trained = adapted(tmp_path / "a" / "stage1", tmp_path / "a" / "stage2")
    (tmp_path / "a").rename(tmp_path / "b")
    torch.testing.assert_close(logits(load_model(tmp_path / "b" / "stage2")[0]), logits(trained), rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "b" / "stage1")
    with pytest.raises(CheckpointError, match=r"stage1, which is not there; .*base\.json"):
        load_model(tmp_path / "b" / "stage2")


def test_another_llm_in_the_place_of_the_base_is_refused(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "stage1")
    adapted(tmp_path / "stage1", tmp_path / "stage2")
    model, tokenizer = load_model(tmp_path / "stage1")
    with torch.no_grad():
        model.llm.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    save_model(model, tokenizer, tmp_path / "stage1")
    with pytest.raises(CheckpointError, match="another one is there now"):
        load_model(tmp_path / "stage2")


@pytest.mark.parametrize("damage", ["weights", "config", "parts", "base"])
def test_a_damaged_directory_is_a_clear_error(tmp_path, fp32_run, damage):
    out = tmp_path / "out"
    shutil.copytree(fp32_run[1], out)
    file = {
        "weights": out / "adapter" / "adapter_model.safetensors",
        "config": out / "adapter" / "adapter_config.json",
        "parts": out / PARTS,
        "base": out / "base.json",
    }[damage]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=str(out)):
        load_model(out)


def test_adapters_on_adapters_are_refused_with_the_command_that_mends_it(fp32_run):
    with pytest.raises(ConfigError, match="llama3v merge"):
        start.trained_model(config_of(fp32_run[1]))
    merged, _ = start.trained_model(config_of(fp32_run[1], lora_rank=0))  # full training goes on from the merged model
    torch.testing.assert_close(logits(merged), logits(fp32_run[0]), rtol=1e-5, atol=1e-5)


def test_a_target_that_matches_nothing_is_an_error_that_names_what_there_is(tiny_model_dir):
    for wrong in ("query", "lm_head"):
        with pytest.raises(ConfigError, match=rf"{wrong} matches no linear layer .* down_proj, gate_proj"):
            start.trained_model(config_of(tiny_model_dir, lora_targets=("q_proj", wrong)))


@pytest.mark.parametrize("policy", ["projector+llm", "llm"])
def test_what_trains_names_the_adapters_and_freezes_the_llm(tiny_model_dir, policy):
    model, _ = start.trained_model(config_of(tiny_model_dir, llm_weights="nf4"))
    lines = stages.what_trains(model, "sft", policy, learning_rate=1e-3, llm_learning_rate=2e-4)
    groups = stages.apply(lines, model)
    rates = {line.pattern: line.learning_rate for line in lines}
    assert rates["llm.*.lora_?.*"] == 2e-4
    assert rates["llm.*"] is None
    trained = {name for group in groups for name in group["names"]}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {".lora_" in name for name in trained if name.startswith("llm.")} == {True}
    assert any(name.startswith("projector.") for name in trained) == (policy == "projector+llm")


def test_parameters_in_four_bits_are_counted_as_what_they_stand_for(tiny_llm_dir):
    llm, _ = load_llm(str(tiny_llm_dir))
    before = {name: parameter.numel() for name, parameter in llm.named_parameters()}
    hold(llm, "nf4")
    assert {name: element_count(parameter) for name, parameter in llm.named_parameters()} == before
    bytes_now = sum(p.nbytes for p in llm.model.layers.parameters())
    assert bytes_now < 0.2 * 4 * sum(before[f"model.layers.{n}"] for n, _ in llm.model.layers.named_parameters())


def test_under_seed_adapters_have_nothing_to_do(tiny_model_dir):
    with pytest.raises(ConfigError, match="seed"):
        config_of(tiny_model_dir, policy="seed")
    model, _ = start.trained_model(config_of(tiny_model_dir))
    with pytest.raises(ConfigError, match="freezes the LLM"):
        stages.what_trains(model, "pretrain", learning_rate=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0, "llm_weights": "nf4"}, "give --lora-rank"),
        ({"llm_weights": "bf16"}, "--precision bf16"),
        ({"lora_rank": -1}, "--lora-rank"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"lora_targets": ()}, "--lora-targets"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_model_dir, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tiny_model_dir, **changes)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_released_weights_are_the_ones_that_were_held(tiny_llm_dir, weights):
    llm, _ = load_llm(str(tiny_llm_dir))
    original, inputs = copy.deepcopy(llm), torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    hold(llm, weights)
    held, held_gradient = outputs_and_gradient(llm, inputs)
    release(llm)
    plain, gradient = outputs_and_gradient(llm, inputs)
    assert torch.equal(plain, held)
    torch.testing.assert_close(gradient, held_gradient)
    assert (outputs_and_gradient(original, inputs)[0] - held).abs().max() > 1e-3


def outputs_and_gradient(llm, inputs):
    inputs = inputs.clone().requires_grad_()
    out = llm(inputs_embeds=inputs).logits
    out.sum().backward()
    return out.detach(), inputs.grad


def test_without_lora_the_llm_is_what_it_was(tiny_llm_dir):
    llm, _ = load_llm(str(tiny_llm_dir))
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        before = llm.eval()(ids).logits
        add_lora(llm, OPTIONS)
        stir(llm)
        with without_lora(llm):
            assert torch.equal(llm(ids).logits, before)
        assert not torch.equal(llm(ids).logits, before)
        merge_lora(llm)
    assert json.dumps(sorted(dict(llm.named_parameters()))).count("lora") == 0


@pytest.mark.parametrize("library", ["peft", "bitsandbytes"])
def test_a_missing_library_is_an_error_that_names_the_extra(tiny_model_dir, monkeypatch, library):
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"llama3v\[lora\]"):
        start.trained_model(config_of(tiny_model_dir, llm_weights="nf4"))
