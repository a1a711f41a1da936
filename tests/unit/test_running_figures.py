"""The figures in docs/running.md are those of the files of results."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/running.md").read_text()


def rows_of(name: str) -> dict[str, dict]:
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_the_table_of_fewer_bits_is_the_measured_one() -> None:
    rows = rows_of("quantised")
    formats = [name.removesuffix(": perplexity") for name in rows if name.endswith(": perplexity")]
    assert len(formats) == 9
    for name in formats:
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {rows[f'{name}: perplexity']['ours']:.3f} | {rows[f'{name}: accuracy']['ours']:.1f}% |" in line


def test_the_ratios_of_decoding_are_the_measured_ones() -> None:
    ratios = [f"{row['ratio']:.2f}" for row in rows_of("decode").values() if row["ratio"]]
    said = PAGE[PAGE.index("### How fast") :].split("\n\n")[1]
    assert [ratio for ratio in ratios if f" {ratio} " not in " ".join(said.split())] == []


def test_the_rooflines_of_decoding_are_the_measured_ones() -> None:
    rows = rows_of("decode")
    said = " ".join(PAGE[PAGE.index("A token needs all weights once") :].split("\n\n")[0].split())
    assert f" {rows['memory, bytes read per second']['ours']:.1f} GB/s " in said
    decoding = [row for row in rows.values() if row["unit"] == "tokens/s"]
    assert len(decoding) == 3
    for row in decoding:
        assert f" {row['ours']:.1f} " in said
        assert f" {row['ours'] / row['limit']:.0%}" in said


def test_the_figures_of_captions_are_the_measured_ones() -> None:
    rows = rows_of("caption")
    said = " ".join(PAGE[PAGE.index("### How fast") : PAGE.index("## Export")].split())
    for engine in ("torch", "llama.cpp"):
        assert f" {rows[f'caption a folder, {engine}']['ratio']:.1f} times" in said
    start = rows["ask in a new process"]
    assert f"took {start['ours']:.1f} seconds, in PyTorch {start['peer']:.1f}" in said


def test_every_program_gave_the_tokens_that_are_claimed() -> None:
    rows = rows_of("parity").values()
    assert len(rows) == 7
    assert {(row["ours"], row["peer"]) for row in rows} == {(128, 128)}
    assert "128 of 128" in PAGE
