"""Is what surrounds forward and backward hidden? `llama3v pretrain` as users run it, beside its rows' passes alone."""

import contextlib
import io
import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import llama3v
from benchmarks.common import row
from benchmarks.encode import photograph
from benchmarks.train_shapes import LlmShape, TowerShape
from benchmarks.train_step import pass_loss, set_modes
from benchmarks.train_usual import stock_tower
from llama3v.config import EncodeConfig, PretrainConfig
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.model.llama3v import load_model
from llama3v.train.batches import Batch, RowPlan, make_pass
from llama3v.train.features.cached import CachedFeatures
from llama3v.train.prepared import DESCRIPTION, load_prepared

TOKENIZER = Path(llama3v.__file__).parent / "assets/llama-scenes"
BASE = TowerShape(224, 16, 768, 12, 3072, 12)  # SigLIP base/16 at 224 pixels
ROW_TOKENS, ROWS_PER_STEP = 256, 3


def measure_overlap(steps: int, rounds: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """Seconds of a step of `pretrain` (from one metrics line to the next) beside its forward and backward alone."""
    tower = TowerShape(42, 14, 32, 2, 64, 3) if quick else TowerShape(**{**vars(BASE), "layers": 2})
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        config = _prepare(root, tower, steps)
        whole: list[float] = []
        alone: list[float] = []
        waiting: list[float] = []
        for _ in range(rounds):
            lines = _pretrain(config)
            whole += [after["seconds"] - before["seconds"] for before, after in pairwise(lines)][1:]
            waiting += [line["wait_share"] for line in lines[2:]]
            model, batches = _rows_of(config)
            alone += [_forward_backward(model, *one) for one in batches][2:]
        tokens = sum(one.visual_tokens + one.text_tokens for one, _ in batches) / len(batches)
        tiles = sum(one.tiles for one, _ in batches) / len(batches)
    return [
        row(
            "step of `llama3v pretrain` beside forward and backward alone on the same rows",
            median(whole),
            median(alone),
            limit=1.1 * median(alone),
            unit="s",
            note=f"features {tower.width} wide, {tower.patches} a tile, read from a cache on disk with checksums; LLM of "
            f"SmolLM2-135M's width, 4 layers; {tokens:.0f} tokens and {tiles:.1f} tiles a step; loader, clipping, update, "
            f"meter and log are in ours; the limit is the aim, 1.1 times the peer",
        ),
        row("share of the step in which it waits for rows", median(waiting), unit="share"),
    ]


def _prepare(root: Path, tower: TowerShape, steps: int) -> PretrainConfig:
    """Photographs with captions, encoded; a tower and an LLM with random weights."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    pictures = root / "pictures"
    pictures.mkdir()
    for number in range(24):
        (pictures / f"{number:03}.jpg").write_bytes(photograph(number, 320, 240))
        words = " ".join(f"thing {number} on {place}" for place in range(4 + number % 8))
        (pictures / f"{number:03}.txt").write_text(f"A picture of {words}.")
    stock_tower(tower, tower.layers).save_pretrained(root / "tower")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    LlamaForCausalLM(LlmShape(576, 4, 9, 3, 1536, len(tokenizer), tied=True).config()).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    common = {"vision": str(root / "tower"), "cache": root / "cache", "max_tiles": 0}
    side = tower.tile_size // tower.patch_size
    config = PretrainConfig(
        data=(str(pictures),),
        llm=str(root / "llm"),
        out=root / "run",
        steps=steps,
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS_PER_STEP,
        scale_factor=3 if side % 3 == 0 else 2,
        prompt_format="llama3",
        **common,  # type: ignore[arg-type]
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        llama3v.encode(EncodeConfig(data=str(pictures), **common))  # type: ignore[arg-type]
    return config


def _pretrain(config: PretrainConfig) -> list[dict[str, Any]]:
    """The metrics lines of a run from the start."""
    shutil.rmtree(config.out, ignore_errors=True)
    llama3v.pretrain(config, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _rows_of(config: PretrainConfig) -> tuple[Any, list[tuple[Batch, int]]]:
    """The model, and the rows of every step of the run that has just been made."""
    model, _ = load_model(config.out)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    set_modes(model)
    directory = config.out / "prepared" / "training"
    data = load_prepared(directory, json.loads((directory / DESCRIPTION).read_text())["made_from"])
    assert data is not None
    assert config.cache is not None
    assert config.steps is not None
    manifest = manifest_of(model.vision.fingerprint(), tile_size=model.vision.tile_size, max_tiles=config.max_tiles)
    with contextlib.closing(CachedFeatures(CacheReader(config.cache, manifest=manifest))) as source:
        plan = RowPlan(
            data.lengths.tolist(),
            config.row_tokens,
            config.rows_per_step,
            config.rows_per_pass,
            config.seed,
            data.tiles.tolist(),
        )
        passes = [make_pass(step, plan, data, source, model.config.image_token_id) for step in range(config.steps)]
    return model, [(one.batch, one.supervised_of_step) for one in passes]


def _forward_backward(model: Any, batch: Batch, total: int) -> float:
    begun = perf_counter()
    pass_loss(model, batch, total).backward()
    seconds = perf_counter() - begun
    model.zero_grad(set_to_none=True)
    return seconds
