"""Floating-point operations of a training step, by arithmetic: the one formula; the meter's MFU comes from it.

A multiplication and an addition are two operations. A matrix costs every token that passes it 2 operations per weight
forward, 2 more for the gradient of its input where something before it trains, and 2 more for its own gradient where
it trains itself: 6 in full training (Kaplan et al. 2020, section 2.1), 4 where only the projector before it trains.
What is computed in vain (masked attention, padding) or twice (activation recompute) is not counted: that is what "model"
means in model FLOPs utilisation (Chowdhery et al. 2022, appendix B). Norms, activations and look-ups are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Matrices that the same tokens pass, and attention among these.

    Attributes:
        weights: of all matrices. trained: of those that train.
        attention_width: heads x head size, summed over the layers.
        gradient_passes: whether a gradient goes back through it.
    """

    weights: int
    attention_width: int = 0
    trained: int = 0
    gradient_passes: bool = False

    def flops(self, tokens: int, pairs: int = 0) -> int:
        """Operations for so many tokens, of which so many (query, key) pairs attend to each other."""
        through = (
            3 if self.gradient_passes else 1
        )  # attention has two operands, so its way back costs twice its way there
        matrices = 2 * self.weights * (2 if self.gradient_passes else 1) + 2 * self.trained
        return matrices * tokens + 4 * self.attention_width * pairs * through


@dataclass(frozen=True)
class TrainingWork:
    """All that a training step computes.

    Attributes:
        llm: its layers, which every token passes. head: its output matrix, which supervised tokens pass.
        blocks: vision top and the projector's blocks, which every patch passes. linear: the projector's last matrix, with
            its weights per visual token.
        trunk: the part of the tower below the cut, where it runs live.
        patches: of a tile. visual_tokens: of a tile.
    """

    llm: Part
    head: Part
    blocks: Part
    linear: Part
    trunk: Part
    patches: int
    visual_tokens: int

    def flops(self, counts: Mapping[str, int]) -> int:
        """Operations for what was counted: `visual_tokens`, `text_tokens`, `supervised_tokens`, `tiles`, and
        `attention_pairs`, the (query, key) pairs of all samples.
        """
        tiles, tokens = counts["tiles"], counts["visual_tokens"] + counts["text_tokens"]
        patches, pairs = tiles * self.patches, tiles * self.patches**2
        return (
            self.llm.flops(tokens, counts["attention_pairs"])
            + self.head.flops(counts["supervised_tokens"])
            + self.blocks.flops(patches, pairs)
            + self.linear.flops(tiles * self.visual_tokens)
            + self.trunk.flops(patches, pairs)
        )


def encoder_layer_weights(width: int, mlp_size: int) -> int:
    """Weights of the matrices of a SigLIP layer: queries, keys, values, output, and two of the MLP."""
    return 4 * width**2 + 2 * width * mlp_size


def llama_layer_weights(hidden: int, mlp_size: int, heads: int, key_value_heads: int, head_size: int) -> int:
    """Weights of the matrices of a Llama layer: queries and output, keys and values, and three of the MLP."""
    return 2 * hidden * head_size * (heads + key_value_heads) + 3 * hidden * mlp_size
