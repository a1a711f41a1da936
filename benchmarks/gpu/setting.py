"""What of a run depends on the shape of the model."""

from dataclasses import dataclass

from benchmarks.train_shapes import LLAMA3_8B, TINY, ModelShape, Sample, random_samples

STAGE_TEXT = {1: (20, 100), 2: (100, 300)}
"""Tokens of text, from and to: means of 60 and 200, as the seed's run is reckoned with."""
STAGE_TILES = {1: 1, 2: 7}
ANSWER_SHARE = {1: 0.7, 2: 0.5}
"""Of the text, how much has loss."""


@dataclass(frozen=True)
class Setting:
    """How much of everything.

    Attributes:
        encode_tiles: tiles of a pass. encode_passes: passes that are measured.
        passes: (rows, tokens of a row), tried in this order until one fits into the memory.
        step_tokens: of an optimizer step, about.
        lora_rank: of the adapters. rounds: steps that are measured.
    """

    shape: ModelShape
    encode_tiles: int
    encode_passes: int
    passes: tuple[tuple[int, int], ...]
    step_tokens: int
    lora_rank: int
    rounds: int

    def samples(self, stage: int, count: int) -> list[Sample]:
        """Samples of a stage; a small shape has texts of a tenth."""
        shortest, longest = STAGE_TEXT[stage]
        divisor = 10 if self.shape.tokens_per_tile < 10 else 1
        text = (max(2, shortest // divisor), longest // divisor)
        return random_samples(count, [STAGE_TILES[stage]], text, ANSWER_SHARE[stage])


SETTINGS = {
    "llama3-8b": Setting(
        LLAMA3_8B,
        encode_tiles=64,
        encode_passes=12,
        passes=((4, 4096), (2, 4096), (1, 4096), (1, 2048), (1, 1024)),
        step_tokens=16_384,
        lora_rank=128,
        rounds=4,
    ),
    "tiny": Setting(
        TINY, encode_tiles=4, encode_passes=2, passes=((2, 128), (1, 128)), step_tokens=256, lora_rank=4, rounds=2
    ),
}
