"""One pre-norm transformer encoder block, in the exact geometry of a SigLIP vision layer.

The vision tower is a stack of these, and so is the projector: that is why a trained projector folds into a stock
checkpoint (docs/architecture.md). Parameter names are those of transformers' ``SiglipEncoderLayer``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6  # SigLIP, big_vision models/vit.py


class SelfAttention(nn.Module):
    """Multi-head self-attention over all patches of one tile: [tiles, patches, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tiles, patches, width = x.shape
        q, k, v = (
            projection(x).view(tiles, patches, self.heads, width // self.heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [tiles, heads, patches, width / heads]
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(tiles, patches, width))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [tiles, patches, width] -> the same shape."""

    def __init__(self, width: int, heads: int, mlp_size: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def start_as_identity(block: SelfAttentionBlock) -> None:
    """Zero what each branch adds, so that the block passes its input through unchanged until it is trained."""
    with torch.no_grad():
        for last in (block.self_attn.out_proj, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
