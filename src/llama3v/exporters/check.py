"""Does an export compute what this package computes? Both run the same prompts and tiles in float32.

The export runs in a process of its own that cannot import llama3v (stock_process.py).
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from llama3v.errors import CheckpointError
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.slicing import Grid
from llama3v.model.tiles import to_pixels

# Largest difference that is allowed, as a share of the root mean square of the right values. The same operations in
# the same order give 0; another order of summation in float32 gives about 1e-6, and a wrong position or layer 1e-1.
TOLERANCE = {"features": 1e-4, "visual_tokens": 1e-4, "logits": 1e-3}
NEW_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One conversation: its turns and the grid of each image."""

    turns: tuple[Turn, ...]
    grids: tuple[Grid, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """The same conversation as a chat template takes it."""
        return [
            {
                "role": turn.role,
                "content": [
                    *(
                        {"type": "image", "columns": grid.columns, "rows": grid.rows}
                        for grid in (self.grids[image] for image in turn.images)
                    ),
                    {"type": "text", "text": turn.text},
                ],
            }
            for turn in self.turns
        ]


_QUESTION = "What is in the picture?"
CASES = {
    "text": Case((Turn("user", "Name three colours."),)),
    "one_tile": Case((Turn("user", _QUESTION, (0,)),), (Grid(1, 1),)),
    "two_images": Case(
        (
            Turn("system", "Answer in one sentence."),
            Turn("user", _QUESTION, (0,)),
            Turn("assistant", "A table."),
            Turn("user", "And here: what changed?", (1,)),
        ),
        (Grid(1, 1), Grid(2, 1)),
    ),
}


def reference_outputs(model: Llama3VForConditionalGeneration, tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """Run every case in this package: case -> ids, pixels and what they give."""
    renderer = Renderer(tokenizer, model.config.prompt_format, model.tokens_per_tile, model.config.image_token_id)
    # Only what an export states, so that a base's own settings (a repetition penalty, say) do not part the two
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(renderer.stop_ids), pad_token_id=renderer.stop_ids[-1]
    )
    generator = torch.Generator().manual_seed(0)
    outputs = {}
    for name, case in CASES.items():
        ids = torch.tensor([renderer.render(case.turns, case.grids, generate=True).ids])
        tiles = sum(grid.tiles for grid in case.grids)
        outputs[name] = _run(model, ids, _random_pixels(model, tiles, generator) if tiles else None)
    return outputs


def compare(expected: dict[str, dict[str, Tensor]], directory: Path, tokens_per_tile: int) -> dict[str, Any]:
    """Run the export in `directory` on the same inputs and compare.

    Returns:
        the largest differences ("features", "visual_tokens", "logits", as shares of the root mean square), and
        whether the directory's own template gives the same token ids.

    Raises:
        CheckpointError: a difference above TOLERANCE, other greedy tokens, or an export that does not load.
    """
    found = _run_stock(expected, directory, tokens_per_tile)
    report: dict[str, Any] = {"cases": list(expected), **dict.fromkeys(TOLERANCE, 0.0)}
    for name, results in expected.items():
        logits, vocabulary = found[f"{name}.logits"], results["logits"].shape[-1]
        found[f"{name}.logits"] = logits[..., :vocabulary]  # the rest are the reserved tokens
        for key in TOLERANCE.keys() & results.keys():
            report[key] = max(report[key], relative_difference(results[key], found[f"{name}.{key}"]))
    for key, limit in TOLERANCE.items():
        if report[key] > limit:
            raise CheckpointError(
                f"the export's {key} differ by {report[key]:.2e} of their root mean square (limit {limit:.0e}); "
                "please report it with your version of transformers"
            )
    for name, results in expected.items():
        if not torch.equal(results["greedy"], found[f"{name}.greedy"]):
            raise CheckpointError(
                f"the export answers the check {name!r} with the tokens {found[f'{name}.greedy'].tolist()[0]}, this "
                f"package with {results['greedy'].tolist()[0]}; please report it with your version of transformers"
            )
    report["template_gives_our_ids"] = all(
        torch.equal(results["ids"], found[f"{name}.template_ids"]) for name, results in expected.items()
    )
    return report


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest absolute difference over the root mean square of `expected`; infinite where they cannot be compared."""
    if expected.shape != found.shape:
        return math.inf
    difference = float((expected - found).abs().max() / expected.square().mean().sqrt())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def _run(model: Any, ids: Tensor, pixels: Tensor | None) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    results = {"ids": ids}
    if pixels is not None:
        features = model.vision.trunk(pixels)
        results["pixels"] = pixels
        results["features"] = model.projector.norm(_blocks(model, features))
        results["visual_tokens"] = model.visual_tokens(features).flatten(0, 1)
    results["logits"] = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    answer = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=NEW_TOKENS)
    results["greedy"] = answer[:, ids.shape[1] :]
    return results


def _blocks(model: Llama3VForConditionalGeneration, features: Tensor) -> Tensor:
    """What stands before the projector's norm: in the fold, the output of the last vision layer."""
    features = model.vision.top(features)
    for block in model.projector.blocks:
        features = block(features)
    return features


def _random_pixels(model: Llama3VForConditionalGeneration, tiles: int, generator: torch.Generator) -> Tensor:
    side = model.vision.tile_size
    noise = torch.randint(0, 256, (tiles, side, side, 3), dtype=torch.uint8, generator=generator)
    return to_pixels(noise.numpy(), model.vision.mean, model.vision.std)


def _run_stock(expected: dict[str, dict[str, Tensor]], directory: Path, tokens_per_tile: int) -> dict[str, Tensor]:
    cases = {
        name: {
            "messages": CASES[name].messages(),
            "max_new_tokens": NEW_TOKENS,
            "tokens_per_tile": tokens_per_tile,
        }
        for name in expected
    }
    inputs = {
        f"{name}.{key}": results[key].contiguous()
        for name, results in expected.items()
        for key in ("ids", "pixels")
        if key in results
    }
    with TemporaryDirectory() as work:
        files = [Path(work) / name for name in ("inputs.safetensors", "cases.json", "outputs.safetensors")]
        save_file(inputs, files[0])
        files[1].write_text(json.dumps(cases))
        # -P: the program's own directory, which is inside this package, does not go on the import path
        program = str(Path(__file__).with_name("stock_process.py"))
        process = subprocess.run(
            [sys.executable, "-P", program, str(directory), *map(str, files)], capture_output=True, text=True
        )
        if process.returncode != 0:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise CheckpointError(f"stock transformers cannot load the export: {last[0]}")
        return load_file(files[2])
