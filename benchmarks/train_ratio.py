"""One training step of ours beside one the usual way, on the same samples; and each of our three savings alone."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved, row
from benchmarks.train_shapes import ModelShape, Sample, counts_of, prepared, random_model
from benchmarks.train_step import adamw, optimizer_step, set_modes, trained
from benchmarks.train_usual import UsualModel, padded, stock_tower, usual_step
from llama3v.data.packing import pack
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid
from llama3v.train.batches import Batch, assemble, attention_mask
from llama3v.train.features.base import FeatureSource
from llama3v.train.features.cached import CachedFeatures
from llama3v.train.prepared import PreparedData
from llama3v.train.work import work_of

ROW_TOKENS = 1024
TOWER_LAYERS = 2  # of the usual way's tower that run; the others are added to its time


class Ours:
    """The trainer's step on some samples: features from a cache on disk, packed rows."""

    def __init__(self, shape: ModelShape, samples: list[Sample], *, llm_trains: bool, stack: ExitStack) -> None:
        self.shape, self.samples = shape, samples
        self.data = prepared(samples, shape)
        self.model = random_model(shape, depth=0)  # of the tower nothing runs
        self.model.projector.requires_grad_(True)
        self.model.llm.requires_grad_(llm_trains)
        set_modes(self.model)
        self.optimizer = adamw(trained(self.model))
        self.source = stack.enter_context(closing(_cache(shape, self.data, samples, stack)))
        self.rows = pack(self.data.lengths.tolist(), max(ROW_TOKENS, int(self.data.lengths.max())), seed=0, epoch=0)

    @property
    def tiles(self) -> int:
        return sum(sample.tiles for sample in self.samples)

    def batch(self, rows: list[list[int]] | None = None) -> Batch:
        return assemble(self.data, rows or self.rows, self.source, self.shape.llm.vocabulary)

    def step(self, rows: list[list[int]] | None = None) -> None:
        batch = self.batch(rows)
        optimizer_step(self.model, self.optimizer, [(batch, batch.supervised_tokens)])

    def step_without_packing(self) -> None:
        """One sample a row, padded to the longest."""
        self.step([[sample] for sample in range(len(self.samples))])

    def step_without_cache(self, tower: Any, pixels: Tensor) -> None:
        with torch.no_grad():
            features = tower(pixel_values=pixels).last_hidden_state
        batch = replace(self.batch(), features=features)
        optimizer_step(self.model, self.optimizer, [(batch, batch.supervised_tokens)])

    def step_with_full_logits(self) -> None:
        """The LM head at every position, and transformers' loss."""
        batch = self.batch()
        labels = torch.full_like(batch.ids, -100).flatten()
        labels[batch.predict_at + 1] = batch.targets
        loss = self.model.llm(
            inputs_embeds=self.model.embed(batch.ids, batch.features),
            attention_mask=attention_mask(batch.segments),
            position_ids=batch.positions,
            labels=labels.view_as(batch.ids),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """Useful operations of the step."""
        return work_of(self.model, live_trunk=False).flops(counts_of(self.batch()))


def _cache(shape: ModelShape, data: PreparedData, samples: list[Sample], stack: ExitStack) -> FeatureSource:
    """Random features of all samples, committed to a cache in a temporary directory."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tower, generator = shape.tower, torch.Generator().manual_seed(0)
    manifest = manifest_of({"weights": "random"}, tile_size=tower.tile_size, max_tiles=6, codec="bf16")
    with CacheWriter(root, manifest) as writer:
        for number, sample in enumerate(samples):
            grid = Grid(1, 1) if sample.tiles == 1 else Grid(sample.tiles - 1, 1)  # and the overview
            features = torch.randn(sample.tiles, tower.patches, tower.width, generator=generator)
            writer.add(data.images(number)[0], features, grid)
    return CachedFeatures(CacheReader(root, manifest=manifest))


def measure_ratio(
    name: str, shape: ModelShape, samples: list[Sample], rounds: int, *, llm_trains: bool, gemm: float
) -> dict[str, Any]:
    """One row: samples per second of ours and of the usual way, whose tower's time is scaled to all of its layers."""
    with ExitStack() as stack:
        ours = Ours(shape, samples, llm_trains=llm_trains, stack=stack)
        usual = UsualModel(shape, TOWER_LAYERS, llm_trains=llm_trains)
        optimizer = adamw(trained(usual))
        batch = padded(ours.data, range(len(samples)), ours.tiles, shape.tower.tile_size)
        layers = _layers_alone(usual.vision, ours.tiles, shape)
        sides: dict[str, Callable[[], Any]] = {
            "ours": ours.step,
            "usual": lambda: usual_step(usual, optimizer, batch),
            "tower": layers,
        }
        seconds = {side: median(values) for side, values in interleaved(sides, rounds).items()}
        flops, padding = ours.flops(), batch.padding
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
    return row(name, len(samples) / seconds["ours"], len(samples) / whole, limit=limit, unit="samples/s", note=note)


def measure_llava(shape: ModelShape, samples: list[Sample], rounds: int) -> dict[str, Any]:
    """One row: the usual way with LLaVA's projector, whose LLM sees every patch; stage 1."""
    with ExitStack() as stack:
        ours = Ours(shape, samples, llm_trains=False, stack=stack)
        every_patch = replace(shape, scale_factor=1)
        usual = UsualModel(every_patch, TOWER_LAYERS, llm_trains=False, llava_projector=True)
        optimizer = adamw(trained(usual))
        batch = padded(prepared(samples, every_patch), range(len(samples)), ours.tiles, shape.tower.tile_size)
        sides: dict[str, Callable[[], Any]] = {
            "ours": ours.step,
            "usual": lambda: usual_step(usual, optimizer, batch),
            "tower": _layers_alone(usual.vision, ours.tiles, shape),
        }
        seconds = {side: median(values) for side, values in interleaved(sides, rounds).items()}
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
        ours = Ours(shape, samples, llm_trains=True, stack=stack)
        usual = UsualModel(shape, shape.tower.layers, llm_trains=True)
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
        seconds = {side: median(values) for side, values in interleaved(sides, rounds).items()}
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
