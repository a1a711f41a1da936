"""llama3v doctor: what it says of a machine. What it measures is small here, or replaced."""

import json
import tomllib
from pathlib import Path

import pytest

from llama3v.cli import main
from llama3v.diagnosis import machine, measure
from llama3v.diagnosis.verb import LLMS, models

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "products", lambda: {"fp32": 1e11, "bf16": 2e11})
    monkeypatch.setattr(measure, "bandwidth", lambda device=None: 2e10)
    refused = "the engine openvino is not installed (there is no module openvino): pip install 'llama3v[openvino]'"
    monkeypatch.setattr(measure, "towers", lambda seconds: {"torch": 6.0, "openvino": refused})
    monkeypatch.setattr(measure, "decoders", lambda: {"torch": 70.0, "llamacpp": 600.0, "mlx": "broken: [red]"})
    wanted = [
        "openvino>=1; extra == 'openvino'",
        "numpy>=1; extra == 'parquet'",
        "numpy==0.1; extra == 'ray'",
        "rich>=1",
    ]
    wanted[0] = "no-such-package>=1; extra == 'openvino'"
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)


def test_json_has_every_part_and_the_command_for_what_is_missing(quick, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["memory"] >= report["machine"]["memory_available"] > 0
    assert report["extras"]["openvino"] == {
        "missing": ["no-such-package"],
        "command": "pip install 'llama3v[openvino]'",
    }
    assert report["extras"]["parquet"]["missing"] == []
    assert report["extras"]["ray"]["missing"][0].startswith("numpy==0.1 (found ")  # another version than is needed
    assert report["tokens_per_second"]["llamacpp"] == 600.0


def test_the_tables_say_how_fast_and_what_to_install(quick, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "100 GFLOP/s in fp32, 200 in bf16",
        "20.0 GB/s",
        "600 tokens/s",
        "6 s",
        "pip install 'llama3v[openvino]'",
    ):
        assert words in out
    assert "broken: [red]" in out  # as it is, not as markup


def test_a_model_that_does_not_fit_is_said_not_to() -> None:
    found = models((8e9, 1e10), (8e9, 1e10))
    assert found["Llama 3 8B"]["bf16"] is None
    assert found["Llama 3 8B"]["q4_k_m"] == pytest.approx(1e10 / (8.03e9 * 0.61))
    assert set(found) == set(LLMS)


def test_gguf_formats_are_judged_by_main_memory_and_bf16_by_the_gpus() -> None:
    found = models((64e9, 2e10), (8e9, 1e12))
    assert found["Llama 3 8B"]["bf16"] is None
    assert found["Llama 3 8B"]["q8_0"] == pytest.approx(2e10 / (8.03e9 * 1.0625))
    assert found["Llama 3.2 1B"]["bf16"] == pytest.approx(1e12 / (1.24e9 * 2))
    assert models((4e9, 2e10), (80e9, 1e12))["Llama 3 8B"]["q4_k_m"] is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_is_the_memory_that_there_is(tmp_path: Path, version: int) -> None:
    whole = machine.memory(tmp_path)
    folder, limit, taken = (tmp_path, "memory.max", "anon")
    if version == 1:
        folder, limit, taken = (tmp_path / "memory", "memory.limit_in_bytes", "total_rss")
        folder.mkdir()
    (folder / "memory.stat").write_text(f"{taken} 300000000\nfile 5000000000\n")
    (folder / limit).write_text("1000000000\n")
    assert machine.memory(tmp_path) == (1_000_000_000, 700_000_000)
    (folder / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert machine.memory(tmp_path)[0] == whole[0]


def test_towers_and_decoders_are_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"tile_size": 42, "patch_size": 14, "width": 32, "heads": 2, "mlp_size": 64}
    monkeypatch.setattr(measure, "SO400M", tiny)
    for found in (measure.towers(0.01), measure.decoders()):
        assert found["torch"] > 0  # everywhere
        told = [value for value in found.values() if isinstance(value, str)]
        assert all("not installed" in reason for reason in told)
        assert all(value > 0 for value in found.values() if not isinstance(value, str))


def test_every_extra_for_users_is_described() -> None:
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(machine.USES) == set(offered) - {"benchmarks", "dev"}


def test_fewer_threads_than_cores_is_told() -> None:
    found = {"accelerator": "a GPU", "threads": 1, "cores": 8, "versions": {"torch": "2"}}
    assert machine.advice(found) == ["PyTorch uses 1 of 8 cores: unset OMP_NUM_THREADS, or set it to 8"]
    assert machine.advice(found | {"threads": 8}) == []


def test_bandwidth_is_a_number() -> None:
    assert measure.bandwidth() > 1e8
