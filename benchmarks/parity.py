"""One checkpoint, greedy tokens in every program that runs it: this package's engines, and stock ones without it.

    python -m benchmarks.parity --json benchmarks/results/parity.json
    python -m benchmarks.parity --model runs/stage2

The first row is our engine in PyTorch in fp32, which the others are compared with: ours = tokens that are equal up to the
first difference of a conversation, peer = tokens of PyTorch's answers. Answers do not end before --new-tokens, so that
there is much to compare. Where one parts, the note says how near the two likeliest tokens were to PyTorch: programs add
numbers up in different orders, and a tie may fall either way. Stock programs run in processes of their own that
cannot import this package (parity_process.py), and get the same token ids and pixels. What is not installed is left out
and named. Without --model: the towers that the package carries, and a projector at its starting point.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

import llama3v
from benchmarks.common import row, write_results
from llama3v.config import ExportConfig, Sampling
from llama3v.engines.cached import CachedEngine
from llama3v.engines.torch import TorchEngine
from llama3v.model.prompt import Turn
from llama3v.model.tiles import make_tiles, to_pixels

PACKAGES = ("transformers", "xllamacpp", "openvino", "mlx", "mlx-lm", "mlx-vlm")


@dataclass
class Options:
    """What to run."""

    model: Path | None = None
    """A Llama 3-V model directory with a SigLIP tower; without it, the weights that the package carries."""
    json: Path | None = None
    """File for the results."""
    new_tokens: int = 32
    """Tokens of each answer."""
    mlx_vlm: bool = True
    """Run mlx-vlm where it is installed; importing it takes most of a minute."""


Conversation = tuple[list[Turn], list[Image.Image]]
Tokens = dict[str, list[int]]
"""Conversation -> the ids of its greedy answer."""
Margins = dict[str, list[float]]
"""Conversation -> for each token, by how much its log-probability exceeds the next one's."""


def conversations() -> dict[str, Conversation]:
    """Without an image, with one of one tile, with slices, and with two images in two turns."""
    question = "What is in the picture?"
    return {
        "text": ([Turn("user", "Name three colours.")], []),
        "one tile": ([Turn("user", question, (0,))], [_picture(1, 60, 60)]),
        "slices": ([Turn("user", question, (0,))], [_picture(2, 1500, 900)]),
        "two images": (
            [Turn("user", question, (0,)), Turn("assistant", "A table."), Turn("user", "And here?", (1,))],
            [_picture(3, 90, 60), _picture(4, 400, 800)],
        ),
    }


def main(options: Options) -> list[dict[str, Any]]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        model = options.model or _carried_model(Path(work) / "model")
        cases = conversations()
        reference = TorchEngine(model, device="cpu")
        expected, margins = _answers(reference, cases, options.new_tokens)
        rows.append(compared("llama3v, torch, fp32", expected, expected, margins))
        del reference
        for name, note, run in _programs(model, Path(work), cases, options):
            reason = next((f"no {module}" for module in note.split() if find_spec(module) is None), None)
            if reason is not None:
                print(f"left out: {name} ({reason})", file=sys.stderr)
                continue
            rows.append(compared(name, expected, run(), margins))
    show(rows)
    write_results(options.json, rows, PACKAGES, show=(), model="the package's own" if options.model is None else None)
    return rows


def _programs(
    model: Path, work: Path, cases: dict[str, Conversation], options: Options
) -> Iterator[tuple[str, str, Callable[[], Tokens]]]:
    """(name, modules that it needs, what runs it), one after the other."""
    n = options.new_tokens
    inputs = _stock_inputs(TorchEngine(model, device="cpu"), cases, work / "inputs", n)
    stock = _exported(model, work / "hf", format="hf")
    yield "transformers, fp32, its own process", "", lambda: _in_process("transformers", stock, inputs)

    def llama(weights: str, kv: str, tower: str) -> Tokens:
        from llama3v.engines.llamacpp import LlamaCppEngine

        file = "openvino" if tower == "openvino" else "none"
        pair = _exported(model, work / f"{weights}-{tower}", format="gguf", weights=weights, tower=file)
        return _answers(LlamaCppEngine(pair, kv=kv, tower=tower), cases, n)[0]

    yield "llama3v, llama.cpp, f32", "xllamacpp gguf", lambda: llama("f32", "f32", "torch")
    yield "llama3v, llama.cpp, f16", "xllamacpp gguf", lambda: llama("f16", "f16", "torch")
    yield "llama3v, OpenVINO tower + llama.cpp, f32", "xllamacpp gguf openvino", lambda: llama("f32", "f32", "openvino")

    def mlx() -> Tokens:
        from llama3v.engines.mlx import MlxEngine

        return _answers(MlxEngine(model), cases, n)[0]

    yield "llama3v, MLX (mlx-lm), fp32", "mlx mlx_lm", mlx
    if options.mlx_vlm:
        yield "mlx-vlm, fp32, its own process", "mlx mlx_vlm", lambda: _in_process("mlx_vlm", stock, inputs)


def _answers(engine: CachedEngine, cases: dict[str, Conversation], new_tokens: int) -> tuple[Tokens, Margins]:
    engine.renderer.stop_ids = ()
    tokens: Tokens = {}
    margins: Margins = {}
    for name, (turns, images) in cases.items():
        pieces = engine.generate(turns, images, max_new_tokens=new_tokens, sampling=Sampling(logprobs=2))
        made = [token for piece in pieces for token in piece.tokens]
        tokens[name] = [token.id for token in made]
        margins[name] = [token.logprob - token.alternatives[1].logprob for token in made]
    return tokens, margins


def _stock_inputs(engine: TorchEngine, cases: dict[str, Conversation], folder: Path, new_tokens: int) -> Path:
    """Token ids and pixels of every conversation, as the stock programs get them."""
    tower = engine.model.vision
    folder.mkdir()
    described = {}
    for number, (name, (turns, images)) in enumerate(cases.items()):
        tiles = [make_tiles(image, tower.tile_size, engine.model.config.max_tiles) for image in images]
        ids = engine.renderer.render(turns, [each.grid for each in tiles], generate=True).ids
        described[name] = {"ids": ids, "pixels": None, "new_tokens": new_tokens}
        if tiles:
            pixels = to_pixels(np.concatenate([each.pixels for each in tiles]), tower.mean, tower.std)
            np.save(folder / f"{number}.npy", pixels.numpy())
            described[name]["pixels"] = f"{number}.npy"
    (folder / "cases.json").write_text(json.dumps(described))
    return folder


def _in_process(program: str, stock: Path, inputs: Path) -> Tokens:
    script = Path(__file__).with_name("parity_process.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), program, str(stock), str(inputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{program} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: Tokens = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(name: str, expected: Tokens, found: Tokens, margins: Margins) -> dict[str, Any]:
    """The row of one program."""
    equal = {case: _common(expected[case], found[case]) for case in expected}
    parted = [case for case in expected if found[case] != expected[case]]
    notes = [f"{len(expected) - len(parted)} of {len(expected)} answers equal"]
    for case in parted:
        place = min(equal[case], len(margins[case]) - 1)
        notes.append(
            f"{case} parts at token {equal[case] + 1}, where the two likeliest are {margins[case][place]:.2g} apart"
        )
    return row(name, sum(equal.values()), sum(map(len, expected.values())), unit="tokens", note="; ".join(notes))


def _common(left: list[int], right: list[int]) -> int:
    return next(
        (n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("program", "equal tokens", "", box=None, padding=(0, 2))
    for entry in rows:
        table.add_row(entry["name"], f"{entry['ours']:.0f} of {entry['peer']:.0f}", entry["note"])
    Console(width=110).print(table)


def _exported(model: Path, out: Path, **options: Any) -> Path:
    if not out.exists():
        with redirect_stdout(sys.stderr):
            llama3v.export(ExportConfig(out=out, model=str(model), check=False, **options))
    return out


def _carried_model(directory: Path) -> Path:
    from llama3v.model.llama3v import build_model, save_model

    assets = Path(llama3v.__file__).parent / "assets"
    save_model(*build_model(str(assets / "siglip-scenes"), str(assets / "llama-scenes"), scale_factor=2), directory)
    return directory


def _picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured patches without an edge: every tile of it is different."""
    patches = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
