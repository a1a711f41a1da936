"""One part, in the process that was started for it."""

import platform
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
import transformers

from benchmarks.common import machine
from benchmarks.gpu.encode import measure_encode
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.rate import datasheet_rate, product_rate
from benchmarks.gpu.setting import SETTINGS, Setting
from benchmarks.gpu.training import measure_training


def run_part(name: str, shape: str) -> dict[str, Any]:
    """Figures of a part; where it has none, `error` says why."""
    part, setting = next(part for part in PARTS if part.name == name), SETTINGS[shape]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.logging.set_verbosity_error()
    begun = perf_counter()
    try:
        figures = _measure(part, setting, device)
    except torch.OutOfMemoryError as error:
        figures = {"error": f"out of memory: {str(error).splitlines()[0]}"}
    figures["seconds"] = perf_counter() - begun
    return figures


def _measure(part: Part, setting: Setting, device: torch.device) -> dict[str, Any]:
    if part.kind == "gemm":
        return {"environment": environment(device)} | measure_rates(setting, device)
    if part.kind == "encode":
        return measure_encode(setting, part.compiled, device)
    assert part.training is not None
    return asdict(part.training) | measure_training(part.training, setting, device)


def measure_rates(setting: Setting, device: torch.device) -> dict[str, Any]:
    """FLOP/s of square products, and of the LLM's widest layer with the rows of a step."""
    llm, on_gpu = setting.shape.llm, device.type == "cuda"
    seconds, side = (1.0, 8192) if on_gpu else (0.02, 256)
    wide = product_rate(min(setting.step_tokens, 8192), llm.hidden, llm.mlp_size, device, seconds)
    return {
        "square": product_rate(side, side, side, device, seconds),
        "widest_layer": wide,
        "datasheet": datasheet_rate(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and what decides its speed, in words."""
    on_gpu = device.type == "cuda"
    return {
        "machine": machine(),
        "accelerator_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
    }
