"""The verb export: where it writes, what it refuses, and what the licence of Llama 3 asks for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError
from llama3v.exporters import card, licence
from llama3v.exporters.hf import _keep_header_apart, foldable_tower
from llama3v.exporters.texts import chat_template
from llama3v.exporters.verbs import export
from llama3v.model.fold import fold_weights, folded_name, grow_rows, padded_positions
from llama3v.model.llama3v import load_model, save_model


def files_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_export_holds_what_stock_programs_read_and_a_summary(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "stock"
    summary = export(ExportConfig(out=out, model=str(tiny_model_dir), check=False))
    assert files_of(out) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "summary.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "check" not in summary
    assert files_of(out.parent) == {"stock"}  # nothing else is left beside it
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [4, 1]  # <|eot_id|>, <|end_of_text|>
    assert "Built with" not in (out / "README.md").read_text()


def test_weights_keep_the_type_in_which_the_model_lies_on_disk(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model_dir)
    save_model(model.to(torch.bfloat16), tokenizer, tmp_path / "model")
    summary = export(ExportConfig(out=tmp_path / "stock", model=str(tmp_path / "model"), check=False))
    assert summary["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_replaces_an_earlier_one_and_an_empty_directory_but_nothing_else(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def run(out: Path, form: str = "smolvlm") -> None:
        export(ExportConfig(out=out, model=str(tiny_model_dir), form=form, check=False))

    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    run(tmp_path / "empty", form="idefics3")
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["model_type"] == "idefics3"

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    before = (tiny_model_dir / "config.json").read_text()
    for out, reason in (
        (tmp_path / "full", "not empty"),
        (tiny_model_dir, "not empty"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            run(out)
    assert files_of(tmp_path / "full") == {"thesis.txt"}
    assert (tiny_model_dir / "config.json").read_text() == before
    assert files_of(tmp_path) == {"empty", "full", "file"}


def test_a_failed_export_leaves_nothing_behind_and_keeps_the_earlier_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stock"
    export(ExportConfig(out=out, model=str(tiny_model_dir), check=False))
    before = (out / "summary.json").read_text()

    def fail(*_):
        raise CheckpointError("the export's features differ")

    monkeypatch.setattr("llama3v.exporters.check.compare", fail)
    with pytest.raises(CheckpointError, match="features differ"):
        export(ExportConfig(out=out, model=str(tiny_model_dir)))
    assert (out / "summary.json").read_text() == before
    assert files_of(tmp_path) == {"stock"}


def test_a_model_that_is_absent_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Llama 3-V at"):
        export(ExportConfig(out=tmp_path / "stock", model=str(tmp_path / "absent")))
    assert files_of(tmp_path) == set()


def test_a_tower_without_a_stock_counterpart_is_refused_in_one_line() -> None:
    model = SimpleNamespace(vision=SimpleNamespace(kind="efficientnet_lite"))
    with pytest.raises(CheckpointError, match="a tower of kind efficientnet_lite has no stock form") as caught:
        foldable_tower(model)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_parameter_names_fold_one_to_one() -> None:
    assert folded_name("vision.layers.10.mlp.fc1.bias", 26) == "model.vision_model.encoder.layers.10.mlp.fc1.bias"
    assert folded_name("projector.blocks.1.mlp.fc1.bias", 26) == "model.vision_model.encoder.layers.27.mlp.fc1.bias"
    assert folded_name("projector.linear.weight", 26) == "model.connector.modality_projection.proj.weight"
    assert folded_name("llm.model.norm.weight", 26) == "model.text_model.norm.weight"
    with pytest.raises(CheckpointError, match="has no place"):
        folded_name("llm.lm_bias", 26)
    weights = {
        "vision.embeddings.position_embedding.weight": torch.ones(9, 2),
        "llm.model.embed_tokens.weight": torch.ones(5, 2),
        "llm.lm_head.weight": torch.ones(5, 2),
    }
    shapes = {name: tuple(w.shape) for name, w in fold_weights(weights, depth=2, grid_side=3, new_tokens=4).items()}
    assert shapes == {
        "model.vision_model.embeddings.position_embedding.weight": (16, 2),
        "model.text_model.embed_tokens.weight": (9, 2),
        "lm_head.weight": (9, 2),
    }


def test_the_position_border_is_zero_and_lies_to_the_right_and_below() -> None:
    padded = padded_positions(torch.arange(1.0, 5.0).view(4, 1), 2).view(3, 3)
    assert padded.tolist() == [[1, 2, 0], [3, 4, 0], [0, 0, 0]]


def test_grown_rows_are_the_mean_and_leave_the_rest_alone() -> None:
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    grown = grow_rows(table, 2)
    assert torch.equal(grown[:7], table)
    torch.testing.assert_close(grown[7:], table.mean(0).expand(2, 3))


@pytest.mark.parametrize(
    ("vocabulary", "begin", "rope", "base", "sentence"),
    [
        (128256, 128000, {"rope_type": "default"}, "Meta Llama 3", "Built with Meta Llama 3"),
        (128256, 128000, {"rope_type": "llama3", "factor": 8.0}, "Llama 3.1", "Built with Llama"),
        (128256, 128000, {"rope_type": "llama3", "factor": 32.0}, "Llama 3.2", "Built with Llama"),
        (128256, 5, {}, None, None),
        (49152, 128000, {}, None, None),
    ],
)
def test_a_llama_3_is_known_by_its_vocabulary_and_its_licence_is_kept(vocabulary, begin, rope, base, sentence) -> None:
    config = SimpleNamespace(vocab_size=vocabulary, rope_parameters=rope)
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: begin)
    assert licence.base_of(config, tokenizer) == base
    assert licence.built_with(base) == sentence
    warnings = licence.warnings(base, Path("runs/my-model"))
    assert len(warnings) == (0 if base is None else 1)
    assert licence.warnings(base, Path("runs/Llama-3-V")) == []
    if base is not None:
        assert licence.notice(base).startswith(f"{base} is licensed under the {base} Community License, Copyright ©")


def test_the_line_breaks_after_a_header_stay_one_piece_in_an_exported_tokenizer() -> None:
    vocabulary = {"Ċ": 0, "ĊĊ": 1, "A": 2, "B": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("\n\nA").ids == [0, 0, 2]  # GPT-2's pattern
    _keep_header_apart(tokenizer)
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.encode("\n\nA").ids == [1, 2]
    assert again.encode("A\n\nB").ids == [2, 0, 0, 3]  # within a text nothing changes
    before = tokenizer.to_str()
    _keep_header_apart(tokenizer)
    assert tokenizer.to_str() == before


@pytest.mark.parametrize("prompt_format", ["llama3", "chatml"])
def test_no_placeholder_is_left_in_a_chat_template(prompt_format: str) -> None:
    template = chat_template(prompt_format)
    assert not any(word in template for word in ("BEGIN", "ROLE", "END_OF_TURN"))


def trained(directory: Path, llm: str, **more: object) -> Path:
    """Two directories with the summaries that two stages leave; returns the second."""
    stages: list[tuple[str, dict]] = [("pretrain", {"vision": "google/siglip-so400m-patch14-384", "llm": llm})]
    stages.append(("sft", {"model": str(directory / "pretrain")}))
    for verb, options in stages:
        (directory / verb).mkdir(parents=True, exist_ok=True)
        options |= {"data": ["/home/me/photos/train.json"], "dollars_per_hour": 2.0, "cache": "/home/me/cache"}
        summary = {
            "verb": verb,
            "policy": "projector+llm",
            "steps": 1000,
            "loss": 2.5,
            "seconds": 5400.0,
            "dollars": 3.0,
        }
        summary |= {"validation_loss": 2.61, "validation_loss_shuffled": 3.4, "environment": {"device": "NVIDIA H100"}}
        (directory / verb / "summary.json").write_text(json.dumps(summary | {"options": options} | more))
    return directory / "sft"


def test_the_card_tells_training_cost_and_base_models_and_nothing_of_the_machine(tmp_path: Path) -> None:
    model = trained(tmp_path / "runs", "meta-llama/Meta-Llama-3-8B-Instruct")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlibrary_name: transformers\n---\n# How to run it\n")
    card.finish_card(out, str(model), "Meta Llama 3")
    text = (out / "README.md").read_text()
    head = text.split("---")[1]
    assert "license: llama3\n" in head
    assert "base_model:\n- google/siglip-so400m-patch14-384\n- meta-llama/Meta-Llama-3-8B-Instruct\n" in head
    assert (
        "| sft (projector+llm) | train.json | 1,000 | 2.500 | 2.610 | 3.400 | 90 minutes | $3.00 at $2 an hour |"
        in text
    )
    assert "In all 3.0 hours and $6.00, on NVIDIA H100." in text
    assert "vision tower: google/siglip-so400m-patch14-384, Apache License 2.0" in text
    log = json.loads((out / "training.json").read_text())
    assert [run["verb"] for run in log] == ["pretrain", "sft"]
    assert "/home/me" not in text + json.dumps(log)


def test_the_licence_agreement_is_copied_from_beside_the_base_or_asked_for(tmp_path: Path) -> None:
    llm = tmp_path / "Meta-Llama-3-8B-Instruct"
    llm.mkdir()
    model = trained(tmp_path / "runs", str(llm))
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\n---\n")
    (missing,) = card.finish_card(out, str(model), "Meta Llama 3")
    assert "as LICENSE" in missing
    assert (out / "NOTICE").read_text().startswith("Meta Llama 3 is licensed under")
    (llm / "LICENSE").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT ...")
    (llm / "USE_POLICY.md").write_text("# Meta Llama 3 Acceptable Use Policy")
    assert card.finish_card(out, str(model), "Meta Llama 3") == []
    assert (out / "LICENSE").read_text() == (llm / "LICENSE").read_text()
    assert (out / "USE_POLICY.md").is_file()


def test_a_model_without_a_training_log_has_a_card_that_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    export(ExportConfig(out=tmp_path / "stock", model=str(tiny_model_dir), check=False))
    text = (tmp_path / "stock" / "README.md").read_text()
    assert "its data, time and cost are not known" in text
    assert "license: other" in text.split("---")[1]
    assert "language model: not known, under the terms of its publisher" in text
