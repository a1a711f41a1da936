"""`llama3v ablate`: trainings that differ in one thing, from one feature cache, compared seed by seed.

    out/stage1/CHANGES/seed-N   stage 1, shared by the variants that differ in stage 2 only
    out/stage2/VARIANT/seed-N   stage 2
    out/ablation.json, ablation.html

A training is this package's own `pretrain` or `sft`, so it resumes by itself. What it measured is kept in its
summary.json; its weights and checkpoints are removed when nothing needs them any more.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama3v
from llama3v.config import AblateConfig, PretrainConfig, SftConfig
from llama3v.evaluate.ablation_report import print_table, write_report
from llama3v.evaluate.ablation_table import rows_of
from llama3v.evaluate.variants import Variant, base_codec, parse_variants
from llama3v.train.checkpoint import replace_durably
from llama3v.train.summary import finished_run

WEIGHTS = ("model*.safetensors*", "parts.safetensors", "checkpoints", "prepared")


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Train what is not trained yet, and compare; returns what ablation.json holds.

    Seeds are the outer loop, so that an interrupted ablation has whole comparisons. Raises ConfigError for variants
    that are unknown or have no effect here, and what `pretrain` and `sft` raise, CheckpointError among them where
    `out` holds trainings with other options.
    """
    from rich.console import Console

    variants = parse_variants(config.variants, config.sft_steps)
    console = Console(stderr=True)
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    total = len(config.seeds) * len(variants)
    for number, seed in enumerate(config.seeds):
        for place, variant in enumerate(variants):
            done = number * len(variants) + place
            console.rule(f"[bold]{done + 1} of {total}: {variant.name}, seed {seed}", align="left")
            runs[variant.name].append(_train(config, variant, seed))
        if not config.keep_models:
            _drop_weights([_stage_1_directory(config, variant, seed) for variant in variants])
    summary = {
        "verb": "ablate",
        "version": llama3v.__version__,
        "stage": 2 if config.sft_steps else 1,
        "seeds": list(config.seeds),
        "variants": rows_of(runs),
        "options": _plain(config),
        "environment": runs[variants[0].name][0]["environment"],
    }
    replace_durably(config.out / "ablation.json", json.dumps(summary, indent=1) + "\n")
    write_report(config.out / "ablation.html", summary)
    print_table(summary)
    return summary


def _train(config: AblateConfig, variant: Variant, seed: int) -> dict[str, Any]:
    """The summary of a variant's last stage, with the seconds and dollars of both."""
    if not config.sft_steps:
        first = _stage_1(config, variant, seed)
        assert first is not None  # `parse_variants` sees to it
        return first
    second = config.out / "stage2" / variant.name / f"seed-{seed}"
    options = SftConfig(
        **_shared(config, seed) | variant.second,
        out=second,
        model=str(_stage_1_directory(config, variant, seed)),
        steps=config.sft_steps,
        learning_rate=config.learning_rate,
        llm_learning_rate=config.llm_learning_rate,
    )
    summary = finished_run("sft", options)
    if summary is None:
        _stage_1(config, variant, seed, needs_weights=True)
        summary = llama3v.sft(options)
        if not config.keep_models:
            _drop_weights([second])
    price = _read(_stage_1_directory(config, variant, seed) / "summary.json")
    return summary | {name: summary[name] + price.get(name, 0) for name in ("seconds", "dollars")}


def _stage_1(
    config: AblateConfig, variant: Variant, seed: int, *, needs_weights: bool = False
) -> dict[str, Any] | None:
    """Train a projector; without stage 1, only write the model that stage 2 begins with, and return None.

    Args:
        needs_weights: train again where an ablation before has removed them.
    """
    changes = {"max_tiles": config.max_tiles, "scale_factor": config.scale_factor} | variant.first
    directory = _stage_1_directory(config, variant, seed)
    if variant.stage_1:
        if needs_weights and (directory / "summary.json").is_file() and not (directory / "model.safetensors").is_file():
            shutil.rmtree(directory)
        shared = _shared(config, seed) | {"steps": config.pretrain_steps, "learning_rate": config.learning_rate}
        options = PretrainConfig(**shared | changes, out=directory, vision=config.vision, llm=config.llm)
        summary: dict[str, Any] = llama3v.pretrain(options)
        return summary
    from llama3v.model.llama3v import build_model, save_model

    changes.pop("codec", None)  # how features are read, not what the model is
    model, tokenizer = build_model(config.vision, config.llm, **changes, seed=seed)
    save_model(model, tokenizer, directory)
    return None


def _stage_1_directory(config: AblateConfig, variant: Variant, seed: int) -> Path:
    words = [f"{name}-{value}" for name, value in sorted(variant.first.items())]
    name = "+".join(words) or "base"
    return config.out / "stage1" / (name if variant.stage_1 else f"untrained+{name}") / f"seed-{seed}"


def _shared(config: AblateConfig, seed: int) -> dict[str, Any]:
    steps = max(config.pretrain_steps, config.sft_steps)
    return {
        "data": config.data,
        "cache": config.cache,
        "codec": base_codec(config.variants),
        "validation": config.validation,
        "validation_samples": config.validation_samples,
        "row_tokens": config.row_tokens,
        "rows_per_step": config.rows_per_step,
        "rows_per_pass": config.rows_per_step,
        "precision": config.precision,
        "limit": config.limit,
        "dollars_per_hour": config.dollars_per_hour,
        "seed": seed,
        "checkpoint_every": max(1, steps // 4),
        "keep_checkpoints": 1,
    }


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _drop_weights(directories: Sequence[Path]) -> None:
    for directory in directories:
        for path in [path for pattern in WEIGHTS for path in directory.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _plain(config: AblateConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
