"""The encode pass: tiles from host memory through the tower, features back in host memory, by the project's own engine."""

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.kernels import where_time_goes
from benchmarks.gpu.rate import wait
from benchmarks.gpu.setting import Setting
from llama3v.feature_cache.encoders.torch import CompiledTorchEncoder, TorchEncoder
from llama3v.model.vision import make_tower
from llama3v.plan.flops import Part, encoder_layer_weights


def measure_encode(setting: Setting, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Tiles per second in bf16: whole (as the encode pass has it, copies both ways included), and the GPU's work alone."""
    shape, tiles = setting.shape.tower, setting.encode_tiles
    torch.manual_seed(0)
    tower = make_tower(setting.shape.config().vision_config).requires_grad_(False).eval()
    begun = perf_counter()
    kind = CompiledTorchEncoder if compiled else TorchEncoder
    encoder = kind(tower, "bf16", tiles)
    pixels = np.random.default_rng(0).integers(0, 256, (tiles, shape.tile_size, shape.tile_size, 3), dtype=np.uint8)
    encoder.encode(pixels)
    opening = perf_counter() - begun
    whole, alone = [], []
    part = pixels[: encoder.tiles_in_pass]
    for _ in range(setting.encode_passes):
        begun = perf_counter()
        encoder.encode(pixels)
        whole.append(perf_counter() - begun)
        wait(device)
        begun = perf_counter()
        encoder.encode_pass(part)
        wait(device)
        alone.append(perf_counter() - begun)
    work = Part(tower.depth * encoder_layer_weights(shape.width, shape.mlp_size), tower.depth * shape.width)
    flops = work.flops(shape.patches, shape.patches**2)
    return {
        "layers": tower.depth,
        "tiles_in_pass": encoder.tiles_in_pass,
        "tiles_per_second": tiles / median(whole),
        "tower_alone_tiles_per_second": len(part) / median(alone),
        "flops_per_tile": flops,
        "model_flops_per_second": flops * tiles / median(whole),
        "opening_seconds": opening,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "kernels": where_time_goes(lambda: encoder.encode(pixels), device),
    }
