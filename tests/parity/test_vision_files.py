"""Tower and projector as a file for OpenVINO or ONNX Runtime: the same visual tokens, without torch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama3v.config import ExportConfig
from llama3v.engines.torch import TorchEngine
from llama3v.engines.vision_file import FILES, VisionFile
from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters.verbs import export
from llama3v.model.prompt import Turn
from llama3v.model.tiles import make_tiles, normalised, to_pixels

pytest.importorskip("openvino", reason="needs the extra llama3v[openvino]")
pytest.importorskip("onnxruntime", reason="needs the extra llama3v[onnxruntime]")
pytest.importorskip("onnx", reason="needs the extra llama3v[onnxruntime]")
pytestmark = pytest.mark.timeout(900)  # each export starts a process: minutes on a busy machine

FORMATS = {"openvino": "openvino", "onnx": "onnxruntime"}


def picture(seed: int, size: tuple[int, int] = (84, 42)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    folder = tmp_path_factory.mktemp("vision")
    made = {}
    for name in FORMATS:
        out = folder / name
        made[name] = (out, export(ExportConfig(out=out, model=str(tiny_model_dir), format=name)))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_the_runtime_alone_gives_our_visual_tokens_and_with_them_our_answers(exported, name: str) -> None:
    check = exported[name][1]["check"]
    assert check["visual_tokens"] < 1e-4
    assert check["greedy_equal"] == len(check["cases"]) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_slices_go_through_one_by_one_as_they_do_together(exported, tiny_model_dir: Path, name: str) -> None:
    model = TorchEngine(tiny_model_dir, device="cpu").model
    tiles = make_tiles(picture(1), model.vision.tile_size, 4)
    pixels = to_pixels(tiles.pixels, model.vision.mean, model.vision.std)
    assert torch.equal(pixels, torch.from_numpy(normalised(tiles.pixels, model.vision.mean, model.vision.std)))
    with torch.no_grad():
        expected = model.projector(model.vision(pixels)).flatten(0, 1)
    found = VisionFile(exported[name][0], FORMATS[name]).encode(tiles)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_halves_the_file_and_stays_close(exported, tiny_model_dir: Path, tmp_path: Path, name) -> None:
    config = ExportConfig(out=tmp_path / "out", model=str(tiny_model_dir), format=name, weights="f16")
    summary = export(config)
    assert 0 < summary["check"]["visual_tokens"] < 1e-2
    weights = {"openvino": "vision.bin", "onnx": "vision.onnx"}[name]
    assert (tmp_path / "out" / weights).stat().st_size < 0.8 * (exported[name][0] / weights).stat().st_size


@pytest.mark.parametrize("name", FORMATS)
def test_the_readmes_program_runs_without_torch_and_transformers(exported, tmp_path: Path, name: str) -> None:
    directory = exported[name][0]
    program = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.DOTALL)
    assert program is not None
    (tmp_path / "run").mkdir()
    for file in directory.glob("vision.*"):
        shutil.copy(file, tmp_path / "run")
    picture(2).save(tmp_path / "run" / "photo.jpg")
    without = (
        "import sys\nfor name in ('torch', 'transformers', 'llama3v', 'openvino_telemetry'): sys.modules[name] = None\n"
    )
    command = [sys.executable, "-c", without + program[1]]
    run = subprocess.run(command, cwd=tmp_path / "run", capture_output=True, text=True, timeout=240, check=True)
    assert run.stdout.strip() == "(1, 1, 32)"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", ["graph", "weights"])
def test_a_damaged_or_absent_vision_file_is_one_line(exported, tmp_path: Path, name: str, part: str) -> None:
    source, runtime = exported[name][0], FORMATS[name]
    file = tmp_path / FILES[runtime]  # type: ignore[index]
    with pytest.raises(CheckpointError, match=f"no {file.name} in"):
        VisionFile(tmp_path, runtime)  # type: ignore[arg-type]
    for path in source.glob("vision.*"):
        shutil.copy(path, tmp_path)
    damaged = tmp_path / "vision.bin" if (name, part) == ("openvino", "weights") else file
    damaged.write_bytes(damaged.read_bytes()[: {"graph": 900, "weights": -5000}[part]])
    with pytest.raises(CheckpointError, match="damaged or cut short") as caught:
        VisionFile(tmp_path, runtime)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, runtime in FORMATS.items():
        with pytest.raises(ConfigError, match=rf"pip install 'llama3v\[{runtime}\]'"):
            export(ExportConfig(out=tmp_path / "out", model=str(tiny_model_dir), format=name))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


ASK = """
import json, sys
from llama3v.cli import main
code = main(sys.argv[1:])
print(json.dumps([name for name in ("torch", "transformers") if name in sys.modules]), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("name", FORMATS)
def test_asking_a_gguf_pair_with_a_vision_file_never_imports_torch(
    tiny_model_dir: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra llama3v[llamacpp]")
    pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
    pair = tmp_path / "pair"
    config = ExportConfig(out=pair, model=str(tiny_model_dir), format="gguf", tower=name, check=False)  # type: ignore[arg-type]
    assert export(config)["vision_file"] == FILES[FORMATS[name]]  # type: ignore[index]
    picture(3).save(tmp_path / "photo.png")
    question = [str(tmp_path / "photo.png"), "What is it?", "--max-new-tokens", "12"]
    command = [sys.executable, "-c", ASK, "ask", *question, "--model", str(pair), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stderr.splitlines()[-1]) == []
    engine = TorchEngine(tiny_model_dir, device="cpu")
    expected = engine.answer([Turn("user", "What is it?", (0,))], [picture(3)], max_new_tokens=12)
    assert json.loads(run.stdout)["answer"] == expected


def test_a_vision_file_of_another_model_is_refused(exported, tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
    from llama3v.engines.gguf_vision import GgufVision
    from llama3v.exporters.mmproj import write_mmproj
    from llama3v.exporters.vision_files import digest_of

    gguf = pytest.importorskip("gguf")
    model = TorchEngine(tiny_model_dir, device="cpu").model
    shutil.copy(exported["onnx"][0] / "vision.onnx", tmp_path)
    tiles = make_tiles(picture(1), model.vision.tile_size, 4)
    for digest, fits in ((digest_of(model), True), ("another", False)):
        write_mmproj(gguf, model, model.vision, tmp_path / "mmproj.gguf", half=False, digest=digest)
        vision = GgufVision(tmp_path / "mmproj.gguf")
        assert vision.runs_on == "onnxruntime"
        if fits:
            assert vision.encode(tiles).shape == (3 * vision.tokens_per_tile, vision.hidden)
        else:
            with pytest.raises(CheckpointError, match="are of different models"):
                vision.encode(tiles)
