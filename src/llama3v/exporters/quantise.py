"""Which type each matrix of an LLM takes in a GGUF file, and its bytes.

The mixture q4_k_m is llama.cpp's own (src/llama-quant.cpp, LLAMA_FTYPE_MOSTLY_Q4_K_M): 4 bits, but 6 for the output
layer and for half of the value and down projections.
"""

from typing import Any

import numpy as np

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}
"""--weights -> ggml's type of most matrices."""
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_k_m": 15}
"""general.file_type: enum llama_ftype."""
_BLOCKS = {"Q4_K": 256, "Q6_K": 256, "Q8_0": 32, "Q5_0": 32}
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # where 256 does not divide a row


def type_of(weights: str, name: str, shape: tuple[int, ...], *, layers: int, tied: bool) -> str:
    """ggml's type of one tensor: norms and biases stay in float32."""
    if len(shape) < 2:
        return "F32"
    kind = TYPES[weights]
    if kind == "Q4_K" and _takes_six_bits(name, layers, tied):
        kind = "Q6_K"
    if kind in _BLOCKS and shape[-1] % _BLOCKS[kind]:
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return "F16" if kind in _BLOCKS and shape[-1] % _BLOCKS[kind] else kind


def _takes_six_bits(name: str, layers: int, tied: bool) -> bool:
    if name == ("token_embd.weight" if tied else "output.weight"):
        return True
    if ".attn_v." not in name and ".ffn_down." not in name:
        return False
    layer = int(name.split(".")[1])
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def encoded(gguf: Any, values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values in a ggml type. K types are made by ggml itself, the others by the Python package gguf.

    Raises ConfigError where a K type is asked for and llama.cpp is not installed.
    """
    number = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quants.quantize(values, number)
    from llama3v.engines.llama_api import quantise

    return quantise(values, int(number))
