"""Scores on the terminal: each with its interval, and beside it what the model scores without the right image."""

import shutil
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 110  # of what goes into a pipe
CONTROLS = ("wrong image", "blind")
UNDEFINED = "–"
"""A figure for which no answer counts."""


def print_scores(summary: dict[str, Any]) -> None:
    """The table of a run's tasks, and what it must not be read without."""
    console = results()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    table.add_column("figure")
    for name in ("samples", "score [95 %]", *CONTROLS, "unparsed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["tasks"]:
        controls = [score(row, name) for name in CONTROLS]
        table.add_row(
            Text(row["label"]),
            Text(row["figure"]),
            f"{row['samples']:,}",
            interval(headline(row, "right image")),
            *(value or "not asked" for value in controls),
            f"{row['conditions']['right image']['unparsed']:.1%}",
        )
    console.print(table)
    for note in notes(summary):
        console.print(Text(note))


def print_comparison(summary: dict[str, Any]) -> None:
    """The table of two runs."""
    console = results()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for name in ("samples", "first", "second", "difference [95 %]", "p", "better : worse"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["tasks"]:
        table.add_row(
            Text(row["label"]),
            f"{row['samples']:,}",
            f"{row['first']:.3f}",
            f"{row['second']:.3f}",
            interval(row["difference"], sign=True),
            p_value(row["p_value"]),
            f"{row['first_better']} : {row['second_better']}",
        )
    console.print(table)
    console.print(Text(f"first: {summary['first']}\nsecond: {summary['second']}"))
    tests = ", ".join(dict.fromkeys(row["test"] for row in summary["tasks"]))
    console.print(Text(f"p: {tests}; not corrected for the number of tasks. Condition: {summary['condition']}."))
    for note in summary["notes"]:
        console.print(Text(note))


def notes(summary: dict[str, Any]) -> list[str]:
    """What belongs to the scores of a run, in sentences."""
    found = []
    if not summary["controls"]:
        found.append("Without controls: how much of these scores is sight was not measured (--no-controls).")
    if summary["limit"] is not None:
        found.append(
            f"The first {summary['limit']:,} samples of each task; not comparable with scores of whole benchmarks."
        )
    for row in summary["tasks"]:
        if "judge" in row:
            found.append(f"{row['label']}: judged by {row['judge']}; comparable under the same judge alone.")
        against = row["differences"].get("wrong image")
        if against is not None and against["p_value"] > 0.05:
            found.append(
                f"{row['label']}: not surely better than with wrong images (p = {p_value(against['p_value'])}): no sight shown. "
                "More pictures would tell more."
            )
        elif against is not None and against["difference"]["value"] < 0:
            found.append(
                f"{row['label']}: WORSE than with wrong images (p = {p_value(against['p_value'])}): look at the answers."
            )
        known = row.get("contamination")
        if known is not None:
            told = known["clean"] is not None and known["matches"]
            left = f"; without them {row['figure']} {interval(known['clean'])}" if told else ""
            found.append(
                f"{row['label']}: of {known['images']:,} pictures the training had {known['same_file']:,}, and near-duplicates "
                f"of {known['near_duplicates']:,}{left}."
            )
        change = row["differences"].get("overview only")
        if change is not None:
            found.append(
                f"{row['label']}: slices changed {row['figure']} by {interval(change['difference'], sign=True)}, "
                f"p = {p_value(change['p_value'])}."
            )
    return found


def headline(row: dict[str, Any], condition: str) -> dict[str, float] | None:
    """The headline figure of a task under a condition: {"value", "low", "high"}; None where no answer counts for it."""
    found: dict[str, float] | None = row["conditions"][condition]["figures"].get(row["figure"])
    return found


def score(row: dict[str, Any], condition: str) -> str | None:
    """The headline figure alone, in words; None where the condition was not asked."""
    return plain(headline(row, condition)) if condition in row["conditions"] else None


def plain(values: dict[str, float] | None) -> str:
    """A figure without its interval."""
    return UNDEFINED if values is None else f"{values['value']:.3f}"


def interval(values: dict[str, float] | None, *, sign: bool = False) -> str:
    if values is None:
        return UNDEFINED
    form = "+.3f" if sign else ".3f"
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def results() -> Console:
    """For the table: as wide as the terminal; a pipe gets whole lines."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDEST
    return Console(width=width, highlight=False)
