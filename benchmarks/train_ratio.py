"""One training step of ours beside one the usual way, on the same samples; and each of our three savings alone."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.common import interleaved, row
from benchmarks.train_ours import Ours
from benchmarks.train_profile import profile_row
from benchmarks.train_shapes import ModelShape, Sample, prepared
from benchmarks.train_step import adamw, trained
from benchmarks.train_usual import UsualModel, padded, stock_tower, usual_step

BOTH = ("projector", "llm")
TOWER_LAYERS = 2  # of the usual way's tower that run; the others are added to its time


def measure_ratio(
    name: str, shape: ModelShape, samples: list[Sample], rounds: int, *, trains: Collection[str], gemm: float
) -> list[dict[str, Any]]:
    """Two rows: samples per second of ours and of the usual way, whose tower's time is scaled to all of its layers; and
    where the time of ours goes.
    """
    with ExitStack() as stack:
        ours = Ours(shape, samples, trains=trains, stack=stack)
        usual = UsualModel(shape, TOWER_LAYERS, trains=trains)
        optimizer = adamw(trained(usual))
        batch = padded(ours.data, range(len(samples)), ours.tiles, shape.tower.tile_size)
        layers = _layers_alone(usual.vision, ours.tiles, shape)
        sides: dict[str, Callable[[], Any]] = {
            "ours": ours.step,
            "usual": lambda: usual_step(usual, optimizer, batch),
            "tower": layers,
        }
        seconds = {side: median(values) for side, values in interleaved(sides, rounds, warm_up=False).items()}
        flops, padding, profiled = ours.flops(), batch.padding, profile_row(name, ours)
    a_layer = seconds["tower"] / TOWER_LAYERS
    whole = seconds["usual"] + (shape.tower.layers - TOWER_LAYERS) * a_layer
    note = (
        f"{len(samples)} samples of {_mean(samples, 'tiles'):.3g} tiles and {_mean(samples, 'text'):.3g} text tokens on average; "
        f"ours {seconds['ours']:.3g} s a step, {flops / seconds['ours'] / 1e9:.3g} GFLOP/s of useful work where GEMM gives "
        f"{gemm / 1e9:.3g}; usual {whole:.3g} s: {seconds['usual']:.3g} s measured with {TOWER_LAYERS} layers of the tower "
        f"and {shape.tower.layers - TOWER_LAYERS} more of {a_layer:.3g} s each, measured beside it; "
        f"{padding:.0%} of its positions are padding; both fp32, the same projector"
    )
    limit = len(samples) * gemm / flops
    ratio = row(f"{name}: ours beside the usual way", len(samples) / seconds["ours"], len(samples) / whole, limit=limit,
                unit="samples/s", note=note)  # fmt: skip
    return [ratio, profiled]


def measure_llava(shape: ModelShape, samples: list[Sample], rounds: int) -> dict[str, Any]:
    """One row: the usual way with LLaVA's projector, whose LLM sees every patch; stage 1."""
    with ExitStack() as stack:
        ours = Ours(shape, samples, trains=("projector",), stack=stack)
        every_patch = replace(shape, scale_factor=1)
        usual = UsualModel(every_patch, TOWER_LAYERS, trains=("projector",), llava_projector=True)
        optimizer = adamw(trained(usual))
        batch = padded(prepared(samples, every_patch), range(len(samples)), ours.tiles, shape.tower.tile_size)
        sides: dict[str, Callable[[], Any]] = {
            "ours": ours.step,
            "usual": lambda: usual_step(usual, optimizer, batch),
            "tower": _layers_alone(usual.vision, ours.tiles, shape),
        }
        seconds = {side: median(values) for side, values in interleaved(sides, rounds, warm_up=False).items()}
    whole = seconds["usual"] + (shape.tower.layers - TOWER_LAYERS) * seconds["tower"] / TOWER_LAYERS
    return row(
        f"stage 1 beside the usual way with LLaVA's projector ({shape.tower.patches} visual tokens a tile)",
        len(samples) / seconds["ours"],
        len(samples) / whole,
        unit="samples/s",
        note="another model: two linear layers instead of two attention blocks, and no unshuffle; scaled as above",
    )


def measure_sources(name: str, shape: ModelShape, samples: list[Sample], rounds: int) -> list[dict[str, Any]]:
    """Rows: ours with all savings, beside itself without each one of them, and beside the usual way without any."""
    with ExitStack() as stack:
        ours = Ours(shape, samples, trains=BOTH, stack=stack)
        usual = UsualModel(shape, shape.tower.layers, trains=BOTH)
        optimizer = adamw(trained(usual))
        tower = stock_tower(shape.tower, shape.tower.layers)
        batch = padded(ours.data, range(len(samples)), ours.tiles, shape.tower.tile_size)
        sides: dict[str, Callable[[], Any]] = {
            "ours": ours.step,
            "usual": lambda: usual_step(usual, optimizer, batch),
            "cache": lambda: ours.step_without_cache(tower, batch.pixels),
            "packing": ours.step_without_packing,
            "head": ours.step_with_full_logits,
        }
        seconds = {side: median(values) for side, values in interleaved(sides, rounds, warm_up=False).items()}
        supervised, positions = int(ours.data.labels.sum()), int(ours.data.lengths.sum())
        padding = batch.padding
    rate = {side: len(samples) / value for side, value in seconds.items()}
    about = (
        f"stage 2, all of the LLM trains; {len(samples)} samples of {_mean(samples, 'tiles'):.3g} tiles and "
        f"{_mean(samples, 'text'):.3g} text tokens on average; all layers run, nothing is scaled"
    )
    without = {
        "cache": "the tower's features come from the cache; without, it runs in every step",
        "packing": f"samples share rows; without, {padding:.0%} of the positions are padding",
        "head": f"the LM head runs at {supervised} of {positions} positions, in chunks; without, at all",
    }
    return [
        row(f"{name}: ours beside the usual way", rate["ours"], rate["usual"], unit="samples/s", note=about),
        *(
            row(f"{name}: ours beside ours without {part}", rate["ours"], rate[part], unit="samples/s", note=note)
            for part, note in without.items()
        ),
    ]


def _layers_alone(tower: Any, tiles: int, shape: ModelShape) -> Callable[[], None]:
    """The layers of the tower, without what is before and after them."""
    hidden = torch.randn(tiles, shape.tower.patches, shape.tower.width)

    def run() -> None:
        value = hidden
        with torch.no_grad():
            for layer in tower.encoder.layers:
                out = layer(value, attention_mask=None)
                value = out[0] if isinstance(out, tuple) else out

    return run


def _mean(samples: list[Sample], what: str) -> float:
    return sum(getattr(sample, what) for sample in samples) / len(samples)
