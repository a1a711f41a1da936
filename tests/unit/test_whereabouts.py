"""What is given in the place of a model: each mistake is one line that says what lies there and what to do."""

import json
import shutil
from pathlib import Path

import pytest

from llama3v.cli import main
from llama3v.errors import CheckpointError
from llama3v.model.llama3v import load_model
from llama3v.model.llm import load_llm
from llama3v.model.vision import load_tower
from llama3v.model.whereabouts import require_model


def said_of(name: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        require_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder(path: Path, **files: str) -> Path:
    """A directory with these files; `__` in a name stands for a dot."""
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_gguf_file_is_told_to_be_given_by_its_directory(tmp_path: Path) -> None:
    pair = folder(tmp_path / "pair", model__gguf="GGUF", mmproj__gguf="GGUF")
    assert said_of(pair / "model.gguf").endswith(f"give its directory, {pair}")
    alone = folder(tmp_path / "alone", model__gguf="GGUF")
    assert "without mmproj.gguf beside it" in said_of(alone / "model.gguf")
    assert f"pretrain --llm {alone / 'model.gguf'}" in said_of(alone / "model.gguf")
    assert "there is model.gguf alone" in said_of(alone)


def test_any_other_file_is_told_to_be_given_by_its_directory(tiny_model_dir: Path) -> None:
    assert said_of(tiny_model_dir / "model.safetensors").endswith(
        f"give the directory of a model, such as {tiny_model_dir}"
    )


@pytest.mark.parametrize(("file", "form"), [("vision.xml", "openvino"), ("vision.onnx", "onnx")])
def test_an_exported_tower_names_the_model_that_it_was_exported_from(tmp_path: Path, file: str, form: str) -> None:
    tower = folder(
        tmp_path / "tower", **{file.replace(".", "__"): "", "summary__json": json.dumps({"model": "runs/a"})}
    )
    assert said_of(tower).endswith(
        f"{file} is a vision tower alone, exported with --format {form}; give the model that it was exported from, runs/a"
    )


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_a_stock_export_is_told_whose_it_is(tmp_path: Path, kind: str) -> None:
    stock = folder(tmp_path / "stock", config__json=json.dumps({"model_type": kind}))
    assert f"holds a {kind!r} model" in said_of(stock)
    assert said_of(stock).endswith("for transformers, vLLM or mlx-vlm; here, give the model that it was exported from")


def test_other_checkpoints_are_told_what_they_are_good_for(tmp_path: Path, tiny_vision_dir: Path) -> None:
    assert f"pretrain --vision {tiny_vision_dir}" in said_of(tiny_vision_dir)
    assert "none that is known here" in said_of(folder(tmp_path / "other", config__json='{"model_type": "bert"}'))
    assert "holds a None model" in said_of(folder(tmp_path / "list", config__json="[1]"))
    assert "no config.json there" in said_of(folder(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["./nope", "../nope/", "/nope", "a/b/c", "~/nope", "nope/"])
def test_a_path_that_leads_nowhere_is_never_taken_for_a_name_of_the_hub(name: str) -> None:
    assert "there is no such directory" in said_of(name)


@pytest.mark.parametrize("name", ["nope", "owner/nope"])
def test_a_name_that_may_be_the_hubs_is_looked_for_there_and_both_places_are_told(name: str, monkeypatch) -> None:
    require_model(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="there is no such directory, and from the hub: "):
        load_model(name)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.6, 0.001, 0])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_cut_short_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, name: str, share: float, capsys
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    cut(model / name, share)
    assert main(["ask", "What is it?", "--model", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(model) in line
    assert "damaged" in line


def test_a_cut_tower_and_a_cut_llm_are_one_line(tiny_vision_dir: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    for source, load in ((tiny_vision_dir, load_tower), (tiny_llm_dir, load_llm)):
        directory = tmp_path / source.name
        shutil.copytree(source, directory)
        cut(directory / "model.safetensors", 0.5)
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            load(str(directory))


def test_weights_of_another_model_than_the_configuration_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["intermediate_size"] //= 2
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected llm\.model\.layers\.0\.mlp.* use those of one"):
        load_model(tmp_path / "model")
