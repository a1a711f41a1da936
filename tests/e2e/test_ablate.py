"""`llama3v ablate`: variants differ in what they say and in nothing else; the table is what the trainings measured."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from training import make_pictures

import llama3v
from llama3v.config import AblateConfig, EncodeConfig
from llama3v.errors import CheckpointError, ConfigError
from llama3v.evaluate.ablation_table import interval, student_t, unlike_the_base, verdict
from llama3v.evaluate.variants import parse_variant, parse_variants
from llama3v.model.llama3v import build_model


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_vision_dir: Path, tiny_llm_dir: Path) -> dict:
    root = tmp_path_factory.mktemp("ablation")
    data, held_out = make_pictures(root / "train"), make_pictures(root / "held-out", count=8)
    for each in (data, held_out):
        llama3v.encode(EncodeConfig(data=str(each), vision=str(tiny_vision_dir), cache=root / "cache", max_tiles=0))
    return {
        "data": (str(data),),
        "validation": str(held_out),
        "cache": root / "cache",
        "vision": str(tiny_vision_dir),
        "llm": str(tiny_llm_dir),
        "out": root / "out",
        "pretrain_steps": 2,
        "sft_steps": 2,
        "row_tokens": 72,
        "rows_per_step": 2,
        "seeds": (0, 1),
        "learning_rate": 1e-2,
    }


def test_variants_are_trained_compared_and_not_trained_twice(options: dict, capsys) -> None:
    variants = ("mlp", "no-stage-1")
    summary = llama3v.ablate(AblateConfig(**options, variants=variants))
    rows = {row["name"]: row for row in summary["variants"]}
    assert list(rows) == ["base", *variants]
    printed = capsys.readouterr().out
    assert all(f"\n {name} " in printed for name in rows)
    for name, row in rows.items():
        directories = [options["out"] / "stage2" / name / f"seed-{seed}" for seed in (0, 1)]
        measured = [json.loads((directory / "summary.json").read_text()) for directory in directories]
        assert row["loss"]["seeds"] == [one["validation_loss"] for one in measured]
        assert row["loss"]["value"] == pytest.approx(sum(row["loss"]["seeds"]) / 2)
        for count in ("left_out", "validation_samples"):
            assert row[count] == measured[0][count]
        assert row["seen"] == round(sum(one["epochs"] * one["samples"] for one in measured) / 2) > 0
        assert not any((directory / "model.safetensors").exists() for directory in directories)
    difference = rows["mlp"]["loss"]["difference"]
    assert difference["value"] == pytest.approx(rows["mlp"]["loss"]["value"] - rows["base"]["loss"]["value"])
    assert difference["low"] < difference["value"] < difference["high"]
    assert len({tuple(row["loss"]["seeds"]) for row in rows.values()}) == 3  # each did something
    assert {path.name for path in (options["out"] / "stage1").iterdir()} == {
        "base",
        "projector_blocks-0+projector_head-mlp",
        "untrained+base",
    }
    page = (options["out"] / "ablation.html").read_text()
    assert "no-stage-1" in page

    before = (options["out"] / "stage2" / "mlp" / "seed-0" / "summary.json").stat().st_mtime_ns
    again = llama3v.ablate(AblateConfig(**options, variants=("mlp", "policy=llm")))
    assert (options["out"] / "stage2" / "mlp" / "seed-0" / "summary.json").stat().st_mtime_ns == before
    assert [row["name"] for row in again["variants"]] == ["base", "mlp", "policy=llm"]
    assert len(list((options["out"] / "stage1").iterdir())) == 3  # what differs in stage 2 only shares stage 1
    assert again["variants"][1]["loss"] == rows["mlp"]["loss"]
    with pytest.raises(CheckpointError, match="steps was 2, now 3"):
        llama3v.ablate(AblateConfig(**{**options, "sft_steps": 3}, variants=("mlp",)))


def test_a_codec_is_compared_with_the_default_one_where_the_cache_holds_both(options: dict, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(options["cache"], cache)
    options = options | {"cache": cache, "out": tmp_path / "out", "sft_steps": 1, "pretrain_steps": 1, "seeds": (0,)}
    for data in (*options["data"], options["validation"]):
        llama3v.encode(EncodeConfig(data=data, vision=options["vision"], cache=cache, max_tiles=0, codec="int8"))
    llama3v.ablate(AblateConfig(**options, variants=("codec=int8",)))
    for stage, base in (("stage1", "base"), ("stage2", "base")):
        summary = json.loads((options["out"] / stage / base / "seed-0" / "summary.json").read_text())
        assert summary["options"]["codec"] == "bf16"
    losses = [row["loss"]["value"] for row in json.loads((options["out"] / "ablation.json").read_text())["variants"]]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_words_become_options() -> None:
    variant = parse_variant("cut=2+policy=seed+max-tiles=0")
    assert variant.first == {"cut": 2, "max_tiles": 0}
    assert variant.second == {"policy": "seed", "max_tiles": 0}
    assert parse_variant("no-stage-1+linear").stage_1 is False


@pytest.mark.parametrize(
    ("texts", "sft_steps", "message"),
    [
        (("linaer",), 1, "'linaer' in 'linaer' is unknown; use linear, mlp, blocks=..."),
        (("blocks=two",), 1, "expected a whole number after blocks=, found 'two'"),
        (("policy=all",), 1, r"expected one of projector\+llm, llm, seed after policy="),
        (("linear+blocks=1",), 1, "sets projector_blocks twice"),
        (("mlp", "mlp"), 1, "'mlp' is there twice"),
        (("policy=llm",), 0, "is about stage 2, which has no steps; give --sft-steps"),
        (("no-stage-1",), 0, "is about stage 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(texts, sft_steps, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_variants(texts, sft_steps)


def test_who_trained_on_other_samples_is_named() -> None:
    base = {"name": "base", "seen": 1000, "left_out": 0, "validation_samples": 50}
    alike, longer, left = ({**base, "name": name} for name in ("linear", "r=1", "max-tiles=9"))
    longer["seen"], left["left_out"], left["validation_samples"] = 700, 30, 41
    said = unlike_the_base([base, alike, longer, left])
    assert [sentence.split()[0] for sentence in said] == ["r=1", "max-tiles=9"]
    assert "700" in said[0]
    assert "30" in said[1]
    assert "41" in said[1]


def test_intervals_are_students() -> None:
    # t of two degrees of freedom is 4.303; the deviation of 1, 2, 3 is 1
    assert interval([1.0, 2.0, 3.0]) == {
        "value": 2.0,
        "low": pytest.approx(2 - 4.302653 / math.sqrt(3)),
        "high": pytest.approx(2 + 4.302653 / math.sqrt(3)),
    }
    assert interval([0.5]) == {"value": 0.5, "low": None, "high": None}
    assert verdict(interval([1.0, 2.0, 3.0]), lower_is_better=True) == "within noise"
    assert verdict(interval([1.0, 1.1, 0.9]), lower_is_better=True) == "worse"
    assert verdict(interval([1.0, 1.1, 0.9]), lower_is_better=False) == "better"


def test_quantiles_are_students_for_any_number_of_seeds() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 10: 2.228, 11: 2.201, 20: 2.086, 29: 2.045, 120: 1.980}
    assert {freedom: round(student_t(freedom), 3) for freedom in printed} == printed


def test_an_mlp_starts_with_tokens_as_large_as_text(tiny_vision_dir: Path, tiny_llm_dir: Path) -> None:
    model, _ = build_model(str(tiny_vision_dir), str(tiny_llm_dir), projector_blocks=0, projector_head="mlp")
    projector = model.projector
    features = torch.randn(64, projector.grid_side**2, model.vision.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = projector(features)
    rms = model.get_input_embeddings().weight.square().mean().sqrt()
    assert float(tokens.square().mean().sqrt()) == pytest.approx(float(rms), rel=0.3)


def test_an_mlp_has_no_stock_form(tiny_vision_dir: Path, tiny_llm_dir: Path) -> None:
    from llama3v.exporters.hf import foldable_tower

    model, _ = build_model(str(tiny_vision_dir), str(tiny_llm_dir), projector_head="mlp")
    with pytest.raises(CheckpointError, match="for ablations"):
        foldable_tower(model)
