"""The figures of the API's fuzzing in docs/serving.md are those of its results file."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_the_documents_say_of_the_fuzzing_is_what_it_found() -> None:
    results = json.loads((ROOT / "benchmarks/results/fuzz_api.json").read_text())
    rows = {row["name"]: row["ours"] for row in results["rows"]}
    text = " ".join((ROOT / "docs/serving.md").read_text().split())
    assert f"In {results['seconds']} seconds it made {rows['requests']:.0f} requests" in text
    assert f"at most {rows['peak memory']:.0f} MB, of which {rows['memory at the start']:.0f} were there" in text
    assert "no 5xx, no finding, nothing left over" in text
    assert rows["findings"] == 0
    assert rows["server errors"] == 0
    assert results["complete"]
    assert results["nothing_left_over"]
    assert results["clean_end"]
