"""The model card: what every export says of its model beside how to run it. Front matter, training, licences.

The writers of the formats leave a README.md that tells how to run the export; `finish_card` completes it, and lays the
training log beside it as training.json. Both come out of the summary.json of the training runs.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from llama3v.exporters import licence

_MOST_RUNS = 16
_TRAININGS = ("pretrain", "sft")
_KEPT = (
    *("verb", "policy", "steps", "epochs", "samples", "left_out"),
    *("first_loss", "loss", "validation_loss", "validation_loss_shuffled", "validation_gap"),
    *("visual_tokens", "text_tokens", "supervised_tokens", "tiles", "seconds", "dollars"),
    *("trained_parameters", "what_trains", "environment"),
)
_OPTIONS = (
    *("data", "vision", "llm", "learning_rate", "llm_learning_rate", "rows_per_step", "row_tokens", "precision"),
    *("llm_weights", "lora_rank", "mode", "recipe", "seed", "dollars_per_hour"),
)


def training_log(model: str) -> list[dict[str, Any]]:
    """What the runs that made a model say of themselves, the first one first; empty where they left no summary.json.

    Names of files and directories are cut to their last part: a card tells nothing of the machine.
    """
    return [
        {key: summary[key] for key in _KEPT if summary.get(key) is not None}
        | {"options": {key: _named(options[key]) for key in _OPTIONS if options.get(key) not in (None, "", 0)}}
        for summary in reversed(list(_summaries(model)))
        if (options := summary.get("options", {})) is not None
    ]


def finish_card(directory: Path, model: str, base: str | None) -> list[str]:
    """Complete README.md in `directory`; lay training.json, NOTICE and the licence agreement beside it.

    Args:
        base: the Llama 3 that the model is built on, as `licence.base_of` has it.

    Returns:
        what the user must still do before the export is distributed.
    """
    log = training_log(model)
    sources = _sources(log)
    if log:
        (directory / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    warnings = []
    if base is not None:
        (directory / "NOTICE").write_text(licence.notice(base))
        if not _copy_agreement(directory, model):
            warnings.append(
                f"the base is {base}: its licence agreement must go with the model; put it there as LICENSE before you "
                f"distribute it ({licence.address(base)}), or lay it beside the model as LICENSE and export again"
            )
    readme = directory / "README.md"
    readme.write_text(_with_front_matter(readme.read_text(), sources, base) + _training(log) + _licences(sources, base))
    return warnings


def _summaries(model: str) -> Iterator[dict[str, Any]]:
    """Of the last run first. A merge is passed through; a run's first stage is where its options say."""
    for _ in range(_MOST_RUNS):
        try:
            summary = json.loads((Path(model) / "summary.json").read_text())
            verb, options = summary["verb"], summary.get("options") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a hub name, or a model that something else made
        if verb in _TRAININGS:
            yield summary
            model = str(options.get("model") or "")
        elif verb == "quickstart":  # it holds those of its stages
            yield from (summary[stage] for stage in reversed(_TRAININGS) if isinstance(summary.get(stage), dict))
            return
        elif verb == "merge":
            model = str(summary.get("model") or "")
        else:
            return
        if not model:
            return


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return value if _is_hub_name(value) else PurePath(value).name
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value


def _is_hub_name(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not Path(text).exists()


def _sources(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """ "vision" and "llm" -> what the model was built of, as far as it is known."""
    options = [run["options"] for run in log]
    return {
        part: next(o[part] for o in options if part in o)
        for part in ("vision", "llm")
        if any(part in o for o in options)
    }


def _with_front_matter(readme: str, sources: dict[str, str], base: str | None) -> str:
    """Licence, base models and tags, as hubs read them at the head of the file."""
    lines = [f"license: {licence.identifier(sources.get('llm'), base)}"]
    if hub_names := [name for name in sources.values() if "/" in name]:
        lines += ["base_model:", *(f"- {name}" for name in hub_names)]
    lines += ["tags:", "- llama-3-v", "- vision-language-model"]
    return readme.replace("---\n", "---\n" + "\n".join(lines) + "\n", 1)


def _training(log: Sequence[dict[str, Any]]) -> str:
    if not log:
        return "\n## Training\n\nNo summary.json of a training lay beside the model: its data, time and cost are not known.\n"
    rows = [
        "| stage | data | steps | loss | on other data | with shuffled images | time | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in log:
        policy = f" ({run['policy']})" if run["verb"] == "sft" and "policy" in run else ""
        cells = [
            run["verb"] + policy,
            ", ".join(run["options"].get("data", [])) or "-",
            f"{run.get('steps', 0):,}",
            *(_number(run.get(key)) for key in ("loss", "validation_loss", "validation_loss_shuffled")),
            _duration(run.get("seconds", 0)),
            _dollars(run),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    seconds, dollars = (sum(run.get(key, 0) for run in log) for key in ("seconds", "dollars"))
    priced = all("dollars_per_hour" in run["options"] for run in log)
    total = f"In all {_duration(seconds)}" + (f" and ${dollars:,.2f}" if priced else "")
    device = log[-1].get("environment", {}).get("device", "an unknown device")
    more = "Loss is the mean negative logarithm of a supervised token's probability. training.json has the rest."
    return "\n## Training\n\n" + "\n".join(rows) + f"\n\n{total}, on {device}. {more}\n"


def _licences(sources: dict[str, str], base: str | None) -> str:
    parts = {"llm": "language model", "vision": "vision tower"}
    lines = [
        f"- {words}: {sources.get(part, 'not known')}, {licence.in_words(sources.get(part), base if part == 'llm' else None)}"
        for part, words in parts.items()
    ]
    note = "\nThe data it was trained on may have terms of their own.\n"
    return "\n## Licences\n\n" + "\n".join(lines) + "\n" + note


def _copy_agreement(directory: Path, model: str) -> bool:
    """Lay the base's licence agreement into the export, where it lies beside the model or its language model."""
    beside = [Path(model)]
    beside += [Path(str(llm)) for summary in _summaries(model) if (llm := (summary.get("options") or {}).get("llm"))]
    for folder in beside:
        for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, directory / "LICENSE")
                if (policy := folder / "USE_POLICY.md").is_file():
                    shutil.copyfile(policy, directory / policy.name)
                return True
    return False


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _dollars(run: dict[str, Any]) -> str:
    price = run["options"].get("dollars_per_hour")
    return f"${run.get('dollars', 0):,.2f} at ${price:g} an hour" if price else "not stated"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
