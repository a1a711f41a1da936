"""report.html of a training run: how it ended, curves, speed, price, what trained, answers with pictures, options.

Written at the end and on a clean stop, from what the run has left in its directory: nothing is measured here.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama3v.report import GalleryItem, Report
from llama3v.train.alarm import ALARMS
from llama3v.train.display import clock, dollars
from llama3v.train.meter import Record, read_metrics
from llama3v.train.samples import SAMPLES

REPORT = "report.html"
ALARMS_SHOWN = 20


def write_report(out: Path, title: str, summary: dict[str, Any], ended: str) -> Path:
    """Write out/report.html.

    Args:
        summary: as summary.py makes it, of a finished run or of one that stopped before.
        ended: how the run ended, in a sentence.
    """
    records = list(read_metrics(out / "metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    report = Report(f"Training: {title}", ended)
    report.add_figures(_figures(summary, steps))
    _add_curves(report, steps, [record for record in records if "validation_loss" in record])
    _add_answers(report, out, list(read_metrics(out / SAMPLES)))
    _add_speed(report, steps)
    _add_price(report, summary, steps)
    report.add_table(
        "What trained",
        ["parameters named", "parameters", "learning rate"],
        [[line["pattern"], line["parameters"], _rate(line)] for line in summary["what_trains"]],
    )
    _add_alarms(report, list(read_metrics(out / ALARMS)))
    report.add_code("Command", shlex.join(["llama3v", *sys.argv[1:]]) if _is_command() else "from Python")
    report.add_table(
        "Options", ["option", "value"], [[name, _plain(value)] for name, value in summary["options"].items()]
    )
    environment = summary["environment"]
    report.add_table("Environment", ["part", "version"], [[name, str(value)] for name, value in environment.items()])
    return report.write(out / REPORT)


def _figures(summary: dict[str, Any], steps: Sequence[Record]) -> list[tuple[str, Any, str]]:
    figures: list[tuple[str, Any, str]] = [
        ("steps", f"{len(steps):,}", f"of {summary['steps']:,}, {summary['epochs']:g} epochs"),
        ("training loss", summary["loss"], "per supervised token, at the end"),
    ]
    if summary.get("validation_gap") is not None:
        figures.append(("validation loss", summary["validation_loss"], "with the right images"))
        figures.append(("gap", summary["validation_gap"], "how much worse with shuffled images: what it sees"))
    elif "validation_loss" in summary:
        figures.append(("validation loss", summary["validation_loss"], ""))
    figures.append(("time", clock(summary["seconds"]), "loading included"))
    if summary["options"]["dollars_per_hour"]:
        price = f"at {dollars(summary['options']['dollars_per_hour'])} an hour"
        figures.append(("cost", dollars(summary["dollars"]), price))
    if (mfu := mean_mfu(steps)) is not None:
        figures.append(("MFU", f"{mfu:.0%}", "of what this device's matrix products reach"))
    return figures


def _add_curves(report: Report, steps: Sequence[Record], validations: Sequence[Record]) -> None:
    curves = {"training": _points(steps, "loss")}
    for name, key in (("validation", "validation_loss"), ("shuffled images", "validation_loss_shuffled")):
        if points := [point for point in _points(validations, key) if point[1] is not None]:
            curves[name] = points
    skipped = steps[-1]["skipped"] if steps else 0
    note = f"{skipped} steps had no finite loss or gradient and changed nothing." if skipped else ""
    report.add_plot("Loss", curves, "step", "loss per supervised token", note=note)
    report.add_plot("Learning rate", {"learning rate": _points(steps, "learning_rate")}, "step", "peak of all groups")


def _add_speed(report: Report, steps: Sequence[Record]) -> None:
    kinds = ("visual", "text", "supervised")
    curves = {kind: _points(steps, f"{kind}_tokens_per_second") for kind in kinds}
    report.add_plot("Throughput", curves, "step", "tokens per second, mean of the last 20 steps")
    shares = {"waiting for data": _points(steps, "wait_share")}
    if any(step.get("mfu") is not None for step in steps):
        shares["MFU"] = _points(steps, "mfu")
    report.add_plot(
        "Use of the device",
        shares,
        "step",
        "share",
        note="MFU: operations that the model needs, over what matrix products of this device reached at the run's start.",
    )


def _add_price(report: Report, summary: dict[str, Any], steps: Sequence[Record]) -> None:
    per_hour, seconds = summary["options"]["dollars_per_hour"], max(summary["seconds"], 1e-9)
    in_steps = sum(step["step_seconds"] for step in steps)
    waited = sum(step["step_seconds"] * step["wait_share"] for step in steps)
    rows = [
        ["steps", in_steps - waited],
        ["waiting for data", waited],
        ["loading, validation, answers, checkpoints, interruptions", max(0.0, seconds - in_steps)],
    ]
    columns, priced = ["what", "seconds", "share"], bool(per_hour)
    table = [
        [name, round(spent, 1), f"{spent / seconds:.1%}", *([dollars(spent / 3600 * per_hour)] if priced else [])]
        for name, spent in rows
    ]
    report.add_table("Time and cost", [*columns, "cost"] if priced else columns, table)
    totals: list[list[Any]] = [[name.replace("_", " "), summary[name]] for name in ("samples", "left_out", "tiles")]
    totals += [[f"{kind} tokens", summary[f"{kind}_tokens"]] for kind in ("visual", "text", "supervised")]
    if priced and (tokens := summary["visual_tokens"] + summary["text_tokens"]):
        totals.append(["dollars per million tokens", summary["dollars"] / tokens * 1e6])
    if steps and steps[-1].get("memory_gb") is not None:
        totals.append(["peak memory, GB", steps[-1]["memory_gb"]])
    note = f"Rows were {summary['fill']:.1%} full. Samples that were left out stand in ledger.jsonl with the reason."
    report.add_table("What was processed", ["", "count"], totals, note)


def _add_answers(report: Report, out: Path, lines: Sequence[Record]) -> None:
    """Each sample once, with what the model said at the start, in the middle and at the end."""
    if not lines:
        return
    chosen = sorted({0, (len(lines) - 1) // 2, len(lines) - 1})
    items, without = [], []
    for number, sample in enumerate(lines[-1]["samples"]):
        said: list[tuple[str, str, bool | None]] = [("question", sample["question"], None)]
        said.append(("expected", sample["expected"], None))
        for place in chosen:
            answer = lines[place]["samples"][number]["answer"]
            said.append((f"step {lines[place]['step']:,}", answer or "(nothing)", None))
        pictures = [out / name for name in sample["pictures"] if (out / name).is_file()]
        if pictures:
            items.append(GalleryItem(pictures[0].read_bytes(), said))
        else:
            without.append([text for _, text, _ in said])
    if items:
        report.add_gallery("Sample answers", items, "Greedy answers; samples.jsonl has all of them.")
    if without:
        columns = ["question", "expected", *(f"step {lines[place]['step']:,}" for place in chosen)]
        report.add_table("Sample answers without pictures", columns, without, "Their images are not on this machine.")


def _add_alarms(report: Report, alarms: Sequence[Record]) -> None:
    if not alarms:
        return
    rows = [
        [alarm["step"], alarm["loss"], alarm["usual"], alarm["deviations"], ", ".join(alarm["samples"][:3]) + " ..."]
        for alarm in alarms[:ALARMS_SHOWN]
    ]
    report.add_table(
        "Loss alarms",
        ["step", "loss", "usual", "deviations above", "samples"],
        rows,
        f"{len(alarms)} steps had a loss far above the steps before; {ALARMS} has all their samples.",
    )


def mean_mfu(steps: Sequence[Record]) -> float | None:
    """Over the run, weighted by time; None where it was not measured."""
    measured = [(step["mfu"], step["step_seconds"]) for step in steps if step.get("mfu") is not None]
    seconds = sum(seconds for _, seconds in measured)
    return sum(mfu * seconds for mfu, seconds in measured) / seconds if seconds else None


def _points(records: Sequence[Record], key: str) -> list[tuple[float, float | None]]:
    return [(record["step"], record.get(key)) for record in records]


def _rate(line: dict[str, Any]) -> str:
    return "frozen" if line["learning_rate"] is None else f"{line['learning_rate']:g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_command() -> bool:
    return bool(sys.argv) and Path(sys.argv[0]).stem in ("llama3v", "__main__")
