"""Every encode engine gives the features that torch gives on the CPU in fp32."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from llama3v.config import Precision
from llama3v.errors import ConfigError
from llama3v.feature_cache.encoders import base, choose
from llama3v.feature_cache.encoders.base import NormalisedTrunk, TrunkEncoder, tiles_per_pass
from llama3v.feature_cache.encoders.choose import open_encoder, picture, relative_error, require_engine
from llama3v.model.tiles import to_pixels
from llama3v.model.vision import VisionTower, load_tower

BATCH_TILES = 4
EXTRAS = ("openvino", "onnxruntime", "mlx")
TOWERS = ("tiny", "tiny, cut at 1", "scenes")
# fp32: another order of additions. bf16: 8 bits of mantissa, through all layers.
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.2}  # of any value, relative to the features' root mean square
LEAST_COSINE = {"fp32": 0.99999, "bf16": 0.999}  # of any patch


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # for OpenVINO


def engines(*, also_compiled: bool = True) -> list:
    """Every engine; those that need a compiler for half a minute are slow."""
    compiled = [pytest.param("torch-compile", marks=pytest.mark.slow)] if also_compiled else []
    return ["torch", *compiled, *EXTRAS]


@pytest.fixture(scope="module")
def towers(tiny_vision_dir: Path) -> dict[str, VisionTower]:
    return {
        "tiny": load_tower(str(tiny_vision_dir)),
        "tiny, cut at 1": load_tower(str(tiny_vision_dir), cut=1),
        "scenes": load_tower(str(files("llama3v") / "assets/siglip-scenes")),
    }


def open_or_skip(engine: str, tower: VisionTower, precision: Precision = "fp32") -> TrunkEncoder:
    try:
        require_engine(engine)  # type: ignore[arg-type]
    except ConfigError as error:
        pytest.skip(str(error))
    return open_encoder(engine, tower, precision=precision, batch_tiles=BATCH_TILES)  # type: ignore[arg-type]


def in_fp32(tower: VisionTower, tiles: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return tower.trunk(to_pixels(tiles, tower.mean, tower.std))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", TOWERS)
@pytest.mark.parametrize("engine", engines())
def test_features_are_those_of_torch_in_fp32(
    towers: dict[str, VisionTower], engine: str, which: str, precision: Precision
) -> None:
    if (engine, precision) == ("onnxruntime", "bf16"):
        pytest.skip("onnxruntime computes in fp32")
    tower = towers[which]
    encoder = open_or_skip(engine, tower, precision)
    tiles = picture(encoder.tiles_in_pass, tower.tile_size)
    found, expected = encoder.encode_pass(tiles).float().cpu(), in_fp32(tower, tiles)
    assert found.shape == expected.shape == (len(tiles), tower.grid_side**2, tower.width)
    difference = (found - expected).abs().max() / expected.square().mean().sqrt()
    assert difference < LARGEST_DIFFERENCE[precision]
    assert torch.cosine_similarity(found, expected, dim=-1).min() > LEAST_COSINE[precision]
    assert (encoder.name, encoder.precision) == (engine, precision)


@pytest.mark.parametrize("engine", engines(also_compiled=False))
def test_a_tiles_features_depend_neither_on_its_neighbours_nor_on_its_place(
    towers: dict[str, VisionTower], engine: str
) -> None:
    """So a pass that was interrupted, whose later batches hold other tiles, leaves the same bits."""
    tower = towers["scenes"]
    encoder = open_or_skip(engine, tower)
    tiles = picture(2 * BATCH_TILES, tower.tile_size)
    features = torch.cat([encoder.encode(tiles[:BATCH_TILES]), encoder.encode(tiles[BATCH_TILES:])])
    order = np.roll(np.arange(len(tiles)), 3)
    moved = torch.cat([encoder.encode(tiles[order][:BATCH_TILES]), encoder.encode(tiles[order][BATCH_TILES:])])
    assert features.dtype == torch.bfloat16
    assert torch.equal(moved, features[torch.from_numpy(order)])


@pytest.mark.parametrize("engine", EXTRAS)
def test_an_engine_that_is_not_installed_names_its_extra(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=rf"pip install 'llama3v\[{engine}\]', or give --engine torch"):
        require_engine(engine)  # type: ignore[arg-type]


def test_an_engine_that_computes_something_else_is_refused(
    towers: dict[str, VisionTower], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base.TrunkEncoder.encode
    monkeypatch.setattr(base.TrunkEncoder, "encode", lambda encoder, tiles: real(encoder, tiles) * 1.2)
    with pytest.raises(ConfigError, match=r"differ from torch's by 20.*expected at most 1%"):
        open_encoder("torch", towers["tiny"], precision="fp32", batch_tiles=BATCH_TILES)
    monkeypatch.setattr(base.TrunkEncoder, "encode", lambda encoder, tiles: real(encoder, tiles) / 0)
    with pytest.raises(ConfigError, match="does not compute this tower's features"):
        open_encoder("torch", towers["tiny"], precision="fp32", batch_tiles=BATCH_TILES)


def test_auto_takes_the_fastest_and_says_in_one_line_what_it_measured(
    towers: dict[str, VisionTower], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "_SECONDS_TO_MEASURE", 0.0)
    encoder = open_encoder("auto", towers["tiny"], precision="fp32", batch_tiles=BATCH_TILES)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"engine {encoder.name} (fp32, ")
    assert "tiles/s" in line
    for engine in ("torch", *EXTRAS):
        assert engine in line  # measured, or left out with the reason
    speeds = {"torch": 1.0, "onnxruntime": 3.0, "openvino": 2.0}
    monkeypatch.setattr(choose, "tiles_per_second", lambda encoder, tile_size: speeds.get(encoder.name, 0.5))
    monkeypatch.setattr(choose, "_can_import", lambda engine: engine == "torch")
    monkeypatch.setattr(choose, "_candidates", lambda: ["openvino", "torch"])
    real = choose._open
    monkeypatch.setattr(choose, "_open", lambda name, *rest: real("torch", *rest) if name == "torch" else absent())
    assert open_encoder("auto", towers["tiny"], precision="fp32", batch_tiles=BATCH_TILES).name == "torch"
    assert "left out: openvino (not installed)" in capsys.readouterr().err


def absent() -> None:
    raise ConfigError("the engine is not installed")


def test_onnxruntime_says_that_it_has_no_bf16(towers: dict[str, VisionTower]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(ConfigError, match="computes in fp32, not bf16; give --precision fp32"):
        open_encoder("onnxruntime", towers["tiny"], precision="bf16", batch_tiles=BATCH_TILES)


@pytest.mark.parametrize("engine", ["onnxruntime", "mlx"])
def test_an_engine_written_for_siglip_refuses_another_tower(engine: str) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the EfficientNet packages are not installed")
    with pytest.raises(ConfigError, match=f"{engine} runs SigLIP towers.*efficientnet_lite; give --engine torch"):
        open_or_skip(engine, load_tower("efficientnet_lite0"))


def test_openvino_runs_a_tower_of_another_kind() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the EfficientNet packages are not installed")
    tower = load_tower("efficientnet_lite0")
    encoder = open_or_skip("openvino", tower)
    tiles = picture(BATCH_TILES, tower.tile_size)
    assert relative_error(encoder.encode(tiles), in_fp32(tower, tiles)) < 0.005


def test_openvino_does_not_load_its_telemetry() -> None:
    """In a process of its own: another test may have imported OpenVINO first."""
    import subprocess
    import sys

    require_or_skip = "from llama3v.feature_cache.encoders.openvino import _import_openvino as load; load(); "
    code = require_or_skip + "import sys; print(sys.modules['openvino_telemetry'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "No module named 'openvino'" in done.stderr:
        pytest.skip("openvino is not installed")
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.parametrize(
    ("batch_tiles", "patches", "expected"),
    [(16, 729, 1), (16, 196, 4), (16, 36, 16), (5, 9, 5), (7, 400, 1), (1, 1, 1)],
)
def test_passes_divide_the_batch(batch_tiles: int, patches: int, expected: int) -> None:
    assert tiles_per_pass(batch_tiles, patches) == expected


def test_normalisation_inside_is_the_one_of_tiles(towers: dict[str, VisionTower]) -> None:
    tower = towers["scenes"]
    tiles = picture(2, tower.tile_size)
    with torch.no_grad():
        assert torch.equal(NormalisedTrunk(tower)(torch.from_numpy(tiles)), in_fp32(tower, tiles))
