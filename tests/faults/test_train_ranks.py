"""Several processes train one model: the losses do not depend on their number, and no fault of one of them hangs or
harms the others.

Two processes over gloo, as torchrun would start them. What is asked of each fault: a clear stop in bounded time, and
afterwards a run whose losses and weights are those of one that nobody disturbed.
"""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from ranks import environments, join, start_ranks
from training import FAULT_VARIABLE, log_of, losses, make_pictures, start

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.feature_cache.commit import CRASH_VARIABLE

STEPS = 10
KILLED = -signal.SIGKILL
PATIENCE = 20.0  # seconds; on an idle machine all faults show within two


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_vision_dir, tiny_llm_dir):
    """A data set in a cache, with some samples without an image, and a stage 1 model."""
    from llama3v.feature_cache.encode import encode

    directory = tmp_path_factory.mktemp("prepared")
    data = make_pictures(directory / "pictures")
    rows = json.loads(data.read_text())
    for number in range(0, 16, 3):
        text = [("human", f"What is {number}?"), ("gpt", "A number.")]
        turns = [{"from": role, "value": value} for role, value in text]
        rows.append({"id": f"text-{number}", "conversations": turns})
    data.write_text(json.dumps(rows))
    encode(EncodeConfig(data=str(data), vision=str(tiny_vision_dir), cache=directory / "cache", max_tiles=4))
    # rows so short that some passes, of one rank only, have no image
    common = {"data": (str(data),), "cache": directory / "cache", "row_tokens": 72, "rows_per_step": 4}
    stage1 = {"vision": str(tiny_vision_dir), "llm": str(tiny_llm_dir), "max_tiles": 4, "learning_rate": 1e-2}
    options = PretrainConfig(out=directory / "stage1", steps=1, **common, **stage1)
    assert join([start("pretrain", options)]) == [0]
    return {"stage1": {**common, **stage1}, "sft": {**common, "model": str(directory / "stage1")}}


def options_of(prepared, out, verb="sft", **changes):
    common = {"steps": STEPS, "checkpoint_every": 3, "rows_per_pass": 1, "rank_timeout": PATIENCE}
    if verb == "pretrain":
        return PretrainConfig(out=out, **{**common, **prepared["stage1"], **changes})
    rates = {"learning_rate": 1e-2, "llm_learning_rate": 1e-2}
    return SftConfig(out=out, **{**common, **prepared["sft"], **rates, **changes})


def complete(options, ranks=2, verb="sft"):
    codes = join(start_ranks(verb, options, ranks))
    assert codes == [0] * ranks, log_of(options).read_text()[-3000:]


def counts_of(out: Path) -> list[list[int]]:
    """What each step processed, over all ranks."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("visual_tokens", "text_tokens", "supervised_tokens", "tiles")
    return [[record[name] for name in names] for record in records if "loss" in record]


def assert_same_training(one: Path, other: Path, tolerance: float = 2e-4) -> None:
    """Equal order, and losses that differ by the rounding of fp32 only."""
    assert counts_of(one) == counts_of(other)
    assert [step for step, _ in losses(one)] == [step for step, _ in losses(other)]
    for (step, a), (_, b) in zip(losses(one), losses(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance), step


def assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, prepared):
    """One process, nobody disturbs it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    complete(options_of(prepared, out), ranks=1)
    return out


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, prepared):
    """Two processes, nobody disturbs them."""
    out = tmp_path_factory.mktemp("ddp") / "out"
    complete(options_of(prepared, out, parallel="ddp"))
    return out


def test_two_ranks_train_as_one_does(alone, ddp):
    assert_same_training(alone, ddp)


def test_a_resumed_run_goes_on_at_another_number_of_ranks_with_the_next_sample(tmp_path, prepared, alone):
    """2 (FSDP2, sharded checkpoints) -> 1 -> 2 (DDP): every pass over a border reads the other's checkpoint."""
    out = tmp_path / "out"
    stages = [(2, {"parallel": "fsdp"}), (1, {}), (2, {"parallel": "ddp"})]
    for (ranks, how), until in zip(stages, (3, 6, None), strict=True):
        options = options_of(prepared, out, **how)
        if until is None:
            complete(options, ranks)
            continue
        processes = start_ranks("sft", options, ranks, {CRASH_VARIABLE: "checkpoint-latest"})
        for process in processes:
            process.join(60)
        assert 137 in [process.exitcode for process in processes]
        assert (out / "checkpoints" / "LATEST").read_text() == f"step-{until:08d}\n"
        sharded = json.loads((out / "checkpoints" / f"step-{until:08d}" / "state.json").read_text())["sharded"]
        assert sharded == (how.get("parallel") == "fsdp")
    assert_same_training(alone, out)
    assert "processes was 2, now 1" in log_of(options).read_text()


@pytest.mark.slow  # four runs of two processes more
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_both_stages_train_alike_however_the_model_is_placed(tmp_path, prepared, parallel, precision):
    changes = {"precision": precision, "steps": 6, "validation": prepared["sft"]["data"][0], "validate_every": 4}
    tolerance = 2e-4 if precision == "fp32" else 3e-2
    for verb in ("pretrain", "sft"):
        complete(options_of(prepared, tmp_path / verb / "one", verb, **changes), 1, verb)
        placed = {**changes, "parallel": parallel, "activation_checkpointing": True}
        complete(options_of(prepared, tmp_path / verb / "two", verb, **placed), 2, verb)
        assert_same_training(tmp_path / verb / "one", tmp_path / verb / "two", tolerance)


def steps_done(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not there yet, or a line that is being written
        return 0


def disturb(options, step, which, number, delay=0.0, count=2):
    """Start, wait until a step is done, and a little more, then signal one rank; returns the processes and its pid."""
    processes = start_ranks("sft", options, count)
    while all(process.is_alive() for process in processes) and steps_done(options.out) < step:
        time.sleep(0.002)
    time.sleep(delay)
    if processes[which].is_alive():
        os.kill(processes[which].pid, number)
    return processes


def test_a_killed_rank_ends_the_others_at_once_and_the_run_resumes_bit_equal(tmp_path, prepared, ddp):
    options = options_of(prepared, tmp_path / "out", parallel="ddp", checkpoint_every=100)
    processes = disturb(options, 4, 1, signal.SIGKILL)
    processes[1].join()
    killed = time.monotonic()
    assert join(processes, PATIENCE + 20) == [2, KILLED]
    assert time.monotonic() - killed < PATIENCE  # a broken connection shows at once
    printed = log_of(options).read_text()
    assert re.search(r"llama3v: error: process 1 of 2 is dead or hangs", printed), printed[-2000:]
    assert "Traceback" not in printed
    # rank 0 has all it takes to keep the finished steps
    assert (options.out / "checkpoints" / "LATEST").read_text() >= "step-00000004"
    complete(options)
    assert_equal_runs(options.out, ddp)


def test_a_hung_rank_is_noticed_within_the_time_limit(tmp_path, prepared):
    options = options_of(prepared, tmp_path / "out", parallel="ddp", rank_timeout=5.0)
    processes = disturb(options, 4, 1, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        processes[0].join(60)
        assert processes[0].exitcode == 2
        assert time.monotonic() - stopped < 5 + 20
        assert "process 1 of 2 is dead or hangs: no answer within 5 s" in log_of(options).read_text()
    finally:
        processes[1].kill()
        processes[1].join()


def test_sigterm_to_one_rank_stops_all_after_one_agreed_checkpoint(tmp_path, prepared):
    options = options_of(prepared, tmp_path / "out", parallel="ddp", checkpoint_every=100)
    processes = disturb(options, 3, 1, signal.SIGTERM)
    assert join(processes) == [128 + signal.SIGTERM] * 2
    printed = log_of(options).read_text()
    assert "its checkpoint is written" in printed
    assert "Traceback" not in printed
    assert len(list((options.out / "checkpoints").glob("step-*"))) == 1


def test_a_loss_that_is_no_number_on_one_rank_changes_no_weights_on_any(tmp_path, prepared):
    """As in one process: the step is skipped and told, and training goes on."""
    one, two = (options_of(prepared, tmp_path / name, parallel="ddp") for name in ("one", "two"))
    assert join([start("sft", one, {FAULT_VARIABLE: "nan:0:10"})]) == [0]  # four passes a step: the third step
    assert join(start_ranks("sft", two, 2, {FAULT_VARIABLE: "nan:1:6"})) == [0, 0]  # two passes a step and rank
    for options in (one, two):
        assert json.loads((options.out / "summary.json").read_text())["skipped_steps"] == 1
        assert [step for step, loss in losses(options.out) if loss is None] == [3]
    for (step, a), (_, b) in zip(losses(one.out), losses(two.out), strict=True):
        assert a == b is None or a == pytest.approx(b, rel=2e-4), step


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 0), pytest.param("fsdp", 1, marks=pytest.mark.slow)])
def test_a_full_disk_on_one_rank_stops_all_and_the_run_resumes_bit_equal(tmp_path, prepared, ddp, parallel, rank):
    options = options_of(prepared, tmp_path / "out", parallel=parallel)
    codes = join(start_ranks("sft", options, 2, {FAULT_VARIABLE: f"full:{rank}:3"}), PATIENCE + 30)
    printed = log_of(options).read_text()
    assert codes[rank] == 2, printed[-3000:]
    assert codes[1 - rank] == 2, printed[-3000:]
    assert re.search(r"llama3v: error: .*no space for a checkpoint .*run the same command to resume", printed), printed[
        -3000:
    ]
    assert "Traceback" not in printed
    complete(options)
    if parallel == "ddp":
        assert_equal_runs(options.out, ddp)
    else:
        assert_same_training(options.out, ddp)


@pytest.mark.slow  # 20 starts
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "parallel"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_twenty_kills_of_sixty_steps_end_bit_equal(tmp_path, prepared, ranks, parallel):
    steps = {"steps": 60, "checkpoint_every": 2, "parallel": parallel}
    complete(options_of(prepared, tmp_path / "whole", **steps), ranks)
    options = options_of(prepared, tmp_path / "out", **steps)
    chance, killed = random.Random(2), 0
    for step in sorted(chance.sample(range(1, 60), 20)):
        which = chance.randrange(ranks)
        processes = disturb(options, step, which, signal.SIGKILL, chance.uniform(0, 0.05), ranks)
        codes = join(processes, PATIENCE + 30)
        others = codes[:which] + codes[which + 1 :]
        assert all(code in (2, 0, KILLED) for code in others), log_of(options).read_text()[-3000:]
        killed += codes[which] == KILLED
    print(f"{ranks} ranks, {parallel}: {killed} of 20 starts had a rank killed")
    assert killed >= 15  # a slow test machine may let a start end before its kill
    complete(options, ranks)
    assert_equal_runs(options.out, tmp_path / "whole")


def test_ranks_that_read_other_files_are_refused_with_the_difference(tmp_path, prepared):
    """As on two machines of which one has another data set under the same name."""
    rows = json.loads(Path(prepared["sft"]["data"][0]).read_text())
    rows[3]["conversations"][1]["value"] = "It is purple."
    other = Path(prepared["sft"]["data"][0]).with_name("other.json")
    other.write_text(json.dumps(rows))
    same, different = (options_of(prepared, tmp_path / "out", **changes) for changes in ({}, {"data": (str(other),)}))
    processes = [start("sft", options, at) for options, at in zip((same, different), environments(2), strict=True)]
    assert join(processes) == [2, 2]
    assert "but it is not there for this one, or is other data" in log_of(same).read_text()
