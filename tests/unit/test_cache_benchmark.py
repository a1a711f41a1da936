"""benchmarks/cache.py runs, and its counts of faults are those that the tests assert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/cache.json"


@pytest.mark.slow  # a benchmark in small, about 10 seconds of both cores
def test_the_quick_benchmark_writes_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import cache

    monkeypatch.setattr("sys.argv", ["cache.py", "--quick", "--json", str(tmp_path / "cache.json")])
    cache.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "cache.json").read_text())["rows"]}
    assert {"reader, one thread / memcpy", "reader, one thread / webdataset"} <= set(rows)
    faults = [row for name, row in rows.items() if "killed" in name or "flipped" in name]
    assert len(faults) == 9
    assert all(row["ours"] == 0 and row["limit"] > 0 for row in faults)
