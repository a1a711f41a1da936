"""Does a vision file compute what this package computes? Its runtime alone runs it, without torch (vision_process.py)."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3v.engines.vision_file import FILES, Runtime
from llama3v.errors import CheckpointError
from llama3v.exporters.check import NEW_TOKENS, relative_difference
from llama3v.model.llama3v import Llama3VForConditionalGeneration

# As a share of the root mean square of the right values, as in check.py. float16 keeps 11 bits of each weight.
TOLERANCE = {False: 1e-3, True: 5e-2}


def compare_vision(
    expected: dict[str, dict[str, Tensor]],
    directory: Path,
    runtime: Runtime,
    *,
    half: bool,
    model: Llama3VForConditionalGeneration | None = None,
) -> dict[str, Any]:
    """Run the file on the tiles of `check.reference_outputs` and compare its visual tokens.

    Args:
        half: whether its weights are in float16.
        model: its LLM then answers with the file's visual tokens, and the greedy tokens are compared, too.

    Returns:
        "visual_tokens": the largest difference as a share of the root mean square. With `model`: "cases", those with
        images, and "greedy_equal", in how many of them the answer is the same.

    Raises:
        CheckpointError: a difference above TOLERANCE, or a file that does not load.
    """
    found = _run_stock(expected, directory, runtime)
    report: dict[str, Any] = {
        "visual_tokens": max(relative_difference(expected[name]["visual_tokens"], found[name]) for name in found)
    }
    if not report["visual_tokens"] <= TOLERANCE[half]:
        raise CheckpointError(
            f"the visual tokens of {FILES[runtime]} differ by {report['visual_tokens']:.2e} of their root mean square "
            f"(limit {TOLERANCE[half]:.0e}); please report it with your version of {runtime}"
        )
    if model is not None:
        equal = [
            torch.equal(_answer(model, expected[name]["ids"], found[name]), expected[name]["greedy"]) for name in found
        ]
        report |= {"cases": list(found), "greedy_equal": sum(equal)}
        if not half and not all(equal):
            raise CheckpointError(
                f"with the visual tokens of {FILES[runtime]} the LLM gives other greedy tokens; please report it with "
                f"your version of {runtime}"
            )
    return report


@torch.no_grad()
def _answer(model: Llama3VForConditionalGeneration, ids: Tensor, visual: Tensor) -> Tensor:
    """The greedy continuation [1, new tokens] of ids [1, length] whose image slots hold `visual` [tokens, hidden]."""
    slots = ids == model.config.image_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(slots, 0))
    embeddings = embeddings.masked_scatter(slots.unsqueeze(-1), visual.to(embeddings.dtype))
    llm: Any = model.llm
    return llm.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones_like(ids),
        generation_config=model.generation_config,
        max_new_tokens=NEW_TOKENS,
    )


def _run_stock(expected: dict[str, dict[str, Tensor]], directory: Path, runtime: Runtime) -> dict[str, Tensor]:
    """Case -> visual tokens [tokens, hidden]."""
    pixels = {name: results["pixels"].contiguous() for name, results in expected.items() if "pixels" in results}
    with TemporaryDirectory() as work:
        files = [Path(work) / name for name in ("pixels.safetensors", "visual_tokens.safetensors")]
        save_file(pixels, files[0])
        program = str(Path(__file__).with_name("vision_process.py"))
        # -P: the program's own directory, which is inside this package, does not go on the import path
        command = [sys.executable, "-P", program, str(directory / FILES[runtime]), *map(str, files)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise CheckpointError(f"{runtime} cannot run the export: {last[0]}")
        return load_file(files[1])
