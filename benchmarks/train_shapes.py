"""Shapes of models, with random weights, and synthetic samples for them: what the benchmarks of training share.

Imports torch, transformers and numpy only, because benchmarks/gpu does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from llama3v.model.llama3v import Llama3VConfig, Llama3VForConditionalGeneration
from llama3v.train.batches import Batch
from llama3v.train.features.base import FeatureSource
from llama3v.train.meter import COUNTED
from llama3v.train.prepared import PreparedData

EMBEDDING_RMS = 0.02  # of LlamaConfig's random weights


@dataclass(frozen=True)
class TowerShape:
    """Geometry of a vision tower; `layers` are all that the checkpoint has, of which ours computes all but the last."""

    tile_size: int
    patch_size: int
    width: int
    heads: int
    mlp_size: int
    layers: int

    @property
    def patches(self) -> int:
        return (self.tile_size // self.patch_size) ** 2


@dataclass(frozen=True)
class LlmShape:
    """Geometry of a Llama."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    mlp_size: int
    vocabulary: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.mlp_size,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


@dataclass(frozen=True)
class ModelShape:
    """Geometry of a Llama 3-V."""

    tower: TowerShape
    llm: LlmShape
    scale_factor: int = 3

    @property
    def tokens_per_tile(self) -> int:
        return self.tower.patches // self.scale_factor**2

    def config(self, depth: int | None = None) -> Llama3VConfig:
        """depth: layers of the tower that are there; default: all that ours computes."""
        tower = self.tower
        depth = tower.layers - 1 if depth is None else depth
        geometry = {
            "kind": "siglip",
            "tile_size": tower.tile_size,
            "patch_size": tower.patch_size,
            "width": tower.width,
            "heads": tower.heads,
            "mlp_size": tower.mlp_size,
            "depth": depth,
            "cut": depth,
        }
        return Llama3VConfig(vision_config=geometry, text_config=self.llm.config(), scale_factor=self.scale_factor)


SO400M = TowerShape(384, 14, 1152, 16, 4304, 27)
SMOLLM2_135M = ModelShape(SO400M, LlmShape(576, 30, 9, 3, 1536, 49_152, tied=True))
LLAMA3_8B = ModelShape(SO400M, LlmShape(4096, 32, 32, 8, 14_336, 128_256))
QUARTER_8B = ModelShape(TowerShape(384, 14, 288, 4, 1076, 7), LlmShape(1024, 8, 8, 2, 3584, 32_064))
"""A quarter of Llama 3 8B's and so400m's widths, layers and vocabulary: every matrix product costs 1/64 of the real one
(attention 1/16), so that shares of time stay about what they are."""
TINY = ModelShape(TowerShape(84, 14, 32, 2, 64, 3), LlmShape(64, 2, 4, 2, 128, 512))


def random_model(
    shape: ModelShape,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    depth: int | None = None,
) -> Llama3VForConditionalGeneration:
    """A Llama 3-V of that shape with random weights, the projector at its usual starting point, all frozen."""
    device = torch.device("cpu") if device is None else device
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            model = Llama3VForConditionalGeneration(shape.config(depth))
    finally:
        torch.set_default_dtype(before)
    model.projector.initialise(EMBEDDING_RMS, torch.Generator(device).manual_seed(0))
    model.requires_grad_(False)
    return model


@dataclass(frozen=True)
class Sample:
    """One image of so many tiles, then text, of which the last `answer` tokens have loss."""

    tiles: int
    text: int
    answer: int

    def length(self, tokens_per_tile: int) -> int:
        return self.tiles * tokens_per_tile + self.text


def random_samples(count: int, tiles: Sequence[int], text: tuple[int, int], answer_share: float) -> list[Sample]:
    """Samples with one of the given numbers of tiles, and a text whose length is uniform between two bounds.

    The lengths are evenly spread and then shuffled, so that few samples have the mean of many.
    """
    generator = np.random.default_rng(0)
    lengths = np.linspace(*text, count).round().astype(int)
    counts = np.resize(np.asarray(tiles), count)
    generator.shuffle(lengths)
    generator.shuffle(counts)
    return [
        Sample(int(number), int(length), max(1, round(answer_share * int(length))))
        for number, length in zip(counts, lengths, strict=True)
    ]


def prepared(samples: Sequence[Sample], shape: ModelShape) -> PreparedData:
    """The samples as training has them after rendering: random ids, the image's slots behind the first token."""
    generator = np.random.default_rng(0)
    image_token = shape.llm.vocabulary
    tokens: list[np.ndarray] = []
    supervised: list[np.ndarray] = []
    for sample in samples:
        ids = generator.integers(0, shape.llm.vocabulary, sample.length(shape.tokens_per_tile), dtype=np.int32)
        ids[1 : 1 + sample.tiles * shape.tokens_per_tile] = image_token
        labelled = np.zeros(len(ids), np.uint8)
        labelled[len(ids) - sample.answer :] = 1
        tokens.append(ids)
        supervised.append(labelled)
    keys = "".join(key_of(number, sample.tiles) for number, sample in enumerate(samples))
    return PreparedData(
        tokens=np.concatenate(tokens),
        supervised=np.concatenate(supervised),
        starts=np.cumsum([0, *map(len, tokens)]),
        image_starts=np.arange(len(samples) + 1),
        labels=np.asarray([sample.answer for sample in samples], np.int32),
        keys=np.frombuffer(keys.encode(), np.uint8).reshape(-1, 32),
        grids=np.asarray([(max(1, sample.tiles - 1), 1) for sample in samples], np.int32),  # and the overview
        made_from={},
        digest="",
        left_out=0,
        not_in_cache=0,
        below_min_score=0,
        locations=None,
    )


def key_of(number: int, tiles: int) -> str:
    """The key of a sample's image: 32 digits that end with its tiles."""
    return f"{number:030}{tiles:02}"


class RandomFeatures(FeatureSource):
    """Features from a small stock in memory, copied together as those of a cache are."""

    fingerprint = "random"

    def __init__(self, tower: TowerShape, stock: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self._stock = torch.randn(stock, tower.patches, tower.width, generator=generator).to(torch.bfloat16)

    def features(self, keys: Sequence[str]) -> Tensor:
        parts = []
        for key in keys:
            number, tiles = int(key[:30]), int(key[30:])
            start = number % (len(self._stock) - tiles + 1)
            parts.append(self._stock[start : start + tiles])
        return torch.cat(parts)


def counts_of(batch: Batch) -> dict[str, int]:
    """What the formula of work (llama3v.plan.flops) takes."""
    return {name: getattr(batch, name) for name in COUNTED}
