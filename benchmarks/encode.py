"""The encode pass: every engine beside the rate of its matrix products and the usual loop, and the pass around it.

    python -m benchmarks.encode --json benchmarks/results/encode.json

The tower has so400m/14@384's shape, random weights and few layers; a layer costs the same whichever it is, so rates in
GFLOP/s carry over. *GEMM limit*: `torch.mm` on the tower's own shapes, as many as the trunk has, in the same rounds.
*Usual loop*: transformers' SiglipVisionModel in fp32, one image at a time, opened, resized and normalised by Pillow and
NumPy in the same thread (transformers' own image processor needs torchvision, and is slower); it is given as many
layers as ours, without the head, though in use it computes one more layer and the head.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

import llama3v
from benchmarks.common import interleaved, row, write_results
from benchmarks.encode_memory import HAS_PEAK_MEMORY, measure_encoding, measure_listing
from benchmarks.train_shapes import TowerShape
from llama3v.config import EncodeConfig
from llama3v.errors import ConfigError
from llama3v.feature_cache.encoders.base import TrunkEncoder
from llama3v.feature_cache.encoders.choose import open_encoder, picture, require_engine
from llama3v.feature_cache.encoders.torch import TorchEncoder
from llama3v.feature_cache.pipeline import Picture, make_batches
from llama3v.model.tiles import decode_image, make_tiles
from llama3v.model.vision import SiglipTower

PACKAGES = ("transformers", "numpy", "pillow", "openvino", "onnxruntime", "mlx")
SO400M_LAYERS = 26
BATCH_TILES = 16
PASS_ROUNDS = 3
HOPELESS = 20.0  # times the fastest side's first round: such an engine is run once


@dataclass
class Options:
    """What to run."""

    json: Path | None = None
    """File for the results."""
    quick: bool = False
    """Everything at toy size, in seconds: does it run?"""
    layers: int = 2
    """Layers of the tower."""
    rounds: int = 7
    """Rounds of each comparison; medians are reported."""
    photographs: int = 12
    """JPEG files of the pass, 1 megapixel each."""
    engines: tuple[str, ...] = ("torch", "torch-compile", "openvino", "onnxruntime", "mlx")
    """Engines to measure; those that are not installed are left out."""
    parts: tuple[Literal["engines", "pass", "memory"], ...] = ("engines", "pass", "memory")
    """What to measure. Memory alone does not mind other work on the machine."""


class Shape(TowerShape):
    """A tower's geometry, and what a pass of one tile costs."""

    def products(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear layers; q, k and v as one."""
        width, mlp = self.width, self.mlp_size
        return [(width, 3 * width), (width, width), (width, mlp), (mlp, width)]

    def product_flops(self) -> float:
        """FLOPs of one layer's linear layers for one tile."""
        return sum(2.0 * self.patches * inputs * outputs for inputs, outputs in self.products())

    def flops(self, layers: int | None = None) -> float:
        """FLOPs of a trunk for one tile: linear layers, the two products of attention, the patch embedding."""
        attention = 4.0 * self.patches**2 * self.width
        embedding = 2.0 * self.patches * 3 * self.patch_size**2 * self.width
        return (self.layers if layers is None else layers) * (self.product_flops() + attention) + embedding

    def tower(self) -> SiglipTower:
        torch.manual_seed(0)
        geometry = {name: getattr(self, name) for name in ("tile_size", "patch_size", "width", "heads", "mlp_size")}
        return SiglipTower(geometry | {"depth": self.layers, "cut": self.layers}).requires_grad_(False).eval()

    def stock(self, layers: int) -> Any:
        """transformers' model of this shape, without the head."""
        from transformers.utils.logging import disable_progress_bar

        from benchmarks.train_usual import stock_tower

        disable_progress_bar()
        return stock_tower(self, layers)


def photograph(number: int, width: int = 1224, height: int = 816) -> bytes:
    """A JPEG with the detail of a photograph: noise of every scale, the coarser the stronger."""
    generator = np.random.default_rng(number)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for divisor in (2, 8, 32, 128):
        coarse = generator.integers(0, 256, (height // divisor + 1, width // divisor + 1, 3), dtype=np.uint8)
        field = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(field, dtype=np.float32) * (divisor / 170)
    file = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --- engines


def gemm_loop(shape: Shape, tiles: int, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of a pass, and nothing else."""
    rows = tiles * shape.patches
    inputs = {size: torch.randn(rows, size, dtype=dtype) for size in (shape.width, shape.mlp_size)}
    outputs = {size: torch.empty(rows, size, dtype=dtype) for _, size in shape.products()}
    weights = [torch.randn(size, dtype=dtype) for _ in range(shape.layers) for size in shape.products()]

    def run() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    return run


def usual_loop(shape: Shape, jpeg: bytes) -> Callable[[], None]:
    """Another program's line of code for one image, in fp32."""
    model = shape.stock(shape.layers)
    size = (shape.tile_size, shape.tile_size)

    def run() -> None:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        values = (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5
        with torch.no_grad():
            model(torch.from_numpy(values).permute(2, 0, 1)[None]).last_hidden_state.to(torch.bfloat16)

    return run


def opened_engines(options: Options, tower: SiglipTower, precision: str) -> dict[str, TrunkEncoder]:
    encoders = {}
    for engine in options.engines:
        try:
            require_engine(engine)  # type: ignore[arg-type]
            encoders[engine] = open_encoder(engine, tower, precision=precision, batch_tiles=BATCH_TILES)  # type: ignore[arg-type]
        except ConfigError as error:
            print(f"{engine} in {precision} is left out: {error}", file=sys.stderr)
    return encoders


def measure_engines(options: Options, shape: Shape, precision: str) -> list[dict[str, Any]]:
    """One row for each engine: GFLOP/s beside the usual loop's and the limit."""
    tower, dtype = shape.tower(), torch.float32 if precision == "fp32" else torch.bfloat16
    encoders = opened_engines(options, tower, precision)
    if precision == "fp32":  # how large a pass should be
        for tiles in (2, 4):
            encoders[f"torch, {tiles} tiles a pass"] = TorchEncoder(tower, precision, BATCH_TILES)
            encoders[f"torch, {tiles} tiles a pass"].tiles_in_pass = tiles
    in_pass = {name: encoder.tiles_in_pass for name, encoder in encoders.items()}
    sides: dict[str, Callable[[], Any]] = {
        "GEMM": gemm_loop(shape, in_pass["torch"], dtype),
        "usual loop": usual_loop(shape, photograph(0)),
    }
    for name, encoder in encoders.items():
        tiles = picture(in_pass[name], shape.tile_size)
        sides[name] = lambda encoder=encoder, tiles=tiles: encoder.encode(tiles)
    count = options.rounds if precision == "fp32" else max(1, options.rounds // 2)
    rounds = interleaved(sides, count, patience=HOPELESS)
    seconds = {name: median(values) for name, values in rounds.items()}
    fastest = {name: min(values) for name, values in rounds.items()}
    limit = in_pass["torch"] * shape.layers * shape.product_flops() / seconds["GEMM"] / 1e9
    usual = shape.flops() / seconds["usual loop"] / 1e9
    best_limit = limit * seconds["GEMM"] / fastest["GEMM"]
    rows = []
    for name in ("usual loop", *encoders):
        rate = in_pass.get(name, 1) * shape.flops() / seconds[name] / 1e9
        best = rate * seconds[name] / fastest[name]
        note = (
            f"{rate / limit:.0%} of the GEMM rate (fastest rounds: {best:.4g} of {best_limit:.4g}, {best / best_limit:.0%}); "
            f"{in_pass.get(name, 1) / seconds[name]:.3g} tiles/s with {shape.layers} layers, "
            f"{rate * 1e9 / shape.flops(SO400M_LAYERS):.3g} with {SO400M_LAYERS}"
        )
        if name == "usual loop":
            rows.append(row(f"usual loop beside the {precision} GEMM", rate, limit=limit, unit="GFLOP/s", note=note))
        else:
            rows.append(row(f"{name}, {precision}", rate, usual, limit=limit, unit="GFLOP/s", note=note))
    return rows


# --- the pass


def measure_pass(options: Options, shape: Shape, engine: str) -> list[dict[str, Any]]:
    """The whole encode pass over JPEG files beside the same engine on the same batches in memory."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shape.stock(shape.layers + 1).save_pretrained(root / "tower")
        (root / "photographs").mkdir()
        jpegs = [photograph(number) for number in range(options.photographs)]
        for number, jpeg in enumerate(jpegs):
            (root / "photographs" / f"{number:04}.jpg").write_bytes(jpeg)
        tower = shape.tower()
        encoder = open_encoder(engine, tower, precision="fp32", batch_tiles=BATCH_TILES)  # type: ignore[arg-type]
        pictures = [Picture("", "", "", make_tiles(decode_image(jpeg), shape.tile_size)) for jpeg in jpegs]
        batches = [batch.tiles for batch in make_batches(pictures, BATCH_TILES)]
        tiles = sum(len(picture.tiles.pixels) for picture in pictures)
        summaries: list[dict[str, Any]] = []

        def bare() -> None:
            for batch in batches:
                encoder.encode(batch)

        def whole() -> None:
            config = EncodeConfig(
                data=str(root / "photographs"),
                vision=str(root / "tower"),
                cache=root / f"cache-{len(summaries)}",
                engine=engine,  # type: ignore[arg-type]
                batch_tiles=BATCH_TILES,
            )
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                summaries.append(llama3v.encode(config))

        bare_seconds = median(interleaved({"bare": bare, "whole": whole}, PASS_ROUNDS)["bare"])
    return _pass_rows(engine, tiles, tiles / bare_seconds, summaries[1:])


def _pass_rows(engine: str, tiles: int, bare: float, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    speed = median(summary["tiles_per_second"] for summary in summaries)
    waiting = median(summary["wait_share"] for summary in summaries)
    opening = median(summary["opening_seconds"] for summary in summaries)
    note = f"{tiles} tiles: read, decode, cut, hash, encode, check, write and sync; opening the engine ({opening:.1f} s) apart"
    return [
        row(f"pass with {engine}: tiles/s beside the bare engine", speed, bare, unit="tiles/s", note=note),
        row(f"pass with {engine}: share of its time in which the tower waits", waiting, unit="share",
            note="with decoding the first batch and syncing the last shard"),
    ]  # fmt: skip


def fastest_engine(rows: list[dict[str, Any]], engines: tuple[str, ...]) -> str:
    """By its fp32 row; torch where none was measured."""
    speeds = {entry["name"].removesuffix(", fp32"): entry["ours"] for entry in rows}
    return max((name for name in speeds if name in engines), key=speeds.__getitem__, default="torch")


def main(options: Options) -> list[dict[str, Any]]:
    """Measure everything and return the rows."""
    so400m = Shape(384, 14, 1152, 16, 4304, options.layers)
    shape = Shape(42, 14, 32, 2, 64, options.layers) if options.quick else so400m
    load = [round(value, 1) for value in os.getloadavg()]
    rows: list[dict[str, Any]] = []
    if "engines" in options.parts:
        rows += measure_engines(options, shape, "fp32") + measure_engines(options, shape, "bf16")
    if "pass" in options.parts:
        for engine in dict.fromkeys(("torch", fastest_engine(rows, options.engines))):
            rows += measure_pass(options, shape, engine)
    if "memory" in options.parts and HAS_PEAK_MEMORY:
        rows.append(measure_listing(100, 1000) if options.quick else measure_listing(10_000, 1_000_000))
        rows.append(measure_encoding(20, 100) if options.quick else measure_encoding(500, 5_000))
    write_results(options.json, rows, PACKAGES, layers=options.layers, batch_tiles=BATCH_TILES, load_at_start=load)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
