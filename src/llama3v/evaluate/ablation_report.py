"""The table of an ablation on the terminal and as a page."""

from pathlib import Path
from typing import Any

from llama3v.evaluate.ablation_table import unlike_the_base, verdict
from llama3v.report import Report

NOTE = (
    "Differences are from the base, paired by seed, with the 95% interval of Student's t over the seeds. The gap is how "
    "much worse the loss becomes when images are shuffled: larger means that the model uses them more."
)


def print_table(summary: dict[str, Any]) -> None:
    """To stdout."""
    from rich import box
    from rich.table import Table

    from llama3v.evaluate.table import results

    console = results()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for name in ("trained", "tokens", "loss", "from the base", "gap", "from the base", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["variants"]:
        table.add_row(
            row["name"],
            f"{row['trained_parameters'] / 1e6:.2f}M",
            f"{row['visual_tokens_per_tile']:.0f}",
            f"{row['loss']['value']:.3f}",
            in_words(row["loss"].get("difference")),
            f"{row['gap']['value']:.3f}",
            in_words(row["gap"].get("difference")),
            f"{row['seconds']:.0f} s",
        )
    console.print(table)
    console.print(f"validation loss of stage {summary['stage']}; {len(summary['seeds'])} seeds. {NOTE}", style="dim")
    for sentence in unlike_the_base(summary["variants"]):
        console.print(sentence, style="yellow")


def write_report(path: Path, summary: dict[str, Any]) -> None:
    """ablation.html."""
    options = summary["options"]
    report = Report(
        "Ablation",
        f"{len(summary['variants']) - 1} variants beside the base, {len(summary['seeds'])} seeds, compared after stage "
        f"{summary['stage']}",
    )
    base = summary["variants"][0]
    report.add_figures(
        [
            ("loss of the base", f"{base['loss']['value']:.3f}", "held-out, per supervised token"),
            ("gap of the base", f"{base['gap']['value']:.3f}", "with shuffled images, less that"),
            ("trainings", len(summary["variants"]) * len(summary["seeds"]), "with the same steps and data"),
        ]
    )
    columns = ["variant", "loss", "from the base", "shuffled", "from the base", "gap", "from the base"]
    rows = [
        [
            row["name"],
            f"{row['loss']['value']:.3f}",
            _in_a_cell(row["loss"].get("difference"), lower_is_better=True),
            f"{row['shuffled']['value']:.3f}",
            _in_a_cell(row["shuffled"].get("difference")),
            f"{row['gap']['value']:.3f}",
            _in_a_cell(row["gap"].get("difference"), lower_is_better=False),
        ]
        for row in summary["variants"]
    ]
    report.add_table("Variants", columns, rows, NOTE)
    sizes = [
        [
            row["name"],
            row["trained_parameters"],
            round(row["visual_tokens_per_tile"]),
            row["seen"],
            row["left_out"],
            row["validation_samples"],
            round(row["seconds"], 1),
        ]
        for row in summary["variants"]
    ]
    columns = ["variant", "parameters that train", "tokens a tile", "samples seen", "left out", "held-out samples"]
    report.add_table(
        "What each takes", [*columns, "seconds a seed"], sizes, " ".join(unlike_the_base(summary["variants"]))
    )
    report.add_bars(
        "Loss with the right and with shuffled images",
        {
            row["name"]: {"right": row["loss"]["value"], "shuffled": row["shuffled"]["value"]}
            for row in summary["variants"]
        },
    )
    seeds = [
        [row["name"], seed, *(f"{row[measure]['seeds'][place]:.4f}" for measure in ("loss", "shuffled", "gap"))]
        for row in summary["variants"]
        for place, seed in enumerate(summary["seeds"])
    ]
    report.add_table("Every training", ["variant", "seed", "loss", "shuffled", "gap"], seeds)
    for title, found in (("Options", options), ("Environment", summary["environment"])):
        report.add_table(title, ["name", "value"], [[name, str(value)] for name, value in found.items()])
    report.write(path)


def _in_a_cell(difference: dict[str, Any] | None, *, lower_is_better: bool | None = None) -> str:
    """The difference, its interval and what that says, each in a line of its own where the column is narrow."""
    value, _, bounds = in_words(difference).partition(" ")
    said = "" if lower_is_better is None else verdict(difference, lower_is_better=lower_is_better)
    return " ".join(part for part in (value, _unbroken(bounds), _unbroken(said)) if part)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")


def in_words(difference: dict[str, Any] | None) -> str:
    """+0.012 [-0.003, +0.027]"""
    if difference is None:
        return ""
    if difference["low"] is None:
        return f"{difference['value']:+.3f}"
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
