"""The two verbs that train: `pretrain` (stage 1) and `sft` (stage 2). This page is the order in which things happen."""

import fcntl
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llama3v import __version__
from llama3v.config import PretrainConfig, SftConfig, TrainConfig
from llama3v.data.packing import fill
from llama3v.data.sources.base import open_source
from llama3v.errors import CheckpointError
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.model.llama3v import Llama3VForConditionalGeneration, build_model, load_model, save_model
from llama3v.model.prompt import Renderer
from llama3v.train import curves, stages
from llama3v.train.batches import Batch, RowPlan, assemble
from llama3v.train.checkpoint import Checkpoints, replace_durably
from llama3v.train.dataset import Preparation, prepare
from llama3v.train.loop import Loop
from llama3v.train.meter import Meter, MetricsLog, ProgressLine, read_metrics, trim_metrics
from llama3v.train.prepared import PreparedData
from llama3v.train.resume import plain, refuse_drift, tokenizer_digest, trajectory_options, weights_digest
from llama3v.train.signals import StopRequest
from llama3v.train.validation import Validation

Model = Llama3VForConditionalGeneration


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Stage 1: align images with text. Only the projector trains.

    Leaves a complete model in `config.out`, with checkpoints, metrics.jsonl, curves.png, ledger.jsonl and
    summary.json. Run again after any interruption to resume; a finished run returns its summary.

    Returns the summary. Raises a Llama3VError for what the user can mend; SystemExit (128 + signal) after a
    checkpoint on SIGTERM or Ctrl-C.
    """

    def load() -> tuple[Model, PreTrainedTokenizerBase]:
        return build_model(
            config.vision,
            config.llm,
            cut=config.cut,
            scale_factor=config.scale_factor,
            max_tiles=config.max_tiles,
            prompt_format=config.prompt_format,
            seed=config.seed,
        )

    options = ["--vision", config.vision, "--max-tiles", str(config.max_tiles)]
    options += [] if config.cut is None else ["--cut", str(config.cut)]
    return _run(_Stage("pretrain", stages.PRETRAIN_POLICY, config, load, options), console or Console())


def sft(config: SftConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Stage 2: supervised fine-tuning on conversations; `config.policy` says what trains.

    Leaves, returns and raises what `pretrain` does.
    """

    def load() -> tuple[Model, PreTrainedTokenizerBase]:
        return load_model(config.model)

    return _run(_Stage("sft", config.policy, config, load, ["--vision", config.model]), console or Console())


@dataclass(frozen=True)
class _Stage:
    """One of the two stages with its options."""

    name: stages.Stage
    policy: str
    config: TrainConfig
    load: Callable[[], tuple[Model, PreTrainedTokenizerBase]]
    encode_options: list[str]  # with which `llama3v encode` fills the cache for this model

    @property
    def title(self) -> str:
        return self.name if self.name == "pretrain" else f"sft, policy {self.policy}"

    def encode_command(self, data: str) -> str:
        words = ["llama3v", "encode", "--data", data, *self.encode_options, "--cache", str(self.config.cache)]
        return shlex.join(words)


def _run(stage: _Stage, console: Console) -> dict[str, Any]:
    config = stage.config
    if (summary := _finished(stage)) is not None:
        console.print(f"{config.out}: this run is finished ({summary['steps']} steps); summary.json has its results")
        return summary
    config.out.mkdir(parents=True, exist_ok=True)
    with _only_run_in(config.out):
        return _train(stage, console)


def _train(stage: _Stage, console: Console) -> dict[str, Any]:
    config = stage.config
    started = Meter(0)  # from here on time counts: loading and preparing belong to the price
    model, tokenizer = stage.load()
    groups, lines = _choose_what_trains(stage, model)
    console.print(stages.as_table(lines, f"What trains: {stage.title}"))
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep_checkpoints)
    checkpoint = checkpoints.load(lambda text: console.print(text, markup=False, highlight=False))
    cache = _open_cache(model, config)
    data = _prepare(stage, model, tokenizer, cache, config.data, "training", keep=checkpoint is not None)
    plan = RowPlan(data.lengths.tolist(), config.row_tokens, config.rows_per_step, config.seed)
    steps = config.steps or plan.steps_for(config.epochs)
    identity = _identity(stage, model, tokenizer, data, steps)
    if checkpoint is not None:
        refuse_drift(checkpoint.state["identity"], identity, config.out)
    validation = _validation(stage, model, tokenizer, cache)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device)
    _set_modes(model)
    torch.manual_seed(config.seed)
    step = checkpoint.state["step"] if checkpoint else 0
    lost = trim_metrics(config.out / "metrics.jsonl", step)
    before = max(lost, checkpoint.state["seconds"]) if checkpoint else lost
    counts = checkpoint.state["counts"] if checkpoint else None
    meter = Meter(steps, config.dollars_per_hour, before + started.seconds, counts)
    metrics = MetricsLog(config.out / "metrics.jsonl")

    def make(step: int) -> tuple[int, list[Batch]]:
        rows, size = plan.rows(step), config.rows_per_pass
        passes = [rows[first : first + size] for first in range(0, len(rows), size)]
        batches = [assemble(data, some, cache.read, model.config.image_token_id) for some in passes]
        return plan.locate(step)[0], batches

    loop = Loop(
        model=model,
        optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        steps=steps,
        make=make,
        meter=meter,
        metrics=metrics,
        checkpoints=checkpoints,
        state={"identity": identity, "options": plain(config), "environment": _environment()},
        validate=lambda: validation.measure(model) if validation else {},
        warmup=config.warmup,
        clip_norm=config.clip_norm,
        bf16=config.precision == "bf16",
        checkpoint_every=config.checkpoint_every,
        validate_every=config.validate_every if validation else None,
    )
    if checkpoint is not None:
        loop.restore(checkpoint.state, checkpoint.weights, checkpoint.optimizer)
        console.print(f"resuming after step {step} of {steps}", highlight=False)
        checkpoint = None  # its tensors are copied; let the memory go
    _describe_data(console, data, plan, config, steps)
    try:
        priced = config.dollars_per_hour > 0
        with StopRequest() as stop, ProgressLine(console, stage.name, steps, step, priced=priced) as line:
            done = loop.run(line, stop)
        if done and validation:
            metrics.append({"step": steps, **loop.validate()})
    finally:
        metrics.close()
    curves.draw(config.out / "metrics.jsonl", config.out / "curves.png", stage.title)
    if not done:
        name = stop.requested.name if stop.requested else "a signal"
        at = f"step {loop.progress.step} of {steps}"
        console.print(f"stopped by {name} after {at}; a checkpoint is written: run the same command to resume")
        raise SystemExit(stop.exit_code)
    save_model(model, tokenizer, config.out)
    summary = _summary(stage, loop, data, plan, lines)
    replace_durably(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _choose_what_trains(stage: _Stage, model: Model) -> tuple[list[dict[str, Any]], list[stages.Line]]:
    lines = stages.what_trains(
        model,
        stage.name,
        stage.policy,
        learning_rate=stage.config.learning_rate,
        llm_learning_rate=getattr(stage.config, "llm_learning_rate", None),
    )
    return stages.apply(lines, model, stage.config.weight_decay), lines


def _set_modes(model: Model) -> None:
    """Dropout, where an LLM has any, acts in what trains. The tower stays in evaluation mode: its norms are not moved."""
    model.eval()
    for part in (model.projector, model.llm):
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


def _open_cache(model: Model, config: TrainConfig) -> CacheReader:
    manifest = manifest_of(
        model.vision.fingerprint(), tile_size=model.vision.tile_size, max_tiles=model.config.max_tiles
    )
    return CacheReader(config.cache, manifest=manifest)


def _prepare(
    stage: _Stage,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    cache: CacheReader,
    names: tuple[str, ...],
    purpose: str,
    *,
    keep: bool,
    limit: int | None = None,
) -> PreparedData:
    config = stage.config
    renderer = Renderer(tokenizer, model.config.prompt_format, model.tokens_per_tile, model.config.image_token_id)
    limit = config.limit if limit is None else limit
    preparation = Preparation(
        sources=[open_source(name, limit) for name in names],
        names=names,
        cache=cache,
        renderer=renderer,
        row_tokens=config.row_tokens,
        made_from={
            "tokenizer": tokenizer_digest(tokenizer),
            "prompt_format": model.config.prompt_format,
            "tokens_per_tile": model.tokens_per_tile,
            "cache": cache.fingerprint,
            "limit": limit,
        },
        max_bad_ratio=config.max_bad_ratio,
        encode_command=stage.encode_command,
    )
    ledger = "ledger.jsonl" if purpose == "training" else f"ledger-{purpose}.jsonl"
    return prepare(preparation, config.out / "prepared" / purpose, config.out / ledger, keep=keep)


def _validation(
    stage: _Stage, model: Model, tokenizer: PreTrainedTokenizerBase, cache: CacheReader
) -> Validation | None:
    config = stage.config
    if config.validation is None:
        return None
    data = _prepare(
        stage, model, tokenizer, cache, (config.validation,), "validation",
        keep=True, limit=config.validation_samples,
    )  # fmt: skip
    return Validation(data, cache.read, config.row_tokens, config.rows_per_pass, config.precision == "bf16")


def _identity(
    stage: _Stage, model: Model, tokenizer: PreTrainedTokenizerBase, data: PreparedData, steps: int
) -> dict[str, Any]:
    """What decides the losses: a resumed run must have the same."""
    return {
        "stage": stage.name,
        "policy": stage.policy,
        "steps": steps,
        "options": trajectory_options(stage.config),
        "model": weights_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "data": {**data.made_from, "samples": len(data), "digest": data.digest},
    }


def _environment() -> dict[str, Any]:
    import transformers

    return {
        "llama3v": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _describe_data(console: Console, data: PreparedData, plan: RowPlan, config: TrainConfig, steps: int) -> None:
    left_out = f" ({data.left_out:,} left out, see ledger.jsonl)" if data.left_out else ""
    rows = plan.epoch(0)
    share = fill(rows, data.lengths.tolist(), config.row_tokens)
    console.print(
        f"{len(data):,} samples{left_out} in {len(rows):,} rows of {config.row_tokens:,} tokens, {share:.1%} full; "
        f"{steps:,} steps of {config.rows_per_step} rows",
        highlight=False,
    )


def _summary(stage: _Stage, loop: Loop, data: PreparedData, plan: RowPlan, lines: list[stages.Line]) -> dict[str, Any]:
    records = list(read_metrics(loop.metrics.path))
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last = max(1, len(losses) // 20)
    measured: dict[str, Any] = next((record for record in reversed(records) if "validation_loss" in record), {})
    return {
        "verb": stage.name,
        "policy": stage.policy,
        "finished": True,
        "model": str(stage.config.out),
        "steps": loop.steps,
        "skipped_steps": loop.progress.skipped,
        "epochs": plan.locate(loop.steps - 1)[0] + 1,
        "samples": len(data),
        "left_out": data.left_out,
        "fill": fill(plan.epoch(0), data.lengths.tolist(), stage.config.row_tokens),
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
        "options": plain(stage.config),
        "environment": _environment(),
    }


def _finished(stage: _Stage) -> dict[str, Any] | None:
    """The summary of a finished run in `out`, or None. CheckpointError where it was another run."""
    path = stage.config.out / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); remove it and run again") from error
    if not summary.get("finished") or summary.get("verb") not in ("pretrain", "sft"):
        return None
    free = ("out", "cache", "dollars_per_hour", "checkpoint_every", "keep_checkpoints", "max_bad_ratio")
    now = {**plain(stage.config), "verb": stage.name}
    before = {**summary["options"], "verb": summary["verb"]}
    refuse_drift(
        {name: value for name, value in before.items() if name not in free},
        {name: value for name, value in now.items() if name not in free},
        stage.config.out,
    )
    return summary


@contextmanager
def _only_run_in(out: Path) -> Iterator[None]:
    """Hold the directory for this process; the kernel lets go when it ends, however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process trains in {out}; wait for it, or choose another --out") from error
        yield
