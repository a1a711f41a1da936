"""The vision half of a GGUF pair as torch modules of ours: for pairs without a vision file, and for cached features."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.engines.vision import Vision
from llama3v.errors import CheckpointError
from llama3v.model.projector import Projector
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


class TorchVision(Vision):
    """Tower and projector of an mmproj.gguf.

    Args:
        fields, reader: metadata and gguf.GGUFReader of the file.
        encoder: a name of feature_cache/encoders; default: OpenVINO where it is installed, else torch. In float32.
    """

    def __init__(self, path: Path, fields: dict[str, Any], reader: Any, encoder: str | None = None) -> None:
        blocks = int(fields["llama3v.projector_blocks"])
        tower = _tower(fields, int(fields["clip.vision.block_count"]) - blocks)
        projector = Projector(
            width=tower.width,
            heads=tower.heads,
            mlp_size=tower.mlp_size,
            grid_side=tower.grid_side,
            scale_factor=int(fields["llama3v.scale_factor"]),
            hidden=int(fields["clip.vision.projection_dim"]),
            blocks=blocks,
        )
        _fill(path, tower, projector, reader)
        super().__init__(tower, projector, encoder or ("openvino" if importlib.util.find_spec("openvino") else "torch"))


def _tower(fields: dict[str, Any], depth: int) -> SiglipTower:
    """An empty tower, cut where the model's was."""
    keys = {"image_size": "tile_size", "patch_size": "patch_size", "embedding_length": "width"}
    keys |= {"attention.head_count": "heads", "feed_forward_length": "mlp_size"}
    geometry = {ours: int(fields[f"clip.vision.{theirs}"]) for theirs, ours in keys.items()}
    tower = SiglipTower(geometry | {"depth": depth, "cut": int(fields["llama3v.cut"])}).eval()
    tower.mean, tower.std = (tuple(map(float, fields[f"clip.vision.image_{key}"])) for key in ("mean", "std"))
    return tower


def _fill(path: Path, tower: SiglipTower, projector: Projector, reader: Any) -> None:
    """Give both their weights. CheckpointError where names or shapes do not fit."""
    import gguf

    ours: dict[str, dict[str, Tensor]] = {"tower": {}, "projector": {}}
    for stored in reader.tensors:
        name, values = stored.name, gguf.quants.dequantize(stored.data, stored.tensor_type)
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
