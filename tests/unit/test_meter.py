"""The meter's clock and the metrics file survive interruptions; curves are drawn of whatever there is."""

import json

import pytest
from rich.console import Console

from llama3v.train import curves
from llama3v.train.meter import Meter, MetricsLog, ProgressLine, describe, read_metrics, trim_metrics

COUNTS = {"visual_tokens": 60, "text_tokens": 40, "supervised_tokens": 20, "tiles": 3}


def test_rates_are_over_the_last_steps_and_counts_over_the_run():
    meter = Meter(steps=10, seconds=100.0, counts={"tiles": 7})
    meter.step(1, COUNTS, seconds=1.0, waited=0.5)
    record = meter.step(2, COUNTS, seconds=3.0, waited=0.5)
    assert record["visual_tokens_per_second"] == 30
    assert record["tiles_per_second"] == 1.5
    assert record["wait_share"] == 0.25
    assert record["seconds_left"] == 16  # eight more of two seconds
    assert meter.counts == {"visual_tokens": 120, "text_tokens": 80, "supervised_tokens": 40, "tiles": 13}


def test_time_and_dollars_go_on_where_they_stood():
    meter = Meter(steps=10, dollars_per_hour=3.6, seconds=7200.0)
    assert meter.seconds >= 7200
    assert meter.dollars == pytest.approx(7.2, rel=1e-3)


def test_metrics_are_trimmed_to_the_checkpoint_but_spent_time_stays_spent(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.append({"step": step, "loss": 1 / step, "seconds": 10.0 * step})
    log.append({"step": 4, "validation_loss": 0.1})
    log.sync()
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    assert trim_metrics(path, 4) == 50.0
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 4]
    assert next(iter(read_metrics(path)))["loss"] == 1.0
    assert trim_metrics(path, 0) == 40.0
    assert path.read_text() == ""


def test_a_file_that_is_not_there_has_no_metrics(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []
    assert trim_metrics(tmp_path / "none.jsonl", 5) == 0.0


def test_every_float_survives_the_file_bit_for_bit(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    losses = [0.1 + 0.2, 1 / 3, 1e-17, 5.625038146972656]
    for step, loss in enumerate(losses):
        log.append({"step": step, "loss": loss})
    log.close()
    trim_metrics(log.path, 99)
    assert [record["loss"] for record in read_metrics(log.path)] == losses


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_waiting_time_and_price(terminal):
    console = Console(record=True, force_terminal=terminal, width=160, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    meter = Meter(steps=2, dollars_per_hour=1.0)
    with ProgressLine(console, "sft", steps=2, done=0, priced=True) as line:
        for step in (1, 2):
            record = {"step": step, "loss": 1.5, **meter.step(step, COUNTS, seconds=1.0, waited=0.0)}
            line.show(record)
    text = console.export_text()
    for part in ("loss 1.500", "100 tokens/s", "3.0 tiles/s", "waiting 0%", "0:00 left", "$0.0"):
        assert part in text


def test_a_loss_that_is_not_finite_is_said_in_words():
    record = {"loss": None, **Meter(steps=3).step(1, COUNTS, 1.0, 0.0)}
    assert "not finite" in describe(record, priced=False)
    json.dumps(record, allow_nan=False)


def test_curves_are_drawn_of_any_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for records in (
        [],
        [{"step": 1, "loss": None, "learning_rate": 0.1}],
        [{"step": step, "loss": 3 / step, "learning_rate": 1e-3} for step in range(1, 40)]
        + [{"step": 39, "validation_loss": 0.5, "validation_loss_shuffled": None}],
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        curves.draw(path, tmp_path / "curves.png", "pretrain")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
