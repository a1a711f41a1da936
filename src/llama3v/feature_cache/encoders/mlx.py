"""The trunk in MLX, for Apple's GPUs. Extra: llama3v[mlx]; on Linux it runs on the CPU, for tests."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llama3v.config import Precision
from llama3v.feature_cache.encoders.base import TrunkEncoder, require_siglip, tiles_per_pass
from llama3v.model.blocks import LAYER_NORM_EPS
from llama3v.model.vision import VisionTower

if TYPE_CHECKING:
    import mlx.core as mx


class MlxEncoder(TrunkEncoder):
    """In bf16, matrix products run in bf16 while the residual stream and the norms stay in fp32, as in torch."""

    name = "mlx"

    def __init__(self, tower: VisionTower, precision: Precision, batch_tiles: int) -> None:
        import mlx.core as mx

        tower = require_siglip(self.name, tower)
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        super().__init__(tower, precision, batch_tiles if on_gpu else tiles_per_pass(batch_tiles, tower.grid_side**2))
        self.device = "apple gpu" if on_gpu else "cpu"
        self._heads, self._cut = tower.heads, tower.cut
        self._mean, self._std = mx.array(tower.mean), mx.array(tower.std)
        self._compute_type = mx.bfloat16 if precision == "bf16" else mx.float32
        self._weights = {name: self._take(name, value) for name, value in tower.trunk_parameters().items()}
        mx.eval(self._weights)
        # Fuses what stands between the products. On a CPU it would need a C++ compiler.
        self._run = mx.compile(self._trunk) if on_gpu else self._trunk

    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        import mlx.core as mx

        features = self._run(mx.array(tiles))
        mx.eval(features)
        return torch.from_numpy(np.array(features, copy=False))

    def _take(self, name: str, value: Tensor) -> "mx.array":
        """A parameter as MLX wants it: channels last, linear weights as [in, out], factors of products lowered."""
        import mlx.core as mx

        array = mx.array(value.detach().float().cpu().numpy())
        if "norm" in name or "position" in name:
            return array
        if array.ndim == 4:  # [out, in, rows, columns] -> [out, rows, columns, in]
            array = array.transpose(0, 2, 3, 1)
        elif array.ndim == 2:
            array = array.T
        return array.astype(self._compute_type)

    def _trunk(self, tiles: "mx.array") -> "mx.array":
        """uint8 [n, S, S, 3] -> fp32 [n, patches, width]"""
        import mlx.core as mx

        pixels = (tiles.astype(mx.float32) / 255 - self._mean) / self._std
        kernel = self._weights["embeddings.patch_embedding.weight"]
        embedded = mx.conv2d(pixels.astype(self._compute_type), kernel, stride=kernel.shape[1])
        embedded = (embedded + self._weights["embeddings.patch_embedding.bias"]).flatten(1, 2)  # [n, patches, width]
        x = embedded + self._weights["embeddings.position_embedding.weight"]
        for index in range(self._cut):
            x = self._layer(x, f"layers.{index}")
        return x

    def _layer(self, x: "mx.array", layer: str) -> "mx.array":
        """The same as `SelfAttentionBlock` (model/blocks.py)."""
        x = x + self._attention(self._norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
        hidden = self._linear(self._norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        return x + self._linear(_gelu(hidden), f"{layer}.mlp.fc2")

    def _attention(self, x: "mx.array", name: str) -> "mx.array":
        import mlx.core as mx

        tiles, patches, width = x.shape
        q, k, v = (
            self._linear(x, f"{name}.{part}_proj").reshape(tiles, patches, self._heads, -1).swapaxes(1, 2)
            for part in ("q", "k", "v")
        )  # [n, heads, patches, width / heads]
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=(width // self._heads) ** -0.5)
        return self._linear(attended.swapaxes(1, 2).reshape(tiles, patches, width), f"{name}.out_proj")

    def _norm(self, x: "mx.array", name: str) -> "mx.array":
        import mlx.core as mx

        normed = mx.fast.layer_norm(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], LAYER_NORM_EPS)
        return normed.astype(self._compute_type)

    def _linear(self, x: "mx.array", name: str) -> "mx.array":
        import mlx.core as mx

        return mx.addmm(self._weights[f"{name}.bias"], x, self._weights[f"{name}.weight"])


def _gelu(x: "mx.array") -> "mx.array":
    """The tanh form, in fp32 as torch has it. (mlx.nn's is compiled at run time: on a CPU it needs a C++ compiler.)"""
    import mlx.core as mx

    y = x.astype(mx.float32)
    return (0.5 * y * (1 + mx.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y * y * y)))).astype(x.dtype)
