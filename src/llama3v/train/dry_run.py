"""`--dry-run`: the plan of a run, before a GPU second is spent on it. Nothing is written.

A pass runs at its real shapes on the meta device (shapes.py), the first samples are rendered to learn how long they
are, and one real step runs on a scaled-down copy (scaled_down.py). The rest is arithmetic (plan/flops.py).
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from llama3v import recipes
from llama3v.config import PretrainConfig, SftConfig
from llama3v.data.packing import fill
from llama3v.data.sources.base import ImageRef, open_source
from llama3v.errors import ImageError
from llama3v.model.headers import grid_in_header
from llama3v.model.prompt import Renderer
from llama3v.model.slicing import Grid
from llama3v.model.tiles import image_key
from llama3v.plan.devices import ASSUMED_MFU, DEVICES
from llama3v.train import stages
from llama3v.train.batches import RowPlan
from llama3v.train.dataset import Preparation, prepare
from llama3v.train.features.base import NotFoundError
from llama3v.train.memory import Memory, memory_of
from llama3v.train.scaled_down import one_real_step
from llama3v.train.shapes import run_on_meta
from llama3v.train.skeleton import skeleton
from llama3v.train.stages import Line
from llama3v.train.work import work_of

PROBED = 256
"""Samples of each data set that are rendered."""
GPUS = (1, 8)
"""Counts of GPUs that the plan compares."""


@dataclass(frozen=True)
class Load:
    """What the data amounts to.

    Attributes:
        samples: of all data sets. left_out: share of the probed ones that cannot be used. fill: of the rows.
        steps: of the run. per_step: what a step counts, as the meter's counters name it.
    """

    samples: int
    left_out: float
    fill: float
    steps: int
    per_step: dict[str, float]


def dry_run(
    config: PretrainConfig | SftConfig,
    stage: stages.Stage,
    policy: str,
    run: Callable[..., dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Print the plan of a run; returns it.

    Args:
        run: the verb's function, for the step on a scaled-down copy.

    Raises whatever of the run's own errors can be met without weights, cache and GPU.
    """
    if config.recipe:
        _say(console, recipes.in_words(config, stage))
    model, tokenizer = skeleton(config)
    lines = stages.what_trains(
        model,
        stage,
        policy,
        learning_rate=config.learning_rate,
        llm_learning_rate=getattr(config, "llm_learning_rate", None),
    )
    stages.apply(lines, model)
    console.print(stages.as_table(lines, f"What would train: {stage}, policy {policy}"))
    load = _load(config, model, tokenizer)
    _tell_load(console, config, load)
    passes = -(-config.rows_per_step // config.rows_per_pass)
    kept = run_on_meta(
        model,
        rows=min(config.rows_per_pass, config.rows_per_step),
        length=config.row_tokens,
        tiles=max(1, round(load.per_step["tiles"] / passes)),
        supervised=max(1, round(load.per_step["supervised_tokens"] / passes)),
        bf16=config.precision == "bf16",
    )
    layers = model.config.text_config.num_hidden_layers
    recompute = getattr(config, "activation_checkpointing", False)
    memory = memory_of(model, config.llm_weights, kept.activations(layers=layers, recompute=recompute), kept.copies)
    _tell_memory(console, memory)
    work = work_of(model, live_trunk=config.mode != "features")
    counts = {name: round(value) for name, value in load.per_step.items()}
    again = 2 * work.llm.weights * (counts["visual_tokens"] + counts["text_tokens"]) if recompute else 0
    operations = (work.flops(counts) + again) * load.steps
    _tell_devices(console, config, memory, operations, sharded=_is_sharded(config))
    shape: Any = model.config
    small = one_real_step(config, shape, tokenizer, run)
    _say(
        console,
        f"one real step on a scaled-down copy: loss {small['loss']:.3f}, {small['visual_tokens']} visual tokens of "
        f"{small['tiles']} tiles, {small['trained_parameters']:,} parameters trained, in {small['seconds']:.1f} s",
    )
    _say(console, "dry run: nothing was written")
    return {
        "verb": stage,
        "policy": policy,
        "dry_run": True,
        "what_trains": [_line(line) for line in lines],
        **asdict(load),
        "memory": memory.parts,
        "operations_per_step": operations // load.steps,
        "operations": operations,
        "scaled_down": {name: small[name] for name in ("loss", "skipped_steps", "trained_parameters", "seconds")},
    }


class _AnyHeaders:
    """Keys and grids of images from their bytes, wherever these lie: a dry run needs no cache."""

    def __init__(self, tile_size: int, max_tiles: int) -> None:
        self._tile_size, self._max_tiles = tile_size, max_tiles

    def find(self, source_digest: str, image: ImageRef) -> tuple[str, Grid]:
        try:
            data = image.read()
            return image_key(data), grid_in_header(data, self._tile_size, self._max_tiles)
        except ImageError as error:
            raise NotFoundError("image cannot be read", image=image.name, because=str(error)) from error

    def advice(self, encode_command: str) -> str:
        return "a dry run reads the headers of images to know how they are cut: run it where the images lie"


def _load(config: PretrainConfig | SftConfig, model: Any, tokenizer: Any) -> Load:
    tokens, shape = model.tokens_per_tile, model.config
    probed = min(PROBED, config.limit or PROBED)
    preparation = Preparation(
        sources=[open_source(name, probed) for name in config.data],
        names=config.data,
        lookup=_AnyHeaders(model.vision.tile_size, shape.max_tiles),
        renderer=Renderer(tokenizer, shape.prompt_format, tokens, shape.image_token_id),
        row_tokens=config.row_tokens,
        made_from={},
        max_bad_ratio=config.max_bad_ratio,
        encode_command=lambda data: "",
    )
    samples = sum(_count(name, config.limit) for name in config.data)
    with TemporaryDirectory(prefix="llama3v-dry-run-") as name:
        data = prepare(preparation, Path(name) / "prepared", Path(name) / "ledger.jsonl", keep=False)
        lengths = data.lengths
        usable = samples * len(data) / (len(data) + data.left_out)
        plan = RowPlan(lengths.tolist(), config.row_tokens, config.rows_per_step, config.rows_per_pass, config.seed)
        full = fill(plan.epoch(0), lengths.tolist(), config.row_tokens)
        tiles = sum(Grid(*grid).tiles for sample in range(len(data)) for grid in data.grids_of(sample))
        mean = {
            "visual_tokens": tiles * tokens / len(data),
            "text_tokens": (int(lengths.sum()) - tiles * tokens) / len(data),
            "supervised_tokens": int(data.labels.sum()) / len(data),
            "tiles": tiles / len(data),
            "attention_pairs": float((lengths * (lengths + 1) // 2).mean()),
        }
        a_row = config.row_tokens * full / float(lengths.mean())  # samples
        a_step = min(config.rows_per_step * a_row, usable)
        steps = config.steps or max(1, round(config.epochs * usable / a_step))
        left_out = data.left_out / (len(data) + data.left_out)
    return Load(samples, left_out, full, steps, {name: value * a_step for name, value in mean.items()})


def _count(name: str, limit: int | None) -> int:
    """Rows of a data set, which a source knows or has to walk through."""
    source = open_source(name, limit)
    with suppress(TypeError):
        if hint := operator.length_hint(source):
            return hint
    return sum(1 for _ in source)


def _is_sharded(config: PretrainConfig | SftConfig) -> bool:
    """Whether several GPUs would each hold a part of the model: what `--parallel auto` chooses, too."""
    parallel = getattr(config, "parallel", "auto")
    return parallel == "fsdp" or (parallel == "auto" and isinstance(config, SftConfig) and config.llm_trains)


def _tell_load(console: Console, config: PretrainConfig | SftConfig, load: Load) -> None:
    per_step = load.per_step
    _say(
        console,
        f"{load.samples:,} samples ({load.left_out:.1%} of the first {PROBED} of each data set cannot be used), rows of "
        f"{config.row_tokens:,} tokens {load.fill:.1%} full; {load.steps:,} steps of {config.rows_per_step} rows: "
        f"{per_step['tiles']:,.0f} tiles, {per_step['visual_tokens']:,.0f} visual, {per_step['text_tokens']:,.0f} text and "
        f"{per_step['supervised_tokens']:,.0f} supervised tokens a step",
    )


def _tell_memory(console: Console, memory: Memory) -> None:
    table = _table("Memory, estimated", "part", "GB")
    for part, size in memory.parts.items():
        table.add_row(part, f"{size / 1e9:,.2f}")
    table.add_section()
    table.add_row("all", f"{memory.total / 1e9:,.2f}", style="bold")
    console.print(table)


def _tell_devices(
    console: Console, config: PretrainConfig | SftConfig, memory: Memory, operations: int, *, sharded: bool
) -> None:
    table = _table(
        f"Hours and dollars at an assumed {ASSUMED_MFU:.0%} of the peak: {operations:.2e} operations",
        *("device", "GB needed", "fits", "hours", "$/GPU-hour", "dollars"),
    )
    for device in DEVICES:
        for count in GPUS:
            needed = memory.on(count) if sharded else memory.total
            hours = operations / (device.peak * ASSUMED_MFU * count * 3600)
            price = config.dollars_per_hour / count or device.dollars
            fits = needed < 0.95 * device.memory  # the rest: CUDA, fragments
            table.add_row(
                f"{count} x {device.name}",
                f"{needed / 1e9:,.1f}",
                "yes" if fits else "no",
                f"{hours:,.2f}",
                f"{price:.2f}",
                f"{hours * count * price:,.2f}",
                style="" if fits else "dim",
            )
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _line(line: Line) -> dict[str, Any]:
    return {"pattern": line.pattern, "parameters": line.parameters, "learning_rate": line.learning_rate}


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
