"""The trainer's step on a few samples: features from a cache on disk, packed rows; and without each of its savings."""

import tempfile
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_shapes import ModelShape, Sample, counts_of, prepared, random_model
from benchmarks.train_step import adamw, optimizer_step, set_modes, trained
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


class Ours:
    """The trainer's step on some samples: features from a cache on disk, packed rows."""

    def __init__(self, shape: ModelShape, samples: list[Sample], *, trains: Collection[str], stack: ExitStack) -> None:
        self.shape, self.samples = shape, samples
        self.data = prepared(samples, shape)
        self.model = random_model(shape, depth=0)  # of the tower nothing runs
        self.model.projector.requires_grad_("projector" in trains)
        self.model.llm.requires_grad_("llm" in trains)
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
