"""A checkpoint is whole or it is not used; what came before it is never lost."""

import json
import os
import resource

import pytest
import torch

from llama3v.errors import CheckpointError
from llama3v.feature_cache.commit import CRASH_VARIABLE
from llama3v.train import checkpoint as module
from llama3v.train.checkpoint import (
    CRASH_POINTS,
    LATEST,
    STATE,
    Checkpoints,
)
from llama3v.train.saved_tensors import (
    OPTIMIZER,
    WEIGHTS,
    optimizer_tensors,
    read_whole,
    restore_optimizer,
    restore_weights,
)


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    weights = {"projector.weight": torch.randn(8, 4, generator=generator)}
    optimizer = {
        "projector.weight|exp_avg": torch.randn(8, 4, generator=generator),
        "projector.weight|step": torch.tensor(float(step)),
    }
    return weights, optimizer


def save(checkpoints, step):
    return checkpoints.save(step, {"step": step, "rng": {"cpu": "00"}}, *tensors(step))


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def messages():
    return []


def test_what_is_saved_is_what_is_loaded(checkpoints, messages):
    save(checkpoints, 10)
    loaded = checkpoints.load(messages.append)
    weights, optimizer = tensors(10)
    assert loaded.state["step"] == 10
    loaded_weights, loaded_optimizer = read_whole(loaded.directory)
    assert all(torch.equal(loaded_weights[name], weights[name]) for name in weights)
    assert all(torch.equal(loaded_optimizer[name], optimizer[name]) for name in optimizer)
    assert messages == []


def test_no_checkpoint_is_none(checkpoints, messages):
    assert checkpoints.load(messages.append) is None


def test_the_newest_are_kept_and_latest_names_the_newest(checkpoints):
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == [LATEST, "step-00000030", "step-00000040"]
    assert (checkpoints.directory / LATEST).read_text() == "step-00000040\n"


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(checkpoints, messages, name, damage):
    save(checkpoints, 10)
    path = save(checkpoints, 20) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    kept = {"flip": content, "truncate": content[:-3], "empty": b""}
    path.unlink()
    if damage != "delete":
        path.write_bytes(kept[damage])
    loaded = checkpoints.load(messages.append)
    assert loaded.state["step"] == 10
    assert len(messages) == 1
    assert "step-00000020" in messages[0]
    # and the next time there is nothing to say
    assert checkpoints.load(messages.append).state["step"] == 10
    assert len(messages) == 1


def test_every_byte_of_a_state_is_protected(checkpoints, messages):
    save(checkpoints, 10)
    path = save(checkpoints, 20) / STATE
    whole = path.read_bytes()
    meaning = json.loads(whole)
    undetected = []
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            state = module.read_state(path.parent)
        except CheckpointError:
            continue
        # a flipped bit in white space between fields changes nothing
        if state != {key: value for key, value in meaning.items() if key != "digest"}:
            undetected.append(position)
    assert undetected == []


def test_when_all_are_damaged_nothing_starts_from_zero_silently(checkpoints, messages):
    for step in (10, 20):
        (save(checkpoints, step) / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints.load(messages.append)


def test_a_stale_or_broken_latest_does_not_hide_checkpoints(checkpoints, messages):
    save(checkpoints, 10)
    for text in ("step-00000099\n", "", "../../etc\n"):
        (checkpoints.directory / LATEST).write_text(text)
        assert checkpoints.load(messages.append).state["step"] == 10


def test_saving_over_a_checkpoint_of_the_same_step_replaces_it(checkpoints, messages):
    save(checkpoints, 10)
    (save(checkpoints, 20) / WEIGHTS).write_bytes(b"damaged")
    assert checkpoints.load(messages.append).state["step"] == 10
    save(checkpoints, 20)
    assert checkpoints.load(messages.append).state["step"] == 20
    assert not list(checkpoints.directory.glob("aside-*"))


def save_and_die(checkpoints, step, point):
    """In a process of its own, which ends at `point` as after kill -9; returns its exit code."""
    child = os.fork()
    if child == 0:
        os.environ[CRASH_VARIABLE] = point
        save(checkpoints, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_every_moment_of_a_save_leaves_a_whole_checkpoint(checkpoints, messages, point):
    save(checkpoints, 10)
    assert save_and_die(checkpoints, 20, point) == 137
    assert checkpoints.load(messages.append).state["step"] == (20 if point == CRASH_POINTS[-1] else 10)
    save(checkpoints, 20)  # and the run goes on from there
    assert checkpoints.load(messages.append).state["step"] == 20
    assert messages == []


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_during_the_first_save_leaves_none_or_a_whole_one(checkpoints, messages, point):
    assert save_and_die(checkpoints, 10, point) == 137
    loaded = checkpoints.load(messages.append)
    assert (loaded is not None) == (point in CRASH_POINTS[-2:])
    assert messages == []


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_is_intact(checkpoints, messages):
    save(checkpoints, 10)
    big = {"projector.weight": torch.zeros(200, 200)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"no space .*step-00000010.* is intact"):
            checkpoints.save(20, {"step": 20}, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.load(messages.append).state["step"] == 10
    assert not list(checkpoints.directory.glob(".writing-*"))
    save(checkpoints, 20)  # once there is space again
    assert checkpoints.load(messages.append).state["step"] == 20


def test_an_optimizer_continues_bit_for_bit():
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        names = [name for name, _ in layer.named_parameters()]
        groups = [{"params": list(layer.parameters()), "names": names}]
        return layer, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def steps(layer, optimizer, numbers):
        for number in numbers:
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
            layer(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = build()
    steps(whole, optimizer, range(3))
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    moments = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    steps(whole, optimizer, range(3, 6))

    resumed, other = build()
    restore_weights(dict(resumed.named_parameters()), weights)
    restore_optimizer(other, moments)
    steps(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_weights_of_other_parameters_are_refused():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="other parameters"):
        restore_weights(dict(layer.named_parameters()), {"llm.weight": torch.zeros(2, 2)})
