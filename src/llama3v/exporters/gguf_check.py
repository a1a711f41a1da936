"""Does llama.cpp compute from a GGUF pair what this package computes? The same prompts and tiles, stock code only."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3v.errors import CheckpointError
from llama3v.exporters.check import CASES, NEW_TOKENS, relative_difference
from llama3v.exporters.texts import as_text
from llama3v.model.prompt import Renderer
from llama3v.model.vision import VisionTower

# Largest difference that is allowed, as a share of the root mean square of the right values. A tensor in the wrong
# place or order gives 1 and more. Rounded weights differ by what rounding does, which only float32 can bound tightly.
TOLERANCE = {
    "visual_tokens": {"f32": 1e-2},
    "logits": {"f32": 2e-2, "f16": 0.1, "bf16": 0.5, "q8_0": 0.5},
}
_OTHER_TYPES = 1.0


def compare(
    expected: dict[str, dict[str, Tensor]], directory: Path, renderer: Renderer, tower: VisionTower, weights: str
) -> dict[str, Any]:
    """Run the pair in `directory` on the inputs of `check.reference_outputs` and compare.

    Returns:
        the largest differences ("visual_tokens", "logits", as shares of the root mean square), in how many cases the
        greedy tokens are equal, and whether the pair's own tokenizer gives our ids.

    Raises:
        CheckpointError: a difference above the tolerance, other greedy tokens in float32, or a pair that does not load.
    """
    found = _run_stock(expected, directory, renderer, tower)
    report: dict[str, Any] = {"cases": list(expected), "visual_tokens": 0.0, "logits": 0.0}
    for key, limits in TOLERANCE.items():
        pairs = [(results[key], found[f"{name}.{key}"]) for name, results in expected.items() if key in results]
        report[key] = max(relative_difference(ours, theirs) for ours, theirs in pairs)
        limit = limits.get(weights, _OTHER_TYPES if key == "logits" else 5e-2)
        if not report[key] <= limit:
            raise CheckpointError(
                f"the {key.replace('_', ' ')} of the GGUF files differ by {report[key]:.2e} of their root mean square "
                f"(limit {limit:.0e} with {weights}); please report it with your version of xllamacpp"
            )
    equal = [torch.equal(results["greedy"], found[f"{name}.greedy"]) for name, results in expected.items()]
    if weights == "f32" and not all(equal):
        raise CheckpointError(
            "the GGUF files give other greedy tokens; please report it with your version of xllamacpp"
        )
    report["greedy_equal"] = sum(equal)
    report["tokenizer_gives_our_ids"] = found["text_ids"].tolist()[0] == expected["text"]["ids"].tolist()[0]
    return report


def _run_stock(
    expected: dict[str, dict[str, Tensor]], directory: Path, renderer: Renderer, tower: VisionTower
) -> dict[str, Tensor]:
    settings = {
        "cases": list(expected),
        "context_tokens": NEW_TOKENS + max(results["ids"].shape[1] for results in expected.values()),
        "image_token_id": renderer.image_token_id,
        "max_new_tokens": NEW_TOKENS,
        "stop_ids": renderer.stop_ids,
        "text": as_text(renderer.format, CASES["text"].turns),
    }
    inputs = {"settings": torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)}
    for name, results in expected.items():
        inputs[f"{name}.ids"] = results["ids"].contiguous()
        if "pixels" in results:
            inputs[f"{name}.tiles"] = _tiles(results["pixels"], tower)
    with TemporaryDirectory() as work:
        files = [Path(work) / name for name in ("inputs.safetensors", "outputs.safetensors")]
        save_file(inputs, files[0])
        command = [sys.executable, "-m", "llama3v.exporters.gguf_process", str(directory), *map(str, files)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise CheckpointError(f"llama.cpp cannot run the export: {last[0]}")
        return load_file(files[1])


def _tiles(pixels: Tensor, tower: VisionTower) -> Tensor:
    """Normalised [n, 3, S, S] -> the uint8 [n, S, S, 3] it was made from."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    return ((pixels * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
