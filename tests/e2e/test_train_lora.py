"""Runs with adapters, and with an LLM in few bits: they train, resume to the bit, and leave a model that answers."""

import json

import pytest
import torch
from rich.console import Console
from training import losses, make_pictures

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.errors import CheckpointError
from llama3v.model.llama3v import load_model
from llama3v.model.lora import LoraOptions
from llama3v.model.on_base import read_base
from llama3v.train import run


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_model_dir):
    from llama3v.feature_cache.encode import encode

    data = make_pictures(tmp_path_factory.mktemp("pictures"))
    cache = tmp_path_factory.mktemp("cache")
    encode(EncodeConfig(data=str(data), vision=str(tiny_model_dir), cache=cache))
    return {"data": (str(data),), "cache": cache, "row_tokens": 128, "rows_per_step": 2, "steps": 12}


@pytest.fixture(scope="module")
def lora_options(options, tiny_model_dir):
    return {
        **options,
        "model": str(tiny_model_dir),
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "llm_learning_rate": 2e-2,
        "checkpoint_every": 5,
        "validation": options["data"][0],
    }


def quiet():
    return Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lora_options):
    out = tmp_path_factory.mktemp("whole") / "out"
    console = quiet()
    summary = run.sft(SftConfig(out=out, **lora_options), console=console)
    return out, summary, console.export_text()


def test_adapters_and_projector_learn_and_the_llm_stands_still(whole, tiny_model_dir):
    out, summary, printed = whole
    assert summary["loss"] < summary["first_loss"] - 0.1
    assert "llm.*.lora_?.*" in printed
    before, after = load_model(tiny_model_dir)[0], load_model(out)[0]
    changed = {name for name, a in before.named_parameters() if not torch.equal(a, after.get_parameter(name))}
    assert {name.split(".")[0] for name in changed} == {"projector", "llm"}
    assert {name.split(".")[-2] for name in changed if name.startswith("llm.")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_a_run_that_was_interrupted_ends_bit_equal(tmp_path, whole, lora_options, monkeypatch):
    real, saves = run.Loop.save, []

    def save(self, *, wait):
        real(self, wait=wait)
        saves.append(self.progress.step)
        if len(saves) == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run.Loop, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run.sft(SftConfig(out=out, **lora_options), console=quiet())
    assert saves == [5]
    summary = run.sft(SftConfig(out=out, **lora_options), console=quiet())
    assert losses(out) == losses(whole[0])
    for name in ("parts.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    assert summary["validation_loss"] == whole[1]["validation_loss"]
    with pytest.raises(CheckpointError, match="lora_rank was 4, now 8"):
        run.sft(SftConfig(out=out, **{**lora_options, "lora_rank": 8}), console=quiet())


@pytest.mark.parametrize(
    "held", [{"llm_weights": "nf4"}, {"llm_weights": "int8"}, {"llm_weights": "bf16", "precision": "bf16"}]
)
def test_adapters_learn_beside_an_llm_in_fewer_bits(tmp_path, lora_options, held):
    config = SftConfig(out=tmp_path / "out", **{**lora_options, "validation": None, "steps": 6, **held})
    summary = run.sft(config, console=quiet())
    assert summary["loss"] < summary["first_loss"] - 0.1
    assert read_base(config.out).weights == held["llm_weights"]


@pytest.fixture(scope="module")
def stage1_in_four_bits(tmp_path_factory, options, tiny_vision_dir, tiny_llm_dir):
    config = PretrainConfig(
        out=tmp_path_factory.mktemp("four-bits") / "stage1",
        vision=str(tiny_vision_dir),
        llm=str(tiny_llm_dir),
        max_tiles=4,
        llm_weights="nf4",
        learning_rate=1e-2,
        **{**options, "steps": 6},
    )
    summary = run.pretrain(config, console=quiet())
    assert summary["loss"] < summary["first_loss"]
    return config.out


def test_stage_2_refers_to_the_llm_itself_and_not_through_stage_1(tmp_path, lora_options, stage1_in_four_bits):
    before = read_base(stage1_in_four_bits)
    assert (before.kind, before.lora) == ("llm", None)
    two = {**lora_options, "model": str(stage1_in_four_bits), "llm_weights": "nf4", "steps": 2, "validation": None}
    run.sft(SftConfig(out=tmp_path, **two), console=quiet())
    assert read_base(tmp_path).source == before.source
    load_model(tmp_path)


def test_a_whole_llm_trains_on_after_a_stage_1_in_four_bits(tmp_path, options, stage1_in_four_bits):
    two = SftConfig(out=tmp_path, model=str(stage1_in_four_bits), **{**options, "steps": 2})
    assert run.sft(two, console=quiet())["finished"]
    assert (tmp_path / "model.safetensors").is_file()


def test_lora_options_are_read_from_the_adapter(whole):
    config = json.loads((whole[0] / "adapter" / "adapter_config.json").read_text())
    assert LoraOptions(config["r"], config["lora_alpha"], config["lora_dropout"], ()) == LoraOptions(4, 8.0, 0.1, ())
