"""The two verbs that train: `pretrain` (stage 1) and `sft` (stage 2). This page is the order in which things happen."""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llama3v import recipes
from llama3v.config import PretrainConfig, SftConfig, TrainConfig
from llama3v.data import packing
from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.llama3v import Llama3VForConditionalGeneration, save_model
from llama3v.train import curves, stages, start
from llama3v.train.attention import choose_attention
from llama3v.train.batches import RowPlan, make_pass
from llama3v.train.checkpoint import Checkpoint, Checkpoints, replace_durably, told_when_full
from llama3v.train.dry_run import dry_run
from llama3v.train.features.base import Demand
from llama3v.train.inputs import Inputs, entered_ring, open_features, open_inputs
from llama3v.train.instruments import open_instruments
from llama3v.train.loop import Loop, Schedule
from llama3v.train.parallel.placement import Placement, parameters_of, place, share_of_rows
from llama3v.train.parallel.ranks import Ranks, joined
from llama3v.train.prepared import PreparedData
from llama3v.train.resume import (
    differences,
    environment,
    plain,
    refuse_drift,
    refuse_unequal,
    tokenizer_digest,
    trajectory_options,
    weights_digest,
)
from llama3v.train.samples import SampleAnswers
from llama3v.train.saving import Saver
from llama3v.train.signals import StopRequest
from llama3v.train.step import recompute_activations, set_modes
from llama3v.train.summary import finished_run, summarise
from llama3v.train.train_report import write_report

BETAS = (0.9, 0.95)  # as Llama was trained (arXiv 2302.13971, section 2.3)

Model = Llama3VForConditionalGeneration


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Stage 1: align images with text. Only the projector trains.

    With `config.dry_run` nothing is trained: the plan is printed and returned (train/dry_run.py). Else it leaves a complete model in `config.out`, with checkpoints, metrics.jsonl, curves.png, ledger.jsonl and
    summary.json. Run again after any interruption to resume; a finished run returns its summary.

    Returns the summary. Raises a Llama3VError for what the user can mend; SystemExit after a
    checkpoint: 128 + signal on SIGTERM or Ctrl-C, 3 where an option (--budget) asked for the stop.
    """

    options = ["--vision", config.vision, "--max-tiles", str(config.max_tiles)]
    options += [] if config.cut is None else ["--cut", str(config.cut)]
    stage = _Stage("pretrain", stages.PRETRAIN_POLICY, config, lambda: start.new_model(config), options)
    return _run(stage, console or Console())


def sft(config: SftConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Stage 2: supervised fine-tuning on conversations; `config.policy` says what trains.

    Leaves, returns and raises what `pretrain` does.
    """
    options = ["--vision", config.model]
    options += [] if config.max_tiles is None else ["--max-tiles", str(config.max_tiles)]
    stage = _Stage("sft", config.policy, config, lambda: start.trained_model(config), options)
    return _run(stage, console or Console())


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


def _run(stage: _Stage, console: Console) -> dict[str, Any]:
    with joined(stage.config.rank_timeout) as ranks:
        return _run_as(ranks, stage, console if ranks.is_main else Console(quiet=True))


def _run_as(ranks: Ranks, stage: _Stage, console: Console) -> dict[str, Any]:
    config = stage.config
    share_of_rows(config.rows_per_step, ranks)
    if not ranks.alone and (config.dry_run or config.ring is not None):
        option = "--dry-run" if config.dry_run else "--ring"
        raise ConfigError(f"{option} is for one process, and these are {ranks.count}; leave it away, or torchrun")
    if config.dry_run:
        verb = pretrain if stage.name == "pretrain" else sft
        return dry_run(config, stage.name, stage.policy, verb, console)  # type: ignore[arg-type]
    if (summary := ranks.on_main(lambda: finished_run(stage.name, config))) is not None:
        _say(console, f"{config.out}: this run is finished ({summary['steps']} steps); summary.json has its results")
        return summary
    if config.recipe:
        _say(console, recipes.in_words(config, stage.name))
    if ranks.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
    with _only_run_in(config.out) if ranks.is_main else nullcontext(), told_when_full(config.out), ExitStack() as stack:
        return _train(stage, console, ranks, stack)


def _train(stage: _Stage, console: Console, ranks: Ranks, stack: ExitStack) -> dict[str, Any]:
    config, begun = stage.config, perf_counter()  # loading and preparing belong to the price
    ring = stack.enter_context(entered_ring(config))
    model, tokenizer = stage.load()
    groups, lines = _choose_what_trains(stage, model)
    console.print(stages.as_table(lines, f"What trains: {stage.title}"))
    checkpoint = Checkpoints(_directory(config), readers=ranks).load(lambda text: _say(console, text))
    source = stack.enter_context(closing(open_features(config, model, ring)))
    open_them = partial(open_inputs, config, model, tokenizer, source, checkpoint, stage.encode_options)
    inputs = _after_main(ranks, open_them)
    data, validation = inputs.data, inputs.validation
    plan = _plan(config, data, ranks)
    steps = config.steps or plan.steps_for(config.epochs)
    state = {
        "identity": _identity(stage, model, tokenizer, data, steps),
        "options": plain(config),
        "environment": {**environment(), "processes": ranks.count},
    }
    refuse_unequal(ranks, state["identity"])
    if checkpoint is not None:
        refuse_drift(checkpoint.state["identity"], state["identity"], config.out)
    fullness = packing.fill(plan.epoch(0), data.lengths.tolist(), config.row_tokens)
    _describe_data(console, data, plan, fullness, steps)
    _announce_resume(console, checkpoint, steps, state["environment"])

    set_modes(model)
    placed = _place(config, model, ranks, console)
    instruments = open_instruments(
        config, stage.name, placed, checkpoint, steps, begun, data=data, plan=plan, questions=inputs.questions
    )
    loop = Loop(
        placed=placed,
        optimizer=torch.optim.AdamW(parameters_of(model, groups), betas=BETAS, fused=True),
        schedule=_schedule(config, plan, steps),
        make=lambda number: make_pass(number, plan, data, source, model.config.image_token_id),
        source=source,
        meter=instruments.meter,
        metrics=instruments.metrics,
        saver=_saver(config, placed),
        state=state,
        pace=instruments.pace,
        watchers=instruments.watchers,
        validate=None if validation is None else lambda: validation.measure(placed),
    )
    if checkpoint is not None:
        loop.restore(checkpoint)
    source.expect(_demand(config, inputs, plan, loop, instruments.answers))
    with StopRequest() as stop, instruments.watching(console, loop.progress.step, stop) as display:
        stop.then(source.stop)
        stop.patient = not ranks.alone
        source.report_waiting(display.note)
        done = loop.run(stop)
    summarised = partial(summarise, stage.name, stage.policy, config, loop, data, plan, lines, fullness)
    if not done:
        stopped = _stopped(stop, loop)
        if loop.progress.step and ranks.is_main:
            write_report(config.out, stage.title, summarised(finished=False), stopped)
        _say(console, stopped)
        raise SystemExit(stop.exit_code)
    source.finished()
    placed.make_whole()

    def leave_results() -> dict[str, Any]:
        curves.draw(instruments.metrics.path, config.out / "curves.png", stage.title)
        save_model(model, tokenizer, config.out)
        summary = summarised(finished=True)
        write_report(config.out, stage.title, summary, f"finished after {steps:,} steps")
        replace_durably(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    return ranks.on_main(leave_results)


def _after_main(ranks: Ranks, open_them: Callable[..., Inputs]) -> Inputs:
    """What a run reads: prepared by rank 0, then taken by the others."""
    if ranks.alone:
        return open_them()
    opened: list[Inputs] = []
    ranks.on_main(lambda: opened.append(open_them()))
    return opened[0] if ranks.is_main else open_them(prepared_already=True)


def _plan(config: TrainConfig, data: PreparedData, ranks: Ranks) -> RowPlan:
    rows = config.row_tokens, config.rows_per_step, config.rows_per_pass
    return RowPlan(data.lengths.tolist(), *rows, config.seed, data.tiles.tolist(), rank=ranks.number, ranks=ranks.count)


def _place(config: TrainConfig, model: Model, ranks: Ranks, console: Console) -> Placement:
    if config.activation_checkpointing:
        recompute_activations(model)
    device = torch.device("cuda", ranks.local) if torch.cuda.is_available() else torch.device("cpu")
    bf16 = config.precision == "bf16"
    chosen = choose_attention(model.llm, device, config.attention, bf16=bf16)
    if device.type == "cuda":
        _say(console, f"attention: {chosen}")
    return place(config.parallel, model, device, bf16=bf16, ranks=ranks)


def _saver(config: TrainConfig, placed: Placement) -> Saver:
    writers = placed.ranks.beside("checkpoints") if placed.sharded else None
    return Saver(Checkpoints(_directory(config), config.keep_checkpoints, writers=writers), placed.ranks)


def _choose_what_trains(stage: _Stage, model: Model) -> tuple[list[dict[str, Any]], list[stages.Line]]:
    lines = stages.what_trains(
        model,
        stage.name,
        stage.policy,
        learning_rate=stage.config.learning_rate,
        llm_learning_rate=getattr(stage.config, "llm_learning_rate", None),
    )
    return stages.apply(lines, model, stage.config.weight_decay), lines


def _directory(config: TrainConfig) -> Path:
    return config.out / "checkpoints"


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
        "made_from": data.made_from,
        "data": {"samples": len(data), "digest": data.digest},
        "packing": packing.VERSION,
    }


def _schedule(config: TrainConfig, plan: RowPlan, steps: int) -> Schedule:
    return Schedule(
        steps=steps,
        passes_per_step=plan.passes_per_step,
        warmup=config.warmup,
        clip_norm=config.clip_norm,
        seed=config.seed,
        validate_every=config.validate_every,
    )


def _demand(config: TrainConfig, inputs: Inputs, plan: RowPlan, loop: Loop, answers: SampleAnswers) -> Demand:
    validation, schedule = inputs.validation, loop.schedule

    def keys_of(step: int) -> list[str]:
        keys = [key for row in plan.rows(step) for sample in row for key in inputs.data.images(sample)]
        if validation is not None and schedule.validates_after(step + 1):
            keys += [key for sample in range(len(validation.data)) for key in validation.data.images(sample)]
        if answers.due(step + 1):
            keys += answers.images
        return list(dict.fromkeys(keys))

    epoch_steps = -(-len(plan.epoch(0)) // plan.rows_per_step)
    return Demand(keys_of, loop.progress.step, schedule.steps, epoch_steps, config.checkpoint_every)


def _describe_data(console: Console, data: PreparedData, plan: RowPlan, fullness: float, steps: int) -> None:
    left_out = f" ({data.left_out:,} left out: see ledger.jsonl)" if data.left_out else ""
    rows = len(plan.epoch(0))
    _say(
        console,
        f"{len(data):,} samples{left_out} in {rows:,} rows an epoch, {fullness:.1%} full; "
        f"{steps:,} steps of {plan.rows_per_step} rows",
    )


def _announce_resume(console: Console, checkpoint: Checkpoint | None, steps: int, environment: dict[str, Any]) -> None:
    if checkpoint is None:
        return
    _say(console, f"resuming after step {checkpoint.state['step']} of {steps}")
    if changed := differences(checkpoint.state["environment"], environment):
        _say(console, f"{'; '.join(changed)}: the losses agree with an uninterrupted run's, but not to the last bit")


def _stopped(stop: StopRequest, loop: Loop) -> str:
    """In one line, how things stand."""
    step, steps = loop.progress.step, loop.schedule.steps
    kept = "its checkpoint is written" if step else "there is nothing to keep yet"
    return f"stopped by {stop.reason} after step {step} of {steps}; {kept}: {stop.advice}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _only_run_in(out: Path) -> Iterator[None]:
    """Hold the directory for this process; the kernel lets go when it ends, however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process trains in {out}; wait for it, or choose another --out") from error
        yield
