"""The ledger of what is left out: nothing lost, nothing twice."""

import json
import os
from pathlib import Path

import pytest

from llama3v.data.ledger import Ledger
from llama3v.errors import DataError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_entry_is_on_disk_at_once_with_its_detail(tmp_path):
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert lines(ledger.path) == []
    ledger.leave_out("a", "too long", tokens=9000)
    assert lines(ledger.path) == [{"id": "a", "reason": "too long", "tokens": 9000}]
    assert ledger.count == 1


def test_a_repeated_run_writes_nothing_twice_and_counts_anew(tmp_path):
    faults = [("a", "broken"), ("b", "broken"), ("a", "broken"), ("c", "too long")]  # ids may repeat
    for _ in range(3):
        ledger = Ledger(tmp_path / "ledger.jsonl")
        for id, reason in faults:
            ledger.leave_out(id, reason)
        assert ledger.count == 4
    assert [(line["id"], line["reason"]) for line in lines(tmp_path / "ledger.jsonl")] == faults


@pytest.mark.parametrize("kept", range(1, 40, 3))
def test_a_line_that_a_kill_cut_short_is_removed(tmp_path, kept):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).leave_out("a", "first")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "reason": "second, and longer"}\n'[:kept])
    Ledger(path).leave_out("b", "second, and longer")
    assert [line["id"] for line in lines(path)] == ["a", "b"]


def test_names_that_are_no_utf8_and_line_breaks_stay_on_one_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.leave_out(os.fsdecode(b"caf\xe9.png"), "two\nlines", name="漢")
    [line] = lines(ledger.path)
    assert line == {"id": os.fsdecode(b"caf\xe9.png"), "reason": "two\nlines", "name": "漢"}


def test_too_many_bad_samples_stop_the_run_with_the_first_reason(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.check_ratio(0, 0.0)
    for number in range(5):
        ledger.leave_out(f"row {number}", "broken")
    ledger.check_ratio(100, 0.05)
    with pytest.raises(DataError, match=r"5 of 99 .* --max-bad-ratio allows \(5.0%\); the first is row 0: broken"):
        ledger.check_ratio(99, 0.05)
