"""`llama3v eval`: ask, score, sum up, and say how sure; resumable."""

import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama3v import __version__
from llama3v.config import EvalConfig
from llama3v.engines.base import BatchEngine
from llama3v.engines.terminal import messages, write_summary
from llama3v.errors import ConfigError
from llama3v.evaluate.contamination import Match, Trained, clean_samples, read_trained
from llama3v.evaluate.judge import Judge, judge_records, need_judge, open_judge
from llama3v.evaluate.records import AnswerRecord, write_records
from llama3v.evaluate.report import write_report
from llama3v.evaluate.run import answer_task, images_shown
from llama3v.evaluate.sight import CONDITIONS, OVERVIEW
from llama3v.evaluate.specs import LoadedTask, load, parse_specs
from llama3v.evaluate.subject import Subject, open_subject
from llama3v.evaluate.summary import Summary, compare_runs, summarise
from llama3v.evaluate.table import print_scores
from llama3v.evaluate.tasks.judged import JudgedTask

IDENTITY = "run.json"
SETTINGS = ("right image", "wrong image", "blind", OVERVIEW)
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "pycocoevalcap", "nltk", "openai", "xllamacpp")


def eval(config: EvalConfig, engine: BatchEngine | None = None) -> dict[str, Any]:
    """Measure a model on tasks; the table goes to stdout.

    In `config.out`: answers/LABEL.jsonl, every answer as it came (what a second run goes on from); samples/LABEL.jsonl,
    the scored answers of this run; summary.json and eval.html.

    Args:
        engine: runs the model; default: the one that fits `config.model` or `config.url`.

    Returns the summary. Raises ConfigError, DataError, CheckpointError, ImageError, CacheError; ConfigError where
    `config.out` holds another model's answers.
    """
    started = time.perf_counter()
    tasks = [load(spec, config.limit) for spec in parse_specs(config.tasks, config.data)]  # bad data is told at once
    digests = {one.spec.label: one.digest for one in tasks}
    for one in tasks:
        for condition in _conditions(config):
            images_shown(one.samples, condition, one.keys)  # so that a control that cannot be asked is told now, too
    judge = open_judge(config)
    for one in tasks:
        if isinstance(one.task, JudgedTask):
            need_judge(judge, one.task, one.spec.label)
    trained = _read_trained(config)
    found = {one.spec.label: trained.matches(one.keys) if trained else [] for one in tasks}
    subject = open_subject(config, engine)
    _claim(config.out, subject.identity)
    records = _answer(config, tasks, subject, judge)
    rows, settled = [], {}
    for one in tasks:
        label = one.spec.label
        conditions = [name for name in SETTINGS if any(record.condition == name for record in records[label])]
        settled[label] = [record for name in conditions for record in _settled(one, records[label], name)]
        write_records(config.out / "samples" / f"{label}.jsonl", settled[label])
        row = _row(one, records[label], conditions) | {"data_digest": digests[label]}
        if judge is not None and isinstance(one.task, JudgedTask):
            row["judge"] = judge.name
        if trained is not None:
            row["contamination"] = _contamination(one, records[label], found[label])
        rows.append(row)
    summary = {
        "verb": "eval",
        "version": __version__,
        **subject.identity,
        "controls": config.controls,
        "limit": config.limit,
        "tasks": rows,
        "features_from_cache": subject.pictures.from_cache,
        "trained": None if trained is None else {"images": len(trained.keys), "hashed": len(trained.names)},
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_summary(config.out, summary)
    report = write_report(config.out / "eval.html", summary, tasks, settled, trained, found)
    print_scores(summary)
    messages().print(f"report: {report}", markup=False)
    return summary


def _read_trained(config: EvalConfig) -> Trained | None:
    """None where contamination is not asked for."""
    if config.trained_cache is None and not config.trained_data:
        return None
    with _progress() as progress:
        bar = progress.add_task("pictures of the training", total=None)
        return read_trained(config.trained_cache, config.trained_data, partial(progress.advance, bar))


def _contamination(one: LoadedTask, records: Sequence[AnswerRecord], matches: Sequence[Match]) -> dict[str, Any]:
    """Counts, the matches, and the headline of the samples that show none of them."""
    clean = clean_samples(matches, {sample.id: [image.name for image in sample.images] for sample in one.samples})
    rest = [record for record in records if record.id in clean]
    headline = one.task.figures()[0].name
    clean_score = summarise(one.task, rest, "right image").figures.get(headline) if rest else None
    same = sum(match.same_file for match in matches)
    return {
        "images": len(one.keys),
        "same_file": same,
        "near_duplicates": len(matches) - same,
        "clean_samples": len(clean),
        "clean": None if clean_score is None else asdict(clean_score),
        "matches": [asdict(match) for match in matches],
    }


def _answer(
    config: EvalConfig, tasks: Sequence[LoadedTask], subject: Subject, judge: Judge | None
) -> dict[str, list[AnswerRecord]]:
    """Label -> records of all conditions."""
    conditions = _conditions(config)
    progress = _progress()
    found: dict[str, list[AnswerRecord]] = {}
    try:
        with progress:
            bars = [progress.add_task(one.spec.label, total=len(one.samples) * len(conditions)) for one in tasks]
            for one, bar in zip(tasks, bars, strict=True):
                found[one.spec.label] = answer_task(
                    subject.engine,
                    one.task,
                    config.out / "answers" / f"{one.spec.label}.jsonl",
                    conditions=conditions,
                    samples=one.samples,
                    keys=one.keys,
                    batch=config.batch,
                    show=subject.pictures.show,
                    advance=partial(progress.advance, bar),
                )
                if judge is not None and isinstance(one.task, JudgedTask):
                    found[one.spec.label] = judge_records(
                        judge,
                        one.task,
                        one.samples,
                        found[one.spec.label],
                        config.out / "verdicts" / f"{one.spec.label}.jsonl",
                    )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the answers so far are in {config.out}; the same command goes on from them") from stop
    return found


def _conditions(config: EvalConfig) -> list[str]:
    controls = CONDITIONS if config.controls else CONDITIONS[:1]
    return [*controls, *([OVERVIEW] if config.detail == "both" else [])]


def _progress() -> Progress:
    console = messages()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _settled(one: LoadedTask, records: Sequence[AnswerRecord], condition: str) -> list[AnswerRecord]:
    return one.task.settle([record for record in records if record.condition == condition])


def _row(one: LoadedTask, records: Sequence[AnswerRecord], conditions: Sequence[str]) -> dict[str, Any]:
    """What summary.json says of a task."""
    summaries = {name: summarise(one.task, records, name) for name in conditions}
    against = [name for name in conditions if name != "right image"]
    differences = {name: compare_runs(one.task, records, records, against=name) for name in against}
    return {
        "label": one.spec.label,
        "task": one.task.name,
        "data": one.task.where,
        "rule": one.task.rule,
        "samples": len(one.samples),
        "prompt": one.samples[0].prompt,
        "max_new_tokens": one.task.max_new_tokens,
        "figure": one.task.figures()[0].name,
        "conditions": {name: _plain(summary) for name, summary in summaries.items()},
        # The headline with the right image less that under another condition, of the same samples.
        "differences": {name: asdict(found) for name, found in differences.items() if found is not None},
    }


def _plain(summary: Summary) -> dict[str, Any]:
    values = asdict(summary)
    return {name: values[name] for name in ("samples", "unparsed", "figures", "corpus", "categories")}


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Note whose answers a directory holds. Raises ConfigError where they are another's."""
    path = out / IDENTITY
    # A model's weights say whose answers they are, wherever it lies.
    now = {name: value for name, value in identity.items() if name != "model" or not identity.get("weights")}
    with suppress(FileNotFoundError):
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); choose another --out") from error
        if before != now:
            different = [name for name in {*before, *now} if before.get(name) != now.get(name)]
            raise ConfigError(
                f"{out} holds answers of another run (another {', '.join(sorted(different))}); choose another --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n")


def environment() -> dict[str, str]:
    """Versions that may move a score."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
