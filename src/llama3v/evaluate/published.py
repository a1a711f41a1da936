"""What others say of their models: claims, to stand beside measured scores and never to be mistaken for them."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A column: the task that measures it here, on which split, its name in tables, and which of the task's figures is
    meant.
    """

    task: str
    split: str
    name: str
    figure: str


@dataclass(frozen=True)
class Claim:
    """A row: what a publication says of a model.

    Attributes:
        source: names the publication. scores: task -> per cent; a range as text. unchecked: tasks whose score is not
            known to stand in the source.
    """

    model: str
    source: str
    scores: dict[str, float | str]
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    note: str
    benchmarks: tuple[Benchmark, ...]
    claims: tuple[Claim, ...]


def published() -> Published:
    """The table of published.json."""
    text = resources.files("llama3v.evaluate").joinpath("published.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return Published(
        values["note"],
        tuple(Benchmark(**one) for one in values["benchmarks"]),
        tuple(Claim(**one | {"unchecked": tuple(one["unchecked"])}) for one in values["models"]),
    )


def our_row(summary: dict[str, Any]) -> dict[str, float]:
    """Task -> our score in per cent, of the published benchmarks that a run asked, under their published figure, where
    that is defined.
    """
    figures = {one.task: one.figure for one in published().benchmarks}
    found: dict[str, float] = {}
    for row in summary["tasks"]:
        if row["task"] in figures and row["task"] not in found:
            ours = row["conditions"]["right image"]["figures"].get(figures[row["task"]])
            if ours is not None:
                found[row["task"]] = 100 * ours["value"]
    return found
