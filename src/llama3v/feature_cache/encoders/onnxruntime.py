"""The trunk in ONNX Runtime on the CPU. Extra: llama3v[onnxruntime].

The graph is written here node by node rather than exported: so it can use the runtime's own attention, its weights
are those of the torch module without a copy (hence no file and no limit of 2 GB), and it does not depend on how
a version of torch exports. Activations are [tiles * patches, width] throughout, so that every linear layer is one Gemm.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.config import Precision
from llama3v.errors import ConfigError
from llama3v.feature_cache.encoders.base import TrunkEncoder, require_siglip, tiles_per_pass
from llama3v.model.blocks import LAYER_NORM_EPS
from llama3v.model.vision import SiglipTower, VisionTower

_OPSET, _RUNTIMES_OPSET, _IR_VERSION = 20, 1, 10  # opset 20 has Gelu


class OnnxRuntimeEncoder(TrunkEncoder):
    """Runs in fp32, with as many threads as torch does."""

    name = "onnxruntime"

    def __init__(self, tower: VisionTower, precision: Precision, batch_tiles: int) -> None:
        import onnxruntime

        if precision != "fp32":
            raise ConfigError(f"the engine onnxruntime computes in fp32, not {precision}; give --precision fp32")
        super().__init__(tower, precision, tiles_per_pass(batch_tiles, tower.grid_side**2))
        graph = _Graph(require_siglip(self.name, tower), self.tiles_in_pass)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), values)
        self._weights = graph.weights  # the session reads them where they are
        self._session = onnxruntime.InferenceSession(graph.model(), options, providers=["CPUExecutionProvider"])
        self._pass_shape = (self.tiles_in_pass, *self._shape)

    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        (features,) = self._session.run(None, {"tiles": np.ascontiguousarray(tiles)})
        return torch.from_numpy(features).view(self._pass_shape)


class _Graph:
    """An ONNX model that grows node by node. Method `add` returns the name of what the new node gives."""

    def __init__(self, tower: SiglipTower, tiles: int) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.tower, self.tiles, self.patches = tower, tiles, tower.grid_side**2
        x = self._embeddings()
        for index in range(tower.cut):
            x = self._layer(x, f"layers.{index}")
        self.output = x

    def model(self) -> bytes:
        """The model as ONNX's bytes, without the values of its weights."""
        from onnx import TensorProto, helper, numpy_helper

        side = self.tower.tile_size
        tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, [self.tiles, side, side, 3])
        features = helper.make_tensor_value_info(
            self.output, TensorProto.FLOAT, [self.tiles * self.patches, self.tower.width]
        )
        values = [_declaration(name, value) for name, value in self.weights.items()]
        values += [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "trunk", [tiles], [features], initializer=values)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", _RUNTIMES_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = _IR_VERSION
        return model.SerializeToString()

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        return output

    def weight(self, name: str) -> str:
        """Declare a parameter of the tower."""
        self.weights[name] = self.tower.get_parameter(name).detach().numpy()
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Declare a small value that is part of the model's bytes."""
        self.constants[name] = value
        return name

    def _embeddings(self) -> str:
        """tiles -> [tiles * patches, width]"""
        from onnx import TensorProto

        tower, patches = self.tower, self.patches
        mean, std = (np.asarray(value, dtype=np.float32).reshape(3, 1, 1) for value in (tower.mean, tower.std))
        pixels = self.add("Cast", self.add("Transpose", "tiles", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
        pixels = self.add("Div", pixels, self.constant("255", np.float32(255).reshape(1)))
        pixels = self.add("Div", self.add("Sub", pixels, self.constant("mean", mean)), self.constant("std", std))
        kernel, bias = (self.weight(f"embeddings.patch_embedding.{name}") for name in ("weight", "bias"))
        size = list(self.weights[kernel].shape[2:])
        embedded = self.add("Conv", pixels, kernel, bias, kernel_shape=size, strides=size)
        embedded = self._reshape(embedded, self.tiles, tower.width, patches)
        embedded = self.add("Transpose", embedded, perm=[0, 2, 1])
        positions = self.weight("embeddings.position_embedding.weight")
        return self._reshape(self.add("Add", embedded, positions), self.tiles * patches, tower.width)

    def _layer(self, x: str, layer: str) -> str:
        """The same as `SelfAttentionBlock` (model/blocks.py)."""
        tower = self.tower
        normed = self._norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            self._reshape(self._linear(normed, f"{layer}.self_attn.{name}_proj"), self.tiles, self.patches, tower.width)
            for name in ("q", "k", "v")
        )
        attended = self.add("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=tower.heads)
        attended = self._reshape(attended, self.tiles * self.patches, tower.width)
        x = self.add("Add", x, self._linear(attended, f"{layer}.self_attn.out_proj"))
        hidden = self._linear(self._norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        return self.add("Add", x, self._linear(self.add("Gelu", hidden, approximate="tanh"), f"{layer}.mlp.fc2"))

    def _norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, bias, epsilon=LAYER_NORM_EPS)

    def _linear(self, x: str, name: str) -> str:
        return self.add("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), transB=1)

    def _reshape(self, x: str, *shape: int) -> str:
        name = "shape " + "x".join(map(str, shape))
        return self.add("Reshape", x, self.constant(name, np.asarray(shape, dtype=np.int64)))


def _declaration(name: str, value: np.ndarray) -> Any:
    """A weight whose values the session is given apart from the model."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given to the session")
    return tensor
