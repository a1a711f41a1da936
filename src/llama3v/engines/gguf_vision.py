"""The vision half of a GGUF pair as modules of ours, so that the tower runs on any encode engine of the cache."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.engines.base import ImageFeatures
from llama3v.engines.llama_api import require_gguf
from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.projector import Projector
from llama3v.model.tiles import Tiles
from llama3v.model.vision import SiglipTower

_PARTS = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


class GgufVision:
    """Tower and projector of an mmproj.gguf that `llama3v export` wrote.

    Args:
        tower: a name of feature_cache/encoders; default: OpenVINO where it is installed, else torch. In float32.
    """

    def __init__(self, path: Path, tower: str | None = None) -> None:
        fields, tensors = _read(path)
        try:
            self.prompt_format = str(fields["llama3v.prompt_format"])
            self.image_token_id, self.max_tiles, blocks, r = (
                int(fields[f"llama3v.{key}"])
                for key in ("image_token_id", "max_tiles", "projector_blocks", "scale_factor")
            )
            depth = int(fields["clip.vision.block_count"]) - blocks
            self.hidden = int(fields["clip.vision.projection_dim"])
            self._tower = _tower(fields, depth)
        except KeyError as error:
            raise CheckpointError(
                f"{path} lacks {error}: it is no mmproj.gguf of this package; export the model with --format gguf"
            ) from error
        self._projector = Projector(
            width=self._tower.width,
            heads=self._tower.heads,
            mlp_size=self._tower.mlp_size,
            grid_side=self._tower.grid_side,
            scale_factor=r,
            hidden=self.hidden,
            blocks=blocks,
        ).eval()
        self.tokens_per_tile, self.tile_size = self._projector.tokens_per_tile, self._tower.tile_size
        _fill(path, self._tower, self._projector, tensors)
        self._encoder_name = tower or ("openvino" if importlib.util.find_spec("openvino") else "torch")
        self._encoder: Any = None  # opened by the first image

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(patches, width) of a tile's features at the cut."""
        return self._tower.grid_side**2, self._tower.width

    @torch.inference_mode()
    def encode(self, tiles: Tiles) -> np.ndarray:
        """Tiles -> visual tokens float32 [tiles * tokens_per_tile, hidden]."""
        if self._encoder is None:
            from llama3v.feature_cache.encoders.choose import open_encoder

            self._encoder = open_encoder(self._encoder_name, self._tower, precision="fp32", batch_tiles=1)  # type: ignore[arg-type]
        # one tile in a pass, unrounded: `encode` would store bf16
        features = torch.cat([self._encoder.encode_pass(tile[None]).float().cpu() for tile in tiles.pixels])
        return self._project(features)

    @torch.inference_mode()
    def project(self, image: ImageFeatures) -> np.ndarray:
        """Features at the cut -> visual tokens."""
        return self._project(image.features.float().cpu())

    def _project(self, features: Tensor) -> np.ndarray:
        return self._projector(self._tower.top(features)).flatten(0, 1).numpy()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors in float32) of a GGUF file."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading GGUF needs an extra: pip install 'llama3v[llamacpp]'") from error
    require_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); export the model again") from error
    return fields, tensors


def _tower(fields: dict[str, Any], depth: int) -> SiglipTower:
    """An empty tower, cut where the model's was."""
    keys = {"image_size": "tile_size", "patch_size": "patch_size", "embedding_length": "width"}
    keys |= {"attention.head_count": "heads", "feed_forward_length": "mlp_size"}
    geometry = {ours: int(fields[f"clip.vision.{theirs}"]) for theirs, ours in keys.items()}
    tower = SiglipTower(geometry | {"depth": depth, "cut": int(fields["llama3v.cut"])}).eval()
    tower.mean, tower.std = (tuple(map(float, fields[f"clip.vision.image_{key}"])) for key in ("mean", "std"))
    return tower


def _fill(path: Path, tower: SiglipTower, projector: Projector, tensors: dict[str, np.ndarray]) -> None:
    """Give both their weights. CheckpointError where names or shapes do not fit."""
    ours: dict[str, dict[str, Tensor]] = {"tower": {}, "projector": {}}
    for name, values in tensors.items():
        tensor = torch.from_numpy(np.array(values, np.float32))  # a copy: the file is mapped into memory
        if name.startswith("v.blk."):
            number, part, kind = name.removeprefix("v.blk.").split(".")
            where, prefix, index = ("tower", "layers", int(number))
            if index >= tower.depth:
                where, prefix, index = "projector", "blocks", index - tower.depth
            ours[where][f"{prefix}.{index}.{_PARTS[part]}.{kind}"] = tensor
        elif name.startswith("v.post_ln."):
            ours["projector"][f"norm.{name.removeprefix('v.post_ln.')}"] = tensor
        elif name.startswith("v.patch_embd."):
            ours["tower"][f"embeddings.patch_embedding.{name.removeprefix('v.patch_embd.')}"] = tensor
        elif name == "v.position_embd.weight":
            ours["tower"]["embeddings.position_embedding.weight"] = tensor
        elif name == "mm.model.fc.weight":
            ours["projector"]["linear.weight"] = tensor
        elif name == "mm.1.weight":  # r = 1: [W, -W], see exporters/mmproj.py
            ours["projector"]["linear.weight"] = tensor[:, : tensor.shape[1] // 2].contiguous()
    try:
        tower.load_state_dict(ours["tower"])
        projector.load_state_dict(ours["projector"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold one tower and projector ({reason}); export the model again"
        ) from error
