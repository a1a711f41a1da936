"""The loss alarm tells of spikes and of nothing else, knows the samples, and survives resume."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from llama3v.train.alarm import LEAST, Alarm
from llama3v.train.meter import read_metrics
from llama3v.train.signals import EXIT_ASKED, StopRequest


def losses(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls as losses do, with the noise of small steps."""
    chance = random.Random(seed)
    return [(1.5 + 4 * math.exp(-step / 60)) * (1 + chance.gauss(0, 0.08)) for step in range(steps)]


def run(
    out: Path, values: list[float | None], said: list[str], stop: StopRequest | None = None
) -> list[dict[str, Any]]:
    alarm = Alarm(out, lambda step: [f"sample-{step}-{number}" for number in range(7)], said.append, stop)
    records: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(values, start=1)]
    for record in records:
        alarm.after_step(record)
    return records


def test_the_noise_of_training_gives_no_alarm(tmp_path: Path) -> None:
    said: list[str] = []
    for seed in range(10):
        run(tmp_path, list(losses(1000, seed)), said)
    assert said == []


@pytest.mark.parametrize("height", [2.5, 5.0, 1000.0])
def test_a_spike_is_told_with_its_step_and_its_samples(tmp_path: Path, height: float) -> None:
    values: list[float | None] = list(losses(300))
    values[200] = height * 1.6
    values[203] = height * 1.6  # the first one does not hide the next
    values[250] = None  # not finite: counted elsewhere
    said: list[str] = []
    records = run(tmp_path, values, said)
    assert [record["step"] for record in records if "loss_alarm" in record] == [201, 204]
    assert said[0].startswith(f"step 201: loss {height * 1.6:.3f}, ")
    assert (
        "sample-201-0, sample-201-1, sample-201-2, sample-201-3, sample-201-4 and 2 more, all in alarms.jsonl"
        in said[0]
    )
    kept = list(read_metrics(tmp_path / "alarms.jsonl"))
    assert [line["step"] for line in kept] == [201, 204]
    assert kept[0]["samples"] == [f"sample-201-{number}" for number in range(7)]


def test_the_first_steps_give_no_alarm(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, [1.0] * (LEAST - 1) + [50.0], said)
    assert said == []


def test_a_loss_that_stays_higher_becomes_the_usual_one(tmp_path: Path) -> None:
    said: list[str] = []
    records = run(tmp_path, [1.0] * 100 + [3.0] * 200, said)
    alarmed = [record["step"] for record in records if "loss_alarm" in record]
    assert 101 in alarmed
    assert max(alarmed) < 101 + 64


def test_a_resumed_run_gives_the_same_alarms(tmp_path: Path) -> None:
    values: list[float | None] = list(losses(120))
    values[70] = values[90] = 40.0
    whole = run(tmp_path, values, [])
    alarm = Alarm(tmp_path, lambda step: [], lambda text: None)
    alarm.resume(80, whole[:80])
    again = [{"step": step, "loss": values[step - 1]} for step in range(81, 121)]
    for record in again:
        alarm.after_step(record)
    assert [json.dumps(record) for record in whole[80:]] == [json.dumps(record) for record in again]
    assert [line["step"] for line in read_metrics(tmp_path / "alarms.jsonl")] == [71, 91]


def test_an_alarm_stops_the_run_only_where_that_was_asked_for(tmp_path: Path) -> None:
    stop = StopRequest()
    run(tmp_path, [1.0, 1.1] * 20 + [9.0], [], stop)
    assert stop.reason == "--stop-on-alarm (a loss spike)"
    assert stop.exit_code == EXIT_ASKED
    assert "step 41" in stop.advice
