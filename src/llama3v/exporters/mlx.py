"""Write a Llama 3-V for MLX: the stock form, converted by mlx-vlm's own program, its LLM in 8 or 4 bits if asked.

mlx-vlm reads the stock form as it is; what converting adds is quantisation, and weights in MLX's own layout. It runs in
a process of its own (mlx_process.py), which also says what the result computes.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters.check import NEW_TOKENS, relative_difference

BITS = {"int8": 8, "int4": 4}
_GROUPS = (64, 32)
"""Numbers that share a scale: mlx-vlm's default, and what narrow models need."""

# As a share of the root mean square of the right values (check.py). Without quantisation float32 differs by rounding.
VISUAL_TOLERANCE = {"f32": 1e-3}
_OTHER_VISUAL_TOLERANCE = 0.1
LOGITS_TOLERANCE = {"f32": 1e-2, "f16": 0.1, "bf16": 0.5, "int8": 0.5}
_OTHER_LOGITS_TOLERANCE = 1.5


def require_mlx_vlm() -> None:
    """ConfigError, naming the extra, where mlx or mlx-vlm is not installed."""
    absent = [name for name in ("mlx", "mlx_vlm") if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"--format mlx needs mlx-vlm (there is no module {absent[0]}): pip install mlx-vlm on a Mac, "
            "pip install 'mlx[cpu]' mlx-vlm on Linux"
        )


def convert(stock: Path, directory: Path, *, weights: str, hidden: int) -> None:
    """Convert the stock directory into an empty one. CheckpointError where mlx-vlm cannot.

    Args:
        weights: "f32", "f16", "bf16", or the LLM's matrices in "int8" or "int4" (the rest then stays as it is).
        hidden: width of the LLM's embeddings, which a quantisation group must divide.
    """
    group = next((size for size in _GROUPS if hidden % size == 0), None)
    if weights in BITS and group is None:
        raise CheckpointError(
            f"MLX quantises groups of {' or '.join(map(str, _GROUPS))} numbers, which do not divide this LLM's width of "
            f"{hidden}; give --weights bf16"
        )
    settings = {"bits": BITS.get(weights), "group": group, "dtype": _DTYPES.get(weights)}
    _run("convert", str(stock), str(directory), json.dumps(settings))


_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def compare(
    expected: dict[str, dict[str, Tensor]], directory: Path, weights: str, image_token_id: int
) -> dict[str, Any]:
    """Run the export in mlx-vlm on the inputs of `check.reference_outputs` and compare.

    Returns:
        the largest differences ("visual_tokens", "logits", as shares of the root mean square), and in how many cases
        the greedy tokens are equal.

    Raises:
        CheckpointError: a difference above the tolerance, other greedy tokens in float32, or an export that does not
            load.
    """
    keys = ("ids", "pixels")
    inputs = {
        f"{name}.{key}": results[key].contiguous()
        for name, results in expected.items()
        for key in keys
        if key in results
    }
    with TemporaryDirectory() as work:
        files = [Path(work) / name for name in ("inputs.safetensors", "outputs.safetensors")]
        save_file(inputs, files[0])
        _run("check", str(directory), *map(str, files), str(NEW_TOKENS), str(image_token_id))
        found = load_file(files[1])
    report: dict[str, Any] = {"cases": list(expected), "greedy_equal": 0}
    limits = {
        "visual_tokens": VISUAL_TOLERANCE.get(weights, _OTHER_VISUAL_TOLERANCE),
        "logits": LOGITS_TOLERANCE.get(weights, _OTHER_LOGITS_TOLERANCE),
    }
    for key, limit in limits.items():
        pairs = [
            (results[key][0] if key == "logits" else results[key], found[f"{name}.{key}"])
            for name, results in expected.items()
            if key in results
        ]
        report[key] = max(relative_difference(ours, theirs) for ours, theirs in pairs)
        if not report[key] <= limit:
            raise CheckpointError(
                f"the {key.replace('_', ' ')} of the MLX export differ by {report[key]:.2e} of their root mean square "
                f"(limit {limit:.0e} with {weights}); please report it with your version of mlx-vlm"
            )
    for name, results in expected.items():
        answer = results["greedy"][0]
        report["greedy_equal"] += int(torch.equal(answer, found[f"{name}.greedy"][: len(answer)]))
    if weights == "f32" and report["greedy_equal"] < len(expected):
        raise CheckpointError("the MLX export gives other greedy tokens; please report it with your version of mlx-vlm")
    return report


def _run(*arguments: str) -> None:
    program = str(Path(__file__).with_name("mlx_process.py"))
    # -P: the program's own directory, which is inside this package, does not go on the import path
    process = subprocess.run([sys.executable, "-P", program, *arguments], capture_output=True, text=True)
    if process.returncode != 0:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise CheckpointError(f"mlx-vlm cannot {arguments[0]} the export: {last[0]}")
