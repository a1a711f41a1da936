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


def test_the_tables_of_speed_and_of_load_are_the_measured_ones() -> None:
    rows = {row["name"]: row for row in json.loads((ROOT / "benchmarks/results/serve.json").read_text())["rows"]}
    page = (ROOT / "docs/serving.md").read_text()
    kinds = {
        "text, one client: tokens/s": "text, one client",
        "text: tokens/s": "text, 8 clients",
        "a repeated picture: requests/s": "a picture that was seen before, 8 clients, requests",
    }
    for name, kind in kinds.items():
        row = rows[name]
        assert f"| {kind} | {row['ours']:.1f} | {row['peer']:.1f} | {row['ratio']:.2f} |" in page
    text = " ".join(page.split())
    load = {name.removeprefix("load: "): row for name, row in rows.items() if name.startswith("load: ")}
    answered = load["answers that differ from the answer alone"]
    assert f"{answered['note'].removeprefix('of ')} answers ended" in text
    assert (answered["ours"], load["requests left over"]["ours"]) == (0, 0)
    memory = [load[f"memory {when}"]["ours"] for when in ("before", "after")]
    assert f"memory went from {memory[0]:,.0f} to {memory[1]:,.0f} MB" in text
