"""The projection block: patch features of one tile become visual tokens in the LLM's embedding space.

    patch features -> 2 self-attention blocks -> LayerNorm -> r x r pixel-unshuffle -> Linear (no bias) -> visual tokens

Attention stays within a tile, and every part has a counterpart in Idefics3, so that a trained model is a stock
checkpoint (see exporters/hf.py).
"""

import math

import torch
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.model.blocks import LAYER_NORM_EPS, SelfAttentionBlock, start_as_identity


def pixel_unshuffle(x: Tensor, grid_side: int, r: int) -> Tensor:
    """Put each r x r neighbourhood of patches into one token: [n, side*side, width] -> [n, (side/r)**2, r*r*width].

    Within a token the patches lie row by row, as in Idefics3's connector.
    """
    n, _, width = x.shape
    side = grid_side // r
    x = x.view(n, side, r, side, r, width)  # [n, block row, row, block column, column, width]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, side * side, r * r * width)


class Projector(nn.Module):
    """Two self-attention blocks, norm, unshuffle, linear: [tiles, patches, width] -> [tiles, patches / r**2, hidden].

    Args:
        width, heads, mlp_size: the geometry of the vision tower's layers.
        grid_side: patches along one side of a tile; r (`scale_factor`) must divide it.
        hidden: width of the LLM's embeddings.
        blocks: self-attention blocks; two make a Llama 3-V, other counts are for ablations.
        head: what follows the unshuffle: "linear", or, for ablations, "mlp", the two layers of LLaVA-1.5
            (arXiv 2310.03744), which no stock checkpoint of ours can hold.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        mlp_size: int,
        grid_side: int,
        scale_factor: int,
        hidden: int,
        blocks: int = 2,
        head: str = "linear",
    ) -> None:
        super().__init__()
        if grid_side % scale_factor:
            divisors = [r for r in range(1, grid_side + 1) if grid_side % r == 0]
            raise ConfigError(
                f"scale_factor {scale_factor} does not divide the {grid_side} x {grid_side} patch grid; use one of {divisors}"
            )
        self.grid_side, self.scale_factor = grid_side, scale_factor
        self.blocks = nn.ModuleList(SelfAttentionBlock(width, heads, mlp_size) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(width * scale_factor**2, hidden, bias=False)
        self.after = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden)) if head == "mlp" else nn.Identity()

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid_side // self.scale_factor) ** 2

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features)
        return self.after(self.linear(pixel_unshuffle(self.norm(features), self.grid_side, self.scale_factor)))

    @torch.no_grad()
    def initialise(self, embedding_rms: float, generator: torch.Generator) -> None:
        """Start sane: blocks are the identity, and visual tokens have the root mean square of text embeddings.

        The norm gives inputs of unit variance, so weights of standard deviation rms / sqrt(inputs) give outputs of rms.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                fan = module.in_features + module.out_features
                bound = math.sqrt(6 / fan)  # Xavier uniform, as SigLIP's own layers start
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for block in self.blocks:
            assert isinstance(block, SelfAttentionBlock)  # a ModuleList forgets the type
            start_as_identity(block)
        self.norm.reset_parameters()
        scale = embedding_rms
        if isinstance(self.after, nn.Sequential):
            last = self.after[1]
            assert isinstance(last, nn.Linear)
            # GELU of unit normals has a mean square of 0.425
            last.weight.normal_(std=embedding_rms / math.sqrt(0.425 * last.in_features), generator=generator)
            last.bias.zero_()
            scale = 1.0
        self.linear.weight.normal_(std=scale / math.sqrt(self.linear.in_features), generator=generator)
