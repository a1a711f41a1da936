"""From answer records to what is reported: figures with intervals, by category, the unparsed rate; and one run against another."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, unparsed_share
from llama3v.evaluate.statistics import Comparison, Interval, bootstrap, compare, unanimous
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
    corpus: dict[str, float]
    """Figures of all answers together, without an interval."""
    categories: dict[str, Interval]
    """The mean score of each category."""


def summarise(task: Task, records: Sequence[AnswerRecord], condition: str) -> Summary:
    """Sum up a task's records under one condition. Raises DataError where there are none."""
    asked = _of(task, records, condition)
    settled = task.settle(asked)
    figures = {figure.name: _interval(figure, settled) for figure in task.figures()}
    headline = task.figures()[0]
    names = sorted({record.category for record in settled} - {""})
    by_category = {name: [record for record in settled if record.category == name] for name in names}
    return Summary(
        task=task.name,
        condition=condition,
        rule=task.rule,
        samples=len(settled),
        unparsed=unparsed_share(asked),
        figures=figures,
        corpus=task.corpus_figures(asked),
        categories={name: _interval(headline, some) for name, some in by_category.items()},
    )


def compare_runs(
    task: Task,
    first: Sequence[AnswerRecord],
    second: Sequence[AnswerRecord],
    condition: str = "right image",
    against: str | None = None,
) -> Comparison:
    """The first run's scores against the second's, sample by sample: under one condition, or the second's under the
    condition `against`. Raises DataError where they saw other samples.
    """
    return compare_settled(
        task.name, task.settle(_of(task, first, condition)), task.settle(_of(task, second, against or condition))
    )


def compare_settled(name: str, first: Sequence[AnswerRecord], second: Sequence[AnswerRecord]) -> Comparison:
    """The same of records that are settled already. `name` of the task is for the error."""
    ours = {record.id: record for record in first}
    theirs = {record.id: record for record in second}
    if ours.keys() != theirs.keys():
        lone = sorted(ours.keys() ^ theirs.keys())
        raise DataError(
            f"{name}: expected two runs on the same samples, found {len(lone)} in one alone "
            f"({', '.join(lone[:3])} ...); run both with the same --limit"
        )
    scores = [(ours[id].score, theirs[id].score) for id in ours]
    return compare([one for one, _ in scores], [other for _, other in scores], [_cluster(ours[id]) for id in ours])


def _of(task: Task, records: Sequence[AnswerRecord], condition: str) -> list[AnswerRecord]:
    found = [record for record in records if (record.task, record.condition) == (task.name, condition)]
    if not found:
        raise DataError(f"{task.name}: no answers under the condition {condition!r}; run the evaluation first")
    return found


def _interval(figure: Figure, records: Sequence[AnswerRecord]) -> Interval:
    tallies = [figure.tallies(record) for record in records]
    clusters = [_cluster(record) for record in records]
    found = bootstrap(tallies, figure.value, clusters)
    if figure.most is None or found.low != found.high or found.value not in (0.0, figure.most):
        return found
    counted = {cluster for cluster, (_, count) in zip(clusters, tallies, strict=True) if count}
    return unanimous(found.value, figure.most, len(counted)) if counted else found


def _cluster(record: AnswerRecord) -> tuple[str, str]:
    """Samples without a cluster stand alone."""
    return ("cluster", record.cluster) if record.cluster else ("sample", record.id)
