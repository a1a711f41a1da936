"""The vision tower: it computes what transformers' SigLIP does, and its cut, fingerprint and loading hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.vision import SiglipTower, load_tower, make_tower

TILES = 2


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(TILES, 3, 42, 42, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tower(tiny_vision_dir: Path) -> SiglipTower:
    return load_tower(str(tiny_vision_dir))


def with_weights(source: Path, directory: Path, change) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


@torch.no_grad()
def test_features_are_the_stock_models_penultimate_hidden_states(
    tower: SiglipTower, tiny_vision_dir: Path, pixels: torch.Tensor
) -> None:
    stock = SiglipVisionModel.from_pretrained(tiny_vision_dir).eval()
    states = stock(pixels, output_hidden_states=True).hidden_states  # embeddings, then one for each layer
    assert tower.depth == stock.config.num_hidden_layers - 1
    torch.testing.assert_close(tower(pixels), states[tower.depth], rtol=0, atol=0)


@torch.no_grad()
def test_trunk_and_top_at_every_cut_give_the_same_features(
    tower: SiglipTower, tiny_vision_dir: Path, pixels: torch.Tensor
) -> None:
    whole = tower(pixels)
    for cut in range(tower.depth + 1):
        part = load_tower(str(tiny_vision_dir), cut=cut)
        trunk = part.trunk(pixels)
        assert trunk.shape == whole.shape == (TILES, tower.grid_side**2, tower.width)
        assert torch.equal(part.top(trunk), whole)
        assert torch.equal(trunk, whole) == (cut == tower.depth)


@pytest.mark.parametrize("cut", [-1, 3, 99])
def test_a_cut_that_the_tower_does_not_have_is_refused(tiny_vision_dir: Path, cut: int) -> None:
    with pytest.raises(ConfigError, match="give 0 to 2"):
        load_tower(str(tiny_vision_dir), cut=cut)


def test_the_tower_is_frozen_and_in_evaluation_mode(tower: SiglipTower) -> None:
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_the_fingerprint_changes_with_every_trunk_tensor_and_no_other(tiny_vision_dir: Path) -> None:
    original = load_tower(str(tiny_vision_dir), cut=1).fingerprint()
    for name in load_tower(str(tiny_vision_dir), cut=1).state_dict():
        changed = load_tower(str(tiny_vision_dir), cut=1)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1].add_(1e-3)
        in_the_top = name.startswith("layers.1.")
        assert (changed.fingerprint() == original) == in_the_top, name


def test_the_fingerprint_tells_cuts_apart_and_says_geometry_in_words(tiny_vision_dir: Path) -> None:
    prints = [load_tower(str(tiny_vision_dir), cut=cut).fingerprint() for cut in range(3)]
    assert len({json.dumps(entries) for entries in prints}) == 3
    assert prints[1]["vision.cut"] == "1"
    assert prints[1]["vision.tile_size"] == "42"
    assert prints[1]["vision.patch_size"] == "14"


def test_the_fingerprint_does_not_depend_on_layers_that_are_not_computed(
    tower: SiglipTower, tiny_vision_dir: Path, tmp_path: Path
) -> None:
    def change(weights):
        return {name: value + 1 if "layers.2." in name else value for name, value in weights.items()}

    other = load_tower(str(with_weights(tiny_vision_dir, tmp_path / "other", change)))
    assert other.fingerprint() == tower.fingerprint()


def test_the_fingerprint_is_the_same_for_fp32_and_bf16_copies_of_bf16_weights(tiny_vision_dir: Path) -> None:
    rounded = load_tower(str(tiny_vision_dir)).to(torch.bfloat16)
    assert rounded.fingerprint() == load_tower(str(tiny_vision_dir)).to(torch.bfloat16).float().fingerprint()


@torch.no_grad()
def test_a_whole_siglip_and_its_vision_half_give_the_same_tower(tmp_path: Path, pixels: torch.Tensor) -> None:
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    whole = SiglipModel(
        SiglipConfig(
            vision_config=half | {"image_size": 42, "patch_size": 14},
            text_config=half | {"vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16},
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    SiglipVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "half")
    first, second = load_tower(str(tmp_path / "whole")), load_tower(str(tmp_path / "half"))
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(first(pixels), second(pixels))
    inside = whole.eval().vision_model(pixels, output_hidden_states=True).hidden_states[1]
    assert torch.equal(first(pixels), inside)


def test_a_model_directory_gives_its_own_tower_and_cut(tower: SiglipTower, tiny_model_dir: Path) -> None:
    again = load_tower(str(tiny_model_dir))
    assert again.fingerprint() == tower.fingerprint()
    assert again.cut == tower.cut
    with pytest.raises(ConfigError, match="this model's cut is 2, not 1"):
        load_tower(str(tiny_model_dir), cut=1)


def test_directories_without_a_tower_are_refused_in_one_line(tiny_llm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for directory, reason in (
        (tiny_llm_dir, "its model_type is 'llama'"),
        (tmp_path / "broken", "not valid JSON"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "absent", "cannot be loaded"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_tower(str(directory))
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_tensors_is_refused(tiny_vision_dir: Path, tmp_path: Path) -> None:
    def change(weights):
        return {name: value for name, value in weights.items() if "layers.0.mlp" not in name}

    damaged = with_weights(tiny_vision_dir, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match="lacks"):
        load_tower(str(damaged))


def test_a_siglip_of_other_activations_is_refused(tiny_vision_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(tiny_vision_dir, directory)
    config = json.loads((directory / "config.json").read_text()) | {"hidden_act": "gelu"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gelu_pytorch_tanh"):
        load_tower(str(directory))


def test_an_unknown_kind_of_tower_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown kind of vision tower 'other'"):
        make_tower({"kind": "other"})


def test_an_incomplete_configuration_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="lacks 'tile_size'"):
        make_tower({"kind": "siglip", "width": 64})
