"""The figures of docs/evaluation.md and of benchmarks/results/smol/README.md are those of the files of results."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_table_of_the_ablation_is_the_measured_one() -> None:
    summary = json.loads((RESULTS / "ablation/ablation.json").read_text())
    names = {"base": "| base", "codec=int8": "| `codec=int8`"}
    for row in summary["variants"]:
        (line,) = [
            line
            for line in lines_of(ROOT / "docs/evaluation.md")
            if line.startswith(names.get(row["name"], f"| `{row['name']}`"))
            and f"| {row['loss']['value']:.3f} |" in line
        ]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        expected = [f"{row['trained_parameters'] / 1e6:.1f}M"]
        for measure in ("loss", "shuffled", "gap"):
            expected += [f"{row[measure]['value']:.3f}", difference(row[measure].get("difference"))]
        assert cells == expected


def difference(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['value']:+.3f} [{values['low']:+.3f}, {values['high']:+.3f}]"


def test_what_smol_scores_is_what_was_measured() -> None:
    summary = json.loads((RESULTS / "smol/eval/summary.json").read_text())
    page = lines_of(RESULTS / "smol/README.md")
    starts = {"flickr8k": "| captions", "daquar": "| DAQUAR", "easy-vqa": "| easy-vqa", "probes": "| synthetic probes"}
    assert {row["label"] for row in summary["tasks"]} == set(starts)
    for row in summary["tasks"]:
        scores = {name: found["figures"][row["figure"]] for name, found in row["conditions"].items()}
        (line,) = [line for line in page if line.startswith(starts[row["label"]])]
        assert f"| {row['samples']} | {scores['right image']['value']:.3f} [" in line
        assert line.endswith(f"| {scores['wrong image']['value']:.3f} | {scores['blind']['value']:.3f} |")


def test_the_losses_of_smol_are_what_was_measured() -> None:
    recipe: dict[str, Any] = json.loads((RESULTS / "smol/recipe.json").read_text())
    for stage in ("pretrain", "sft"):
        (line,) = [line for line in lines_of(RESULTS / "smol/README.md") if line.startswith(f"| {stage}, ")]
        right, shuffled = (recipe[stage][name] for name in ("validation_loss", "validation_loss_shuffled"))
        assert line.endswith(f"| {right:.3f} | {shuffled:.3f} | {shuffled - right:.3f} |")
