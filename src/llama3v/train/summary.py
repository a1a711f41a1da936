"""summary.json: what a finished run has to say, and whether there is one already."""

import json
from collections.abc import Sequence
from typing import Any

from llama3v.config import TrainConfig
from llama3v.errors import CheckpointError
from llama3v.train.batches import RowPlan
from llama3v.train.loop import Loop
from llama3v.train.meter import read_metrics
from llama3v.train.prepared import PreparedData
from llama3v.train.resume import FREE, environment, plain, refuse_drift
from llama3v.train.stages import Line, Stage
from llama3v.train.train_report import mean_mfu


def summarise(
    stage: Stage,
    policy: str,
    config: TrainConfig,
    loop: Loop,
    data: PreparedData,
    plan: RowPlan,
    lines: Sequence[Line],
    fullness: float,
    *,
    finished: bool,
) -> dict[str, Any]:
    """The summary of a run that has reached its last step, or of one that stops before.

    Args:
        lines: what trained. fullness: share of the rows' tokens that is not padding.
    """
    records = list(read_metrics(loop.metrics.path))
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last = max(1, len(losses) // 20)
    measured: dict[str, Any] = next((record for record in reversed(records) if "validation_loss" in record), {})
    return {
        "verb": stage,
        "policy": policy,
        "finished": finished,
        "model": str(config.out),
        "steps": loop.schedule.steps,
        "skipped_steps": loop.progress.skipped,
        "loss_alarms": sum("loss_alarm" in record for record in records),
        "mfu": mean_mfu([record for record in records if "loss" in record]),
        "epochs": plan.epochs_in(loop.progress.step),
        "samples": len(data),
        "left_out": data.left_out,
        "below_min_score": data.below_min_score,
        "fill": fullness,
        "first_loss": losses[0] if losses else None,
        "loss": sum(losses[-last:]) / last if losses else None,  # mean over the last twentieth
        **{name: value for name, value in measured.items() if name.startswith("validation")},
        **loop.meter.counts,
        "seconds": round(loop.meter.seconds, 2),
        "dollars": round(loop.meter.dollars, 6),
        "trained_parameters": sum(line.parameters for line in lines if line.learning_rate is not None),
        "what_trains": [
            {"pattern": line.pattern, "parameters": line.parameters, "learning_rate": line.learning_rate}
            for line in lines
        ],
        "options": plain(config),
        "environment": environment(),
    }


def finished_run(stage: Stage, config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a finished run in `config.out`, or None. CheckpointError where it was another run."""
    path = config.out / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); remove it and run again") from error
    if not summary.get("finished") or summary.get("verb") not in ("pretrain", "sft"):
        return None
    now = {**_asked(plain(config)), "verb": stage}
    refuse_drift({**_asked(summary["options"]), "verb": summary["verb"]}, now, config.out)
    return summary


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a finished run's results depend on."""
    return {name: value for name, value in options.items() if name not in FREE or name.startswith("validat")}
