"""The meter's clock and the metrics file survive interruptions; money is not overspent; people see how it stands."""

import json

import pytest
from rich.console import Console

from llama3v.train import curves
from llama3v.train.display import Display, describe, sparkline
from llama3v.train.meter import Device, Meter, MetricsLog, peak_memory, read_metrics, trim_metrics
from llama3v.train.pace import Pace
from llama3v.train.signals import EXIT_ASKED, StopRequest
from llama3v.train.watch import Budget

COUNTS = {"visual_tokens": 60, "text_tokens": 40, "supervised_tokens": 20, "tiles": 3, "attention_pairs": 900}


def test_rates_are_over_the_last_steps_and_counts_over_the_run():
    meter = Meter(steps=10, seconds=100.0, counts={"tiles": 7})
    meter.step(1, COUNTS, seconds=1.0, waited=0.5)
    record = meter.step(2, COUNTS, seconds=3.0, waited=0.5)
    assert record["visual_tokens_per_second"] == 30
    assert record["tiles_per_second"] == 1.5
    assert record["wait_share"] == 0.25
    assert record["seconds_left"] == 16  # eight more of two seconds
    assert meter.counts == {name: 2 * count + 7 * (name == "tiles") for name, count in COUNTS.items()}


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


def test_use_of_the_device_is_measured_against_its_matrix_products():
    device = Device(flops=lambda counts: 1e9 * counts["tiles"], gemm_rate=2e9, memory=lambda: 5_000_000_000)
    record = Meter(steps=10, device=device).step(1, COUNTS, seconds=3.0, waited=0.0)
    assert (record["mfu"], record["memory_gb"]) == (0.5, 5.0)
    assert Meter(steps=10).step(1, COUNTS, 1.0, 0.0)["mfu"] is None
    assert 1e6 < peak_memory() < 1e12


def test_processes_that_train_together_are_counted_together():
    def summed(numbers):
        return {name: 2 * number for name, number in numbers.items()}

    device = Device(lambda counts: 1e9 * counts["tiles"], 2e9, lambda: 0, processes=2, summed=summed)
    meter = Meter(steps=10, device=device)
    record = meter.step(1, COUNTS, seconds=3.0, waited=1.5)
    assert record["mfu"] == 0.5  # twice the work on two devices
    assert record["wait_share"] == 0.5
    assert record["tiles_per_second"] == 2.0
    assert meter.counts["tiles"] == 6


def test_listeners_are_told_every_line_that_is_written(tmp_path):
    told = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [told.append])
    for step in (1, 2):
        log.append({"step": step})
    log.close()
    assert told == list(read_metrics(log.path)) == [{"step": 1}, {"step": 2}]


def shown_by(terminal, records, width=160, **options):
    console = Console(record=True, force_terminal=terminal, width=width, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with Display(console, "sft", steps=2, done=0, priced=True, **options) as display:
        for record in records:
            display.show(record)
    return console.export_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_people_see_loss_speed_waiting_memory_time_price_and_whether_it_sees(terminal):
    device = Device(flops=lambda counts: 1e8, gemm_rate=1e9, memory=lambda: 2_500_000_000)
    meter = Meter(steps=2, dollars_per_hour=1000.0, seconds=36, device=device)
    records = [
        {"step": step, "loss": 1.5, "gradient_norm": 0.5, "learning_rate": 1e-3, **meter.step(step, COUNTS, 1.0, 0.0)}
        for step in (1, 2)
    ]
    validation = {"validation_loss": 1.25, "validation_loss_shuffled": 2.0, "validation_gap": 0.75}
    text = shown_by(terminal, [records[0], {"step": 1, **validation}, records[1]], budget=90.0)
    for part in (
        *("1.500", "visual 60, text 40, supervised 20", "3.0", "waiting 0%", "MFU 10%", "2.5 GB", "0:00 left"),
        *("$10.00 of $10.00, budget $90.00", "validation loss 1.250, with shuffled images 2.000, gap 0.750"),
    ):
        assert part in text, part


@pytest.mark.parametrize("width", [20, 40, 200])
def test_the_panel_fits_any_terminal(width):
    record = {"step": 1, "loss": 1.5, **Meter(steps=2).step(1, COUNTS, 1.0, 0.0)}
    text = shown_by(True, [record], width=width)
    assert max(map(len, text.splitlines())) <= width


def test_a_sparkline_shows_the_course_in_so_many_columns():
    assert sparkline([], 5) == ""
    assert sparkline([3.0, 2.0, 1.0], 5) == "█▅▁"
    assert sparkline([float(-step) for step in range(1000)], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], 5) == "▁▁"


class Clock:
    """A clock that a test turns."""

    def __init__(self, monkeypatch, module):
        self.now = 0.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    from llama3v.train import meter

    return Clock(monkeypatch, meter)


def test_a_budget_is_never_overspent_and_its_last_checkpoint_is_within_it(clock):
    meter, pace, stop = Meter(steps=1000, dollars_per_hour=3600.0), Pace(every=10), StopRequest()
    budget = Budget(50.0, meter, pace, stop)
    for step in range(1, 1001):
        clock.now += 2.0
        record = meter.step(step, COUNTS, seconds=2.0, waited=0.0)
        if pace.due(step):
            clock.now += 1.0
            pace.saved(step, 1.0, meter.step_seconds)
        budget.after_step(record)
        if stop.requested:
            break
    assert (
        50 - 4 < meter.dollars + 1.0 <= 50
    )  # a dollar a second: the save that follows is paid for, one more step is not
    assert "budget of $50.00" in stop.reason
    assert "a higher --budget" in stop.advice
    assert stop.exit_code == EXIT_ASKED


def test_a_run_that_has_spent_its_budget_stops_before_its_next_step():
    stop = StopRequest()
    Budget(5.0, Meter(steps=10, dollars_per_hour=3.6, seconds=7200.0), Pace(every=10), stop).after_step()
    assert stop.requested
    fresh = StopRequest()
    Budget(9.0, Meter(steps=10, dollars_per_hour=3.6, seconds=7200.0), Pace(every=10), fresh).after_step()
    assert fresh.requested is None


def test_the_time_to_come_counts_what_happens_between_steps(clock):
    meter = Meter(steps=11)
    for step in (1, 2):
        clock.now += 1.0
        record = meter.step(step, COUNTS, seconds=1.0, waited=0.0)
        clock.now += 2.0  # a validation, say
    assert record["seconds_left"] == 9 * (1.0 + 1.0)  # two seconds between two steps


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
