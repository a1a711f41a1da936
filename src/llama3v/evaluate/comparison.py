"""`llama3v compare`: two runs of `llama3v eval` on the same samples, paired, with a significance test."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama3v import __version__
from llama3v.config import CompareConfig
from llama3v.engines.terminal import write_summary
from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, read_records
from llama3v.evaluate.summary import compare_settled
from llama3v.evaluate.table import print_comparison
from llama3v.evaluate.tasks import open_task


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare the tasks that both runs have; the table goes to stdout.

    Returns the summary, with `difference` (the first's headline figure less the second's, and its interval), `p_value`
    and `test` of each task. Raises DataError where a directory holds no run, the two have no task in common, or a task was
    asked of other samples.
    """
    first, second = _read(config.first), _read(config.second)
    common = [label for label in first if label in second]
    if not common:
        raise DataError(
            f"expected runs of the same tasks, found {', '.join(first)} in {config.first} and {', '.join(second)} in "
            f"{config.second}"
        )
    rows = [_row(config, first[label], second[label]) for label in common]
    alone = [f"{label} stands in one run alone." for label in sorted(first.keys() ^ second.keys())]
    summary = {
        "verb": "compare",
        "version": __version__,
        "first": str(config.first),
        "second": str(config.second),
        "condition": config.condition,
        "tasks": rows,
        "notes": alone,
    }
    write_summary(config.out, summary)
    print_comparison(summary)
    return summary


def _row(config: CompareConfig, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    label = first["label"]
    if first["task"] != second["task"] or first["data_digest"] != second["data_digest"]:
        raise DataError(
            f"{label}: expected the same questions, pictures and references in both runs, found other ones; run both "
            "with the same data and --limit"
        )
    if first.get("judge") != second.get("judge"):
        raise DataError(f"{label}: judged by {first.get('judge')} and by {second.get('judge')}; judge both by one")
    ours, theirs = (_samples(directory, label, config.condition) for directory in (config.first, config.second))
    found = compare_settled(open_task(f"{first['task']}=read already"), ours, theirs)
    if found is None:
        raise DataError(f"{label}: {first['figure']} is not defined in both runs: no answer counts for it")
    return {"label": label, "task": first["task"], "figure": first["figure"], **asdict(found)}


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    """Label -> the task's part of summary.json."""
    path = directory / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: expected what `llama3v eval --out` leaves, found no summary.json") from error
    if not isinstance(summary, dict) or summary.get("verb") != "eval":
        raise DataError(f"{path}: expected the summary of `llama3v eval`, found another's")
    return {row["label"]: row for row in summary["tasks"]}


def _samples(directory: Path, label: str, condition: str) -> list[AnswerRecord]:
    path = directory / "samples" / f"{label}.jsonl"
    found = [record for record in read_records(path) if record.condition == condition]
    if not found:
        raise DataError(f"{path}: no answers under the condition {condition!r}; was the run made with --no-controls?")
    return found
