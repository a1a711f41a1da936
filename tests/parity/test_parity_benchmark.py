"""benchmarks/parity.py: what CI can install answers one checkpoint with the same tokens, and a difference is told."""

from pathlib import Path

from benchmarks import parity
from benchmarks.parity import Options, compared


def test_every_program_that_is_installed_gives_the_same_greedy_tokens(tiny_model_dir: Path, capsys) -> None:
    rows = parity.main(Options(model=tiny_model_dir, new_tokens=12, mlx_vlm=False))
    assert {"llama3v, torch, fp32", "transformers, fp32, its own process"} <= {row["name"] for row in rows}
    for row in rows:
        # f16 rounds, and may part at a tie
        assert row["ours"] == row["peer"] == 48 or ("f16" in row["name"] and "apart" in row["note"]), row
    assert "48 of 48" in capsys.readouterr().out


def test_a_difference_is_told_with_its_place_and_margin() -> None:
    expected = {"text": [1, 2, 3], "image": [4, 5]}
    margins = {"text": [0.5, 0.25, 0.125], "image": [1.0, 2.0]}
    row = compared("peer", expected, {"text": [1, 9, 3], "image": [4, 5]}, margins)
    assert (row["ours"], row["peer"]) == (3, 5)
    assert row["note"] == "1 of 2 answers equal; text parts at token 2, where the two likeliest are 0.25 apart"
