"""What fewer bits cost: perplexity and accuracy on held-out scenes, for each format in which a model can be run.

    python -m benchmarks.quantised --model runs/quickstart --json benchmarks/results/quantised.json

`--model` is a directory of `llama3v quickstart`; the scenes are the ones that it was evaluated with. Perplexity: of the
captions of held-out scenes, given the picture. Accuracy: exact answers to questions about them. peer is PyTorch in fp32.
In a GGUF file, a matrix whose rows are no multiple of 256 numbers takes Q5_0 where q4_k_m says Q4_K; the share of the
LLM's bytes says what was saved.
"""

import math
import random
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro

import llama3v
from benchmarks.common import row, write_results
from llama3v.config import ExportConfig
from llama3v.data.synthetic.dataset import write_scenes
from llama3v.data.synthetic.language import CAPTION_PROMPTS, caption, questions
from llama3v.engines.base import Question
from llama3v.engines.cached import CachedEngine
from llama3v.engines.prefix import Prompt
from llama3v.engines.sampling import logprobs
from llama3v.engines.torch import TorchEngine
from llama3v.evaluate.sight import same_answer
from llama3v.model.prompt import Turn

PACKAGES = ("transformers", "xllamacpp", "bitsandbytes", "mlx", "mlx-lm")


@dataclass
class Options:
    """What to run."""

    model: Path
    """A directory of `llama3v quickstart`."""
    json: Path | None = None
    """File for the results."""
    scenes: int = 96
    """Held-out scenes."""


@dataclass(frozen=True)
class Scores:
    """Of one format. `answers` are in the order of the questions; `size` in bytes of the LLM."""

    perplexity: float
    tokens: int
    answers: list[str]
    right: int
    size: int


def main(options: Options) -> list[dict[str, Any]]:
    with TemporaryDirectory() as work:
        held_out = write_scenes(Path(work) / "scenes", "held-out", options.scenes)
        pictures = [path.read_bytes() for path in held_out.pictures]
        captions = [
            ([Turn("user", CAPTION_PROMPTS[0], (0,)), Turn("assistant", caption(scene))], [picture])
            for scene, picture in zip(held_out.scenes, pictures, strict=True)
        ]
        asked: list[tuple[Question, str]] = []
        for scene, picture in zip(held_out.scenes, pictures, strict=True):
            for question in list(questions(scene, random.Random(scene.seed + "/probe")))[:3]:
                asked.append((([Turn("user", question.text, (0,))], [picture]), question.answer))
        found: dict[str, Scores] = {}
        for name, engine, size in _formats(options.model, Path(work)):
            found[name] = measure(engine, captions, asked, size)
            print(f"{name}: perplexity {found[name].perplexity:.4f}", file=sys.stderr, flush=True)
    rows = [entry for name in found for entry in _rows(name, found[name], next(iter(found.values())), len(asked))]
    write_results(options.json, rows, PACKAGES)
    return rows


def measure(engine: CachedEngine, captions: list[Question], asked: list[tuple[Question, str]], size: int) -> Scores:
    losses = [loss for turns, images in captions for loss in token_losses(engine, turns, images)]
    answers = [engine.answer(turns, images, max_new_tokens=8) for (turns, images), _ in asked]
    right = sum(same_answer(answer, expected) for answer, (_, expected) in zip(answers, asked, strict=True))
    return Scores(math.exp(sum(losses) / len(losses)), len(losses), answers, right, size)


def token_losses(engine: CachedEngine, turns: Any, images: Any) -> list[float]:
    """-log p of each token of the last answer, given what stands before it."""
    seen = [engine._look_at(image) for image in images]
    rendered = engine.renderer.render(turns, [image.grid for image in seen])
    prompt, cache = Prompt(rendered, seen), engine._caches._caches[0]
    cache.cells.clear()
    cache.reader.forget(0)
    start, end = rendered.spans[-1]
    logits = cache.reader.read(0, prompt.span(0, start))
    losses = []
    for place in range(start, end):
        losses.append(-logprobs(logits[: engine.renderer.image_token_id], prompt.ids[place], 0)[0])
        logits = cache.reader.read(place, prompt.span(place, place + 1))
    cache.reader.forget(0)
    return losses


def _formats(model: Path, work: Path) -> Iterator[tuple[str, CachedEngine, int]]:
    """(name, engine, bytes of its LLM), PyTorch in fp32 first."""
    for weights in ("full", "int8", "int4"):
        if weights == "full" or find_spec("bitsandbytes"):
            engine = TorchEngine(model, device="cpu", weights=weights)  # type: ignore[arg-type]
            held = [*engine.model.llm.parameters(), *engine.model.llm.buffers()]
            yield f"torch, {'fp32' if weights == 'full' else weights}", engine, sum(tensor.nbytes for tensor in held)
    if find_spec("xllamacpp"):
        from llama3v.engines.llamacpp import LlamaCppEngine

        for weights in ("f16", "bf16", "q8_0", "q4_k_m"):
            out = work / weights
            with redirect_stdout(sys.stderr):
                llama3v.export(
                    ExportConfig(
                        out=out,
                        model=str(model),
                        format="gguf",
                        weights=weights,
                        tower="none",
                        check=False,  # type: ignore[arg-type]
                    )
                )
            yield f"llama.cpp, {weights}", LlamaCppEngine(out, tower="torch"), (out / "model.gguf").stat().st_size
    if find_spec("mlx_lm"):
        from mlx.utils import tree_flatten

        from llama3v.engines.mlx import MlxEngine

        for weights in ("int8", "int4"):
            engine_ = MlxEngine(model, weights=weights)  # type: ignore[arg-type]
            yield f"MLX, {weights}", engine_, sum(array.nbytes for _, array in tree_flatten(engine_.llm.parameters()))


def _rows(name: str, scores: Scores, reference: Scores, asked: int) -> list[dict[str, Any]]:
    equal = np.mean([left == right for left, right in zip(scores.answers, reference.answers, strict=True)])
    share = f"{scores.size / reference.size:.0%} of fp32's bytes"
    return [
        row(
            f"{name}: perplexity",
            scores.perplexity,
            reference.perplexity,
            unit="perplexity",
            note=f"{scores.tokens} tokens of captions; {share}",
        ),
        row(
            f"{name}: accuracy",
            100 * scores.right / asked,
            100 * reference.right / asked,
            unit="%",
            note=f"{asked} questions; {equal:.1%} of the answers are those of fp32",
        ),
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
