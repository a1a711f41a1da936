"""kill -9 anywhere, run the same command again: losses and weights are those of the run that was not killed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from training import log_of, losses, make_pictures, start

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.feature_cache.commit import CRASH_VARIABLE

STEPS = 24
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_vision_dir, tiny_llm_dir):
    """A data set in a cache and a stage 1 model."""
    from llama3v.feature_cache.encode import encode

    directory = tmp_path_factory.mktemp("prepared")
    data = make_pictures(directory / "pictures")
    encode(EncodeConfig(data=str(data), vision=str(tiny_vision_dir), cache=directory / "cache", max_tiles=4))
    common = {"data": (str(data),), "cache": directory / "cache", "row_tokens": 128, "rows_per_step": 2}
    options = PretrainConfig(
        out=directory / "stage1",
        vision=str(tiny_vision_dir),
        llm=str(tiny_llm_dir),
        max_tiles=4,
        steps=2,
        **common,
    )
    process = start("pretrain", options)
    process.join()
    assert process.exitcode == 0
    return {**common, "model": str(directory / "stage1"), "validation": str(data)}


def options_of(prepared, out, **changes):
    values = {
        "steps": STEPS,
        "checkpoint_every": 4,
        "validate_every": 6,
        "learning_rate": 1e-2,
        "llm_learning_rate": 1e-2,
        "rows_per_pass": 1,
        **prepared,
        **changes,
    }
    return SftConfig(out=out, **values)


def complete(options):
    process = start("sft", options)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared):
    """The run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert complete(options_of(prepared, out)) == 0
    return out


def steps_done(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not there yet, or a line that is being written
        return 0


def kill_after(options, step, delay, number=signal.SIGKILL):
    """Start, wait until a step is done, and a little more, then kill; returns the exit code."""
    process = start("sft", options)
    while process.is_alive() and steps_done(options.out) < step:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode


def assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, other)]
    for name in ("loss", "validation_loss", "validation_loss_shuffled", "visual_tokens", "supervised_tokens"):
        assert summaries[0][name] == summaries[1][name], name


def test_runs_killed_at_random_moments_end_bit_equal(tmp_path, prepared, whole):
    options = options_of(prepared, tmp_path / "out")
    chance = random.Random(0)
    codes = []
    for step in sorted(chance.sample(range(1, STEPS), 3)):
        codes.append(kill_after(options, step, chance.uniform(0, 0.05)))
    assert codes.count(KILLED) >= 2, codes  # a slow test machine may let the last ones finish
    assert complete(options) == 0
    assert_equal_runs(tmp_path / "out", whole)


# every other moment of a save: tests/unit/test_checkpoint.py
@pytest.mark.slow  # half a minute and more; kills at random moments stay
def test_a_run_killed_inside_a_checkpoint_ends_bit_equal(tmp_path, prepared, whole):
    options = options_of(prepared, tmp_path / "out")
    assert crash_at(options, "checkpoint-optimizer.safetensors:3") == 137
    assert complete(options) == 0
    assert_equal_runs(tmp_path / "out", whole)


def crash_at(options, point):
    process = start("sft", options, {CRASH_VARIABLE: point})
    process.join()
    return process.exitcode


def test_a_damaged_newest_checkpoint_falls_back_and_ends_bit_equal(tmp_path, prepared, whole):
    out = tmp_path / "out"
    options = options_of(prepared, out)
    assert crash_at(options, "checkpoint-latest:4") == 137
    newest = out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()
    assert newest.name == "step-00000016"
    with (newest / "weights.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    assert complete(options) == 0
    assert_equal_runs(out, whole)


def test_sigterm_writes_a_checkpoint_and_leaves_with_one_line(tmp_path, prepared, whole):
    options = options_of(prepared, tmp_path / "out", checkpoint_every=1000)
    assert kill_after(options, 3, 0, signal.SIGTERM) == 128 + signal.SIGTERM
    printed = log_of(options).read_text()
    assert printed.strip().splitlines()[-1].startswith("stopped by SIGTERM after step")
    assert "Traceback" not in printed
    step = steps_done(options.out)
    assert (options.out / "checkpoints" / f"step-{step:08d}").is_dir()
    assert complete(options) == 0
    assert_equal_runs(options.out, whole)


@pytest.mark.slow  # 20 starts of a process
def test_a_sweep_of_twenty_kills_ends_bit_equal(tmp_path, prepared, whole):
    options = options_of(prepared, tmp_path / "out")
    chance = random.Random(1)
    killed = 0
    for _ in range(20):
        # anywhere from loading the model on: also while preparing data, validating or writing the model
        process = start("sft", options)
        time.sleep(chance.uniform(0.3, 4.0))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == KILLED
    print(f"{killed} of 20 starts were killed")
    assert complete(options) == 0
    assert_equal_runs(tmp_path / "out", whole)
