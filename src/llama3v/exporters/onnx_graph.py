"""Tower and projector as an ONNX graph of standard operators, for any number of tiles.

Written node by node, so that it does not depend on how a version of torch exports. Activations are [tiles * patches,
width] outside of attention, so that every linear layer is one Gemm. (The encode engine's graph in
feature_cache/encoders/onnxruntime.py is for one runtime and one shape, and ends at the cut.)
"""

from typing import Any

import numpy as np

from llama3v.engines.vision_file import INPUT, OUTPUT
from llama3v.model.blocks import LAYER_NORM_EPS
from llama3v.model.projector import Projector
from llama3v.model.vision import SiglipTower

_OPSET, _IR_VERSION = 20, 10  # opset 20 has Gelu


def vision_graph(tower: SiglipTower, projector: Projector, *, half: bool) -> Any:
    """An onnx.ModelProto: pixel_values [tiles, 3, S, S] -> visual_tokens [tiles, tokens_per_tile, hidden].

    Args:
        half: matrices in float16, made float32 when the model is loaded.
    """
    from onnx import TensorProto, helper

    graph = _Graph(tower, projector, half)
    side = tower.tile_size
    tokens, hidden = projector.tokens_per_tile, projector.linear.out_features
    pixels = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["tiles", 3, side, side])
    visual = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["tiles", tokens, hidden])
    content = helper.make_graph(graph.nodes, "vision", [pixels], [visual], initializer=graph.constants)
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


class _Graph:
    """Grows node by node. Method `_add` returns the name of what the new node gives."""

    def __init__(self, tower: SiglipTower, projector: Projector, half: bool) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: set[str] = set()
        self._half = half
        self._width, self._heads, self._patches = tower.width, tower.heads, tower.grid_side**2
        self._weights = {f"tower.{name}": value for name, value in tower.state_dict().items()}
        self._weights |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
        x = self._embeddings()
        for name in [f"tower.layers.{index}" for index in range(tower.depth)]:
            x = self._block(x, name)
        for name in [f"projector.blocks.{index}" for index in range(len(projector.blocks))]:
            x = self._block(x, name)
        x = self._norm(x, "projector.norm")
        self._visual_tokens(x, tower.grid_side, projector.scale_factor)

    def _add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self._known:
            self._known.add(name)
            self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _weight(self, name: str) -> str:
        from onnx import TensorProto

        value = self._weights[name].detach().float().numpy()
        if not self._half or value.ndim < 2 or "embeddings" in name:  # those are small, and stay exact
            return self._constant(name, value)
        return self._add("Cast", self._constant(name, value.astype(np.float16)), to=TensorProto.FLOAT)

    def _embeddings(self) -> str:
        """pixel_values -> [tiles * patches, width]"""
        prefix = "tower.embeddings.patch_embedding"
        kernel, bias = (self._weight(f"{prefix}.{name}") for name in ("weight", "bias"))
        size = list(self._weights[f"{prefix}.weight"].shape[2:])
        embedded = self._add("Conv", INPUT, kernel, bias, kernel_shape=size, strides=size)
        embedded = self._reshape(embedded, -1, self._width, self._patches)
        embedded = self._add("Transpose", embedded, perm=[0, 2, 1])
        positions = self._weight("tower.embeddings.position_embedding.weight")
        return self._reshape(self._add("Add", embedded, positions), -1, self._width)

    def _block(self, x: str, block: str) -> str:
        """The same as `SelfAttentionBlock` (model/blocks.py)."""
        attended = self._attention(self._norm(x, f"{block}.layer_norm1"), f"{block}.self_attn")
        x = self._add("Add", x, attended)
        hidden = self._linear(self._norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
        return self._add("Add", x, self._linear(self._add("Gelu", hidden, approximate="tanh"), f"{block}.mlp.fc2"))

    def _attention(self, x: str, name: str) -> str:
        channels = self._width // self._heads
        orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}  # k transposed, for the product with q
        q, k, v = (
            self._add(
                "Transpose",
                self._reshape(self._linear(x, f"{name}.{part}_proj"), -1, self._patches, self._heads, channels),
                perm=order,
            )
            for part, order in orders.items()
        )
        scale = self._constant("scale", np.asarray(channels**-0.5, np.float32))
        odds = self._add("Softmax", self._add("MatMul", self._add("Mul", q, scale), k), axis=-1)
        mixed = self._add("Transpose", self._add("MatMul", odds, v), perm=[0, 2, 1, 3])
        return self._linear(self._reshape(mixed, -1, self._width), f"{name}.out_proj")

    def _visual_tokens(self, x: str, grid_side: int, r: int) -> None:
        """`pixel_unshuffle` and the linear layer (model/projector.py)."""
        side = grid_side // r
        x = self._reshape(x, -1, side, r, side, r, self._width)
        x = self._add("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = self._add(
            "Gemm", self._reshape(x, -1, r * r * self._width), self._weight("projector.linear.weight"), transB=1
        )
        self._reshape(x, -1, side * side, self._weights["projector.linear.weight"].shape[0], output=OUTPUT)

    def _norm(self, x: str, name: str) -> str:
        scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._add("LayerNormalization", x, scale, bias, epsilon=LAYER_NORM_EPS)

    def _linear(self, x: str, name: str) -> str:
        return self._add("Gemm", x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"), transB=1)

    def _reshape(self, x: str, *shape: int, output: str = "") -> str:
        name = "shape " + " ".join(map(str, shape))
        return self._add("Reshape", x, self._constant(name, np.asarray(shape, np.int64)), output=output)
