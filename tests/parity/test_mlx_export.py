"""A directory for MLX: mlx-vlm computes from it what this package computes, also in 8 and 4 bits."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters.mlx import convert
from llama3v.exporters.texts import mlx_readme
from llama3v.exporters.verbs import export
from llama3v.model.llama3v import build_model, save_model
from llama3v.recipes.quickstart import SCENE_LLM, SCENE_TOWER

MLX_IS_HERE = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('mlx_vlm')", reason="needs mlx-vlm")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def scenes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tower and the LLM that the package carries: random weights are too sensitive to rounding."""
    directory = tmp_path_factory.mktemp("scenes") / "model"
    save_model(*build_model(str(SCENE_TOWER), str(SCENE_LLM), scale_factor=2), directory)
    return directory


@MLX_IS_HERE
@pytest.mark.slow  # two processes that import mlx-vlm, for seconds each: more than 20 seconds on a busy machine
@pytest.mark.parametrize(("weights", "bits", "limit"), [("f32", None, 1e-3), ("int8", 8, 0.3), ("int4", 4, 1.0)])
def test_mlx_vlm_gives_our_visual_tokens_logits_and_greedy_tokens(
    scenes_model: Path, tmp_path: Path, weights: str, bits: int | None, limit: float
) -> None:
    out = tmp_path / "out"
    summary = export(ExportConfig(out=out, model=str(scenes_model), format="mlx", weights=weights))  # type: ignore[arg-type]
    check = summary["check"]
    if weights == "f32":
        assert check["greedy_equal"] == len(check["cases"]) == 3
    assert check["visual_tokens"] < (1e-4 if weights == "f32" else 5e-2)  # the tower and the projector are in bf16 then
    assert check["logits"] < limit
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization", {}).get("bits") == bits
    with safe_open(out / "model.safetensors", framework="np") as file:
        quantised = {name for name in file.keys() if name.endswith(".scales")}  # noqa: SIM118 - a method, no mapping
    assert bool(quantised) == (bits is not None)
    assert all(name.startswith("language_model") for name in quantised)
    assert "mlx_vlm generate" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_readme_says_that_slices_need_the_model_directory_which_ask_opens() -> None:
    text = " ".join(mlx_readme(384, 81, None).split())
    assert "mlx-vlm does not make them; `llama3v ask --engine mlx` does, with the model directory" in text


def test_a_missing_mlx_vlm_is_named_before_a_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlx-vlm"):
        export(ExportConfig(out=tmp_path / "out", model=str(tiny_model_dir), format="mlx"))
    assert not (tmp_path / "out").exists()


def test_a_width_that_mlx_cannot_quantise_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not divide this LLM's width of 48"):
        convert(tmp_path, tmp_path, weights="int4", hidden=48)
