"""What the codecs of the feature cache cost and lose: on real features, and in training.

    python -m benchmarks.codecs --photos flickr8k/images --json benchmarks/results/codecs.json

*Features*: of the carried tower on drawn scenes, and of EfficientNet-Lite2 on photographs. Errors are of a token's
vector against the tower's own fp32 result. *Speed*: encoding and decoding alone, and a verified read of so400m-sized
records from the page cache; the limit is a copy of the bf16 bytes. *Training*: the projector alone, on scenes, with
the same steps and seeds over a cache of each codec; the loss is measured on held-out scenes, both as that codec stores
them and in bf16, since a model in use sees features that were never stored.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.common import medians, row, write_results
from llama3v.data.synthetic.dataset import magnification_of, make_scenes
from llama3v.data.synthetic.scenes import draw
from llama3v.errors import CheckpointError
from llama3v.feature_cache.codecs import CODECS, Codec, Fp8, Int8
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid
from llama3v.model.tiles import decode_image, make_tiles, read_image_file, to_pixels
from llama3v.model.vision import VisionTower, load_tower
from llama3v.recipes.quickstart import SCENE_LLM, SCENE_TOWER

STUDIED: dict[str, Codec] = {
    "bf16": CODECS["bf16"],
    "int8 without channel scales": Int8(per_channel=False),
    "int8": CODECS["int8"],
    "fp8": CODECS["fp8"],
    "fp8 with channel scales": Fp8(per_channel=True),
}
LOSSES = ("training loss, last steps", "held-out loss as stored", "held-out loss in bf16")
Losses = dict[str, dict[str, list[float]]]
"""Codec -> one of LOSSES -> by seed; nats per supervised token."""
SO400M = (7, 729, 1152)  # an image with six slices
SO400M_RECORDS = 4
ROUNDS = 7
TIMED = 50  # records of each set


@dataclass
class Options:
    """What to run."""

    part: Literal["all", "features", "training"] = "all"
    """Which part of the study."""
    photos: Path | None = None
    """A folder of photographs; without it they are left out."""
    json: Path | None = None
    """File for the results; the plot goes beside it, as PNG."""
    images: int = 200
    """Scenes, and photographs, whose features are studied."""
    scenes: int = 800
    """Scenes to train on."""
    held_out: int = 200
    """Scenes to measure the loss on."""
    steps: int = 80
    """Optimizer steps of every run."""
    seeds: int = 3
    """Runs of every codec."""


# Features


def scene_features(count: int) -> list[Tensor]:
    """fp32 [n_tiles, tokens, width] of drawn scenes."""
    tower, found = load_tower(str(SCENE_TOWER)), []
    for scene in make_scenes("codecs", count):
        file = io.BytesIO()
        draw(scene, magnification_of(scene)).save(file, "PNG")
        found.append(features_of(tower, file.getvalue(), max_tiles=6))
    return found


def photo_features(folder: Path, count: int) -> list[Tensor]:
    """fp32 [1, tokens, width] of photographs, without slices, as recipes/smol.py takes them."""
    tower = load_tower("efficientnet_lite2")
    files = sorted(path for path in folder.iterdir() if path.is_file())[:count]
    return [features_of(tower, read_image_file(path), max_tiles=0) for path in files]


def features_of(tower: VisionTower, image: bytes, max_tiles: int) -> Tensor:
    tiles = make_tiles(decode_image(image), tower.tile_size, max_tiles)
    with torch.no_grad():
        return tower.trunk(to_pixels(tiles.pixels, tower.mean, tower.std))


def bits_of(features: Tensor) -> np.ndarray:
    return features.bfloat16().contiguous().view(torch.uint16).numpy()


def study_features(name: str, features: list[Tensor], note: str) -> Iterator[dict[str, Any]]:
    """Errors, sizes and speed of every codec on one set of features."""
    exact = torch.cat([record.flatten(0, 1) for record in features]).double()
    live = exact.abs().amax(1) > 0  # a token of zeros has no direction, and is stored exactly
    tiles = sum(len(record) for record in features)
    note += f"; {len(features)} images, {tiles} tiles, {int(live.sum())} tokens of width {exact.shape[1]}"
    found: dict[str, dict[str, float]] = {}
    for codec_name, codec in STUDIED.items():
        stored = [codec.encode(bits_of(record)) for record in features]
        restored = [restore(codec, data, record) for data, record in zip(stored, features, strict=True)]
        decoded = torch.cat([record.flatten(0, 1) for record in restored]).double()
        assert not decoded[~live].any()
        error = (decoded - exact)[live].norm(dim=1) / exact[live].norm(dim=1)
        cosine = torch.nn.functional.cosine_similarity(decoded[live], exact[live], dim=1)
        found[codec_name] = {
            "relative error, mean": float(error.mean()),
            "relative error, worst token": float(error.max()),
            "1 - cosine, mean": float(1 - cosine.mean()),
            "1 - cosine, worst token": float(1 - cosine.min()),
            "size": sum(map(len, stored)) / tiles,
        }
    for codec_name, values in found.items():
        for quantity, value in values.items():
            unit = "bytes/tile" if quantity == "size" else ""
            yield row(f"{name}, {codec_name}: {quantity}", value, found["bf16"][quantity], unit=unit, note=note)
    yield from study_speed(name, features[:TIMED])


def restore(codec: Codec, data: bytes, like: Tensor) -> Tensor:
    return codec.decode(np.frombuffer(bytearray(data), np.uint8), tuple(like.shape))


def study_speed(name: str, features: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Encoding from bf16 and decoding to it, record by record."""
    bits = [bits_of(record) for record in features]
    buffers = {
        codec_name: [np.frombuffer(bytearray(codec.encode(record)), np.uint8) for record in bits]
        for codec_name, codec in STUDIED.items()
    }
    sides: dict[str, Any] = {"copy": lambda: [record.copy() for record in bits]}
    for codec_name, codec in STUDIED.items():
        sides[f"{codec_name}: encoding"] = lambda codec=codec: [codec.encode(record) for record in bits]
        sides[f"{codec_name}: decoding"] = lambda codec=codec, data=buffers[codec_name]: [
            codec.decode(stored, record.shape) for stored, record in zip(data, bits, strict=True)
        ]
    seconds = medians(sides, ROUNDS)
    values = sum(record.size for record in bits)
    nanoseconds = {side: 1e9 * spent / values for side, spent in seconds.items()}
    shape = "one record" if len(bits) == 1 else f"{len(bits)} records"
    for side, spent in nanoseconds.items():
        if side != "copy":
            yield row(f"{name}, {side}", spent, limit=nanoseconds["copy"], unit="ns/value", note=f"{shape} a round")


def study_reading() -> Iterator[dict[str, Any]]:
    """Verified reads of so400m-sized records (random values) through CacheReader."""
    torch.manual_seed(0)
    features = torch.randn(SO400M).bfloat16()
    copy = np.empty(features.numel(), np.uint16)
    with tempfile.TemporaryDirectory() as directory:
        readers = {}
        for name in CODECS:
            manifest = {"codec": name, "vision.kind": "random"}
            with CacheWriter(Path(directory, name), manifest) as writer:
                for number in range(SO400M_RECORDS):
                    writer.add(f"{number:032x}", features + number, Grid(3, 2))
            readers[name] = CacheReader(Path(directory, name))
        sides: dict[str, Any] = {"copy": lambda: [np.copyto(copy, bits_of(features).ravel()) for _ in range(4)]}
        for name, reader in readers.items():
            sides[name] = lambda reader=reader: [reader.read(key) for key in reader.keys()]  # noqa: SIM118
        seconds = medians(sides, ROUNDS)
    tiles = SO400M[0] * SO400M_RECORDS
    speed = {name: tiles / spent for name, spent in seconds.items()}
    for name in CODECS:
        yield row(
            f"so400m, {name}: verified read", speed[name], speed["bf16"], limit=speed["copy"], unit="tiles/s",
            note="one process, page cache, random values",
        )  # fmt: skip


# Training


def study_training(options: Options, work: Path) -> tuple[list[dict[str, Any]], Losses]:
    """Rows, and the losses of every run."""
    from llama3v import PretrainConfig, pretrain
    from llama3v.config import EncodeConfig
    from llama3v.data.synthetic.dataset import write_scenes
    from llama3v.feature_cache.encode import encode

    train = write_scenes(work / "train", "codecs-train", options.scenes).captions
    held_out = write_scenes(work / "held-out", "codecs-held-out", options.held_out).captions
    for name in CODECS:
        for data in (train, held_out):
            encode(EncodeConfig(data=str(data), vision=str(SCENE_TOWER), cache=work / name, codec=name))
    losses: Losses = {name: {loss: [] for loss in LOSSES} for name in CODECS}
    for seed in range(options.seeds):
        for name in CODECS:
            out = work / f"{name}-{seed}"
            summary = pretrain(
                PretrainConfig(
                    data=(str(train),),
                    cache=work / name,
                    out=out,
                    vision=str(SCENE_TOWER),
                    llm=str(SCENE_LLM),
                    scale_factor=2,
                    row_tokens=256,
                    rows_per_step=8,
                    steps=options.steps,
                    learning_rate=2e-3,
                    checkpoint_every=options.steps,
                    seed=seed,
                )
            )
            measured = (
                summary["loss"],
                held_out_loss(out, held_out, work / name),
                held_out_loss(out, held_out, work / "bf16"),
            )
            for loss, value in zip(LOSSES, measured, strict=True):
                losses[name][loss].append(value)
    note = f"projector only, {options.steps} steps, {options.seeds} seeds, {options.held_out} held-out scenes"
    return list(training_rows(losses, note)), losses


def held_out_loss(model_directory: Path, data: Path, cache: Path) -> float:
    """Loss per supervised token of a trained model over the features in a cache."""
    from llama3v.data.sources import open_source
    from llama3v.model.llama3v import load_model
    from llama3v.model.prompt import Renderer
    from llama3v.train.dataset import Preparation, prepare
    from llama3v.train.features.cached import CachedFeatures
    from llama3v.train.validation import Validation

    model, tokenizer = load_model(model_directory)
    with CacheReader(cache) as reader, tempfile.TemporaryDirectory() as scratch:
        source = CachedFeatures(reader)
        preparation = Preparation(
            sources=[open_source(str(data))],
            names=[str(data)],
            lookup=source.lookup,
            renderer=Renderer(
                tokenizer, model.config.prompt_format, model.tokens_per_tile, model.config.image_token_id
            ),
            row_tokens=256,
            made_from={"cache": reader.fingerprint},
            max_bad_ratio=0.05,
            encode_command=lambda name: f"llama3v encode --data {name}",
        )
        prepared = prepare(preparation, Path(scratch, "prepared"), Path(scratch, "ledger.jsonl"), keep=False)
        return Validation(prepared, source, row_tokens=256, rows_per_pass=8).measure(model)["validation_loss"]


def training_rows(losses: Losses, note: str) -> Iterator[dict[str, Any]]:
    """Mean over seeds; in the note the spread, and the difference to bf16 seed by seed."""
    for loss in LOSSES:
        reference = losses["bf16"][loss]
        for name, by_loss in losses.items():
            found = by_loss[loss]
            paired = [ours - theirs for ours, theirs in zip(found, reference, strict=True)]
            spread = f"standard deviation over seeds {spread_of(found):.4f}"
            against = f"minus bf16, same seed: mean {mean(paired):+.4f}, standard deviation {spread_of(paired):.4f}"
            words_of_row = "; ".join([spread, note] if name == "bf16" else [spread, against, note])
            yield row(
                f"training, {name}: {loss}", mean(found), mean(reference), unit="nats/token",
                note=words_of_row,
            )  # fmt: skip


def spread_of(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {"load_average_at_start": round(os.getloadavg()[0], 1)}
    if options.part != "training":
        rows += study_features("scenes", scene_features(options.images), "siglip-scenes, up to 6 slices")
        if options.photos is None:
            rows.append(row("photos", None, unit="", note="left out: no --photos"))
        else:
            try:
                photos = photo_features(options.photos, options.images)
            except CheckpointError as error:
                rows.append(row("photos", None, unit="", note=f"left out: {error}"))
            else:
                rows += study_features("photos", photos, "EfficientNet-Lite2 on Flickr8k, overview only")
        rows += study_speed("so400m", [torch.randn(SO400M)])
        rows += study_reading()
    if options.part != "features":
        with tempfile.TemporaryDirectory() as work:
            found, more["losses"] = study_training(options, Path(work))
        rows += found
    write_results(options.json, rows, ("transformers", "numpy"), **more)
    if options.json is not None:
        from benchmarks.codecs_plot import plot

        plot(rows, more.get("losses", {}), options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
