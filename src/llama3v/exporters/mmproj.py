"""The vision half of a GGUF pair: mmproj.gguf, which llama.cpp's mtmd runs.

    vision layers 1..k, the projector's blocks   ->  v.blk, k + 2 of them
    projector.norm                               ->  v.post_ln
    unshuffle (r), projector.linear              ->  projector "idefics3": mm.model.fc

Positions are by index there, so the table needs no border (model/fold.py does). "idefics3" insists on an unshuffle:
with r = 1 the projector is "janus_pro", linear, GELU, linear, which can be the one linear layer too, because
gelu(x) - gelu(-x) = x:  the first is [I; -I], the second [W, -W].
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama3v.model.blocks import LAYER_NORM_EPS
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.vision import SiglipTower

_PARTS = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
OUR_KEYS = "llama3v"
"""Prefix of the metadata that this package's engine reads, and others ignore."""


def write_mmproj(
    gguf: Any, model: Llama3VForConditionalGeneration, tower: SiglipTower, path: Path, *, half: bool, digest: str
) -> int:
    """Write the file; returns the number of tensors. `half`: matrices in float16 instead of float32.

    Args:
        digest: of the weights (vision_files.py), by which a vision file beside it is known to be of the same model.
    """
    from llama3v.exporters.gguf import finish

    config = model.config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name("Llama 3-V")
    writer.add_file_type(int(half))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("janus_pro" if config.scale_factor == 1 else "idefics3")
    writer.add_vision_use_gelu(True)  # the tanh form; without it, another function
    writer.add_vision_image_size(tower.tile_size)
    writer.add_vision_preproc_image_size(tower.tile_size)
    writer.add_vision_patch_size(tower.geometry["patch_size"])
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.mlp_size)
    writer.add_vision_block_count(tower.depth + config.projector_blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(LAYER_NORM_EPS)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_projector_scale_factor(config.scale_factor)
    writer.add_vision_image_mean(list(tower.mean))
    writer.add_vision_image_std(list(tower.std))
    writer.add_string(f"{OUR_KEYS}.prompt_format", config.prompt_format)
    writer.add_string(f"{OUR_KEYS}.vision_digest", digest)
    writer.add_uint32(f"{OUR_KEYS}.cut", tower.cut)
    for key in ("scale_factor", "projector_blocks", "max_tiles", "image_token_id"):
        writer.add_uint32(f"{OUR_KEYS}.{key}", getattr(config, key))
    tensors = dict(_tensors(model, tower))
    for name, tensor in tensors.items():
        # Biases, norms, positions and the patch embedding are small: they stay exact
        kind = "F16" if half and tensor.ndim == 2 and name != "v.position_embd.weight" else "F32"
        values = gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    return len(tensors)


def _tensors(model: Llama3VForConditionalGeneration, tower: SiglipTower) -> Iterator[tuple[str, Tensor]]:
    embeddings, projector = tower.embeddings, model.projector
    yield "v.patch_embd.weight", embeddings.patch_embedding.weight.data
    assert embeddings.patch_embedding.bias is not None
    yield "v.patch_embd.bias", embeddings.patch_embedding.bias.data
    yield "v.position_embd.weight", embeddings.position_embedding.weight.data
    for number, block in enumerate([*tower.layers, *projector.blocks]):
        for name, tensor in block.state_dict().items():
            part, _, kind = name.rpartition(".")
            yield f"v.blk.{number}.{_PARTS[part]}.{kind}", tensor
    yield "v.post_ln.weight", projector.norm.weight.data
    yield "v.post_ln.bias", projector.norm.bias.data
    linear = projector.linear.weight.data  # [hidden, r * r * width]
    if projector.scale_factor > 1:
        yield "mm.model.fc.weight", linear
        return
    identity = torch.eye(linear.shape[1])
    yield "mm.0.weight", torch.cat([identity, -identity])
    yield "mm.0.bias", torch.zeros(2 * linear.shape[1])
    yield "mm.1.weight", torch.cat([linear, -linear], dim=1)
    yield "mm.1.bias", torch.zeros(linear.shape[0])
