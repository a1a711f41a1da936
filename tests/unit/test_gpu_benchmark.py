"""benchmarks/gpu runs on a machine where hardly anything is installed, and loses nothing that it has measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_machine import link_packages

ROOT = Path(__file__).parents[2]
INSTALLED = ("torch", "transformers", "safetensors", "numpy", "pillow")


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def run(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark in a Python that finds packages in one directory only (-S: none of the environment's)."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--shape", "tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_it_needs_five_packages_and_what_these_require(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    there = link_packages(packages, INSTALLED, without=("rich",))  # transformers' command line brings it along
    assert not {"rich", "tyro", "xxhash", "pyarrow", "matplotlib", "peft", "llama3v"} & set(there)
    results = tmp_path / "gpu.json"
    parts = ("gemm", "encode", "stage1", "stage2-full", "stage2-lora")
    done = run(packages, "--in-one-process", "--json", str(results), "--parts", *parts)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(results.read_text())
    assert found["missing"] == {}
    assert set(found["figures"]) == set(parts)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["the whole run, full fine-tuning"]["ours"] > 0
    assert rows["the whole run, LoRA"]["unit"] == "dollars"
    assert all(rows[f"{part}: tokens/s"]["ours"] > 0 for part in parts[2:])
    shares = found["figures"]["stage1"]["kernels"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow  # every part in a process of its own, two of them with a C++ compiler at work: some minutes
@pytest.mark.timeout(1800)
def test_every_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import main
    from benchmarks.gpu.parts import PARTS

    results = tmp_path / "gpu.json"
    main(["--shape", "tiny", "--minutes", "25", "--json", str(results)])
    found = json.loads(results.read_text())
    assert found["missing"] == {}
    assert set(found["figures"]) == {part.name for part in PARTS}


def test_what_does_not_fit_into_the_time_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import main
    from benchmarks.gpu.parts import PARTS

    results = tmp_path / "gpu.json"
    main(["--minutes", "0.2", "--json", str(results)])
    missing = json.loads(results.read_text())["missing"]
    assert set(missing) == {part.name for part in PARTS}
    assert all(reason.startswith("left out: ") for reason in missing.values())


def test_the_whole_of_it_is_expected_to_take_less_than_nine_minutes() -> None:
    from benchmarks.gpu.__main__ import RESERVE, main
    from benchmarks.gpu.parts import PARTS

    assert main.__module__ == "benchmarks.gpu.__main__"
    important = [part for part in PARTS if not part.compiled and not (part.training and part.training.compiled)]
    assert sum(part.seconds for part in important) + RESERVE < 8.5 * 60


def test_a_part_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import _in_a_process
    from benchmarks.gpu.parts import Part

    figures = _in_a_process(Part("no such part", 1, "gemm"), "tiny", tmp_path, seconds=60)
    assert "code 2" in figures["error"]
    assert "no such part" in figures["error"]


def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import _in_a_process
    from benchmarks.gpu.parts import PARTS

    assert "ended after 0 s" in _in_a_process(PARTS[0], "tiny", tmp_path, seconds=0.01)["error"]


def test_a_pass_that_is_too_large_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu import training
    from benchmarks.gpu.parts import Training
    from benchmarks.gpu.setting import SETTINGS

    class Run:
        def __init__(self, training: Training, setting: Any, device: Any, rows: int, row_tokens: int) -> None:
            self.size = (rows, row_tokens)

        def measure(self) -> dict[str, Any]:
            if self.size != (1, 2048):
                raise torch.OutOfMemoryError("too large")
            return {"size": self.size}

    monkeypatch.setattr(training, "_Run", Run)
    found = training.measure_training(Training(2, "full", "bf16"), SETTINGS["llama3-8b"], torch.device("cpu"))
    assert found == {"size": (1, 2048), "too_large": ["4 x 4096", "2 x 4096", "1 x 4096"]}


def test_the_price_of_the_whole_run_is_that_of_its_fastest_parts() -> None:
    from benchmarks.gpu.rows import _dollar_rows

    figures = {
        "encode": {"tiles_per_second": 100.0},
        "encode-compiled": {"tiles_per_second": 7.6e6 / 3600},  # an hour
        "stage1": {"samples_per_second": 600_000 / 7200},  # two
        "stage1-compiled": {"error": "out of memory"},
        "stage2-full": {"samples_per_second": 1e6 / 36_000},  # ten
    }
    (row,) = _dollar_rows(figures, 2.0)
    assert row["name"] == "the whole run, full fine-tuning"
    assert row["ours"] == pytest.approx(26)
    assert "encode-compiled" in row["note"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_poi_fused_mul_silu_0", "compiled element-wise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor>",
            "element-wise, norms and the rest",
        ),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, kind: str) -> None:
    from benchmarks.gpu.kernels import kind_of

    assert kind_of(kernel) == kind
