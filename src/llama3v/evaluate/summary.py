"""From answer records to what is reported: figures with intervals, by category, the unparsed rate; and one run against another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, unparsed_share
from llama3v.evaluate.statistics import Comparison, Interval, bootstrap, compare
from llama3v.evaluate.tasks.base import Figure, Task


@dataclass(frozen=True)
class Summary:
    """One task under one condition. The first of `figures` is the headline."""

    task: str
    condition: str
    rule: str
    samples: int
    unparsed: float
    figures: dict[str, Interval]
    """Those that are defined: no accuracy of one half where there is none of it, no ratio where nothing was read."""
    corpus: dict[str, float]
    """Figures of all answers together, without an interval."""
    categories: dict[str, Interval]
    """The headline of each category."""


def summarise(task: Task, records: Sequence[AnswerRecord], condition: str) -> Summary:
    """Sum up a task's records under one condition. Raises DataError where there are none."""
    asked = _of(task, records, condition)
    settled = task.settle(asked)
    headline = task.figures()[0]
    by_category: dict[str, list[AnswerRecord]] = {}
    for record in sorted(settled, key=lambda record: record.category):
        if record.category:
            by_category.setdefault(record.category, []).append(record)
    return Summary(
        task=task.name,
        condition=condition,
        rule=task.rule,
        samples=len(settled),
        unparsed=unparsed_share(asked),
        figures=_intervals({figure.name: (figure, settled) for figure in task.figures()}),
        corpus=task.corpus_figures(asked),
        categories=_intervals({name: (headline, some) for name, some in by_category.items()}),
    )


def compare_runs(
    task: Task,
    first: Sequence[AnswerRecord],
    second: Sequence[AnswerRecord],
    condition: str = "right image",
    against: str | None = None,
) -> Comparison | None:
    """The first run's headline figure against the second's, paired by sample: under one condition, or the second's under
    the condition `against`. None where either is not defined. Raises DataError where they saw other samples.
    """
    return compare_settled(
        task, task.settle(_of(task, first, condition)), task.settle(_of(task, second, against or condition))
    )


def compare_settled(task: Task, first: Sequence[AnswerRecord], second: Sequence[AnswerRecord]) -> Comparison | None:
    """The same of records that are settled already."""
    ours = {record.id: record for record in first}
    theirs = {record.id: record for record in second}
    if ours.keys() != theirs.keys():
        lone = sorted(ours.keys() ^ theirs.keys())
        raise DataError(
            f"{task.name}: expected two runs on the same samples, found {len(lone)} in one alone "
            f"({', '.join(lone[:3])} ...); run both with the same --limit"
        )
    headline = task.figures()[0]
    return compare(
        [headline.tallies(ours[id]) for id in ours],
        [headline.tallies(theirs[id]) for id in ours],
        headline.value,
        [_cluster(ours[id]) for id in ours],
        most=headline.most,
    )


def _of(task: Task, records: Sequence[AnswerRecord], condition: str) -> list[AnswerRecord]:
    found = [record for record in records if (record.task, record.condition) == (task.name, condition)]
    if not found:
        raise DataError(f"{task.name}: no answers under the condition {condition!r}; run the evaluation first")
    return found


def _intervals(asked: Mapping[str, tuple[Figure, Sequence[AnswerRecord]]]) -> dict[str, Interval]:
    """Those of the figures that the records define."""
    found = {name: _interval(figure, records) for name, (figure, records) in asked.items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def _interval(figure: Figure, records: Sequence[AnswerRecord]) -> Interval | None:
    tallies = [figure.tallies(record) for record in records]
    clusters = [_cluster(record) for record in records]
    return bootstrap(tallies, figure.value, clusters, bounds=(0.0, figure.most))


def _cluster(record: AnswerRecord) -> tuple[str, str]:
    """Samples without a cluster stand alone."""
    return ("cluster", record.cluster) if record.cluster else ("sample", record.id)
