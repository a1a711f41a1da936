"""Parts of a ring for tests: a trainer that lists steps of numbered images, and a writer of their features."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cache_process import key_number, manifest_in

from llama3v.config import EncodeConfig
from llama3v.feature_cache.encode import Counts
from llama3v.feature_cache.layout import fingerprint_of, write_manifest
from llama3v.feature_cache.presence import Presence
from llama3v.feature_cache.ring.files import Position, RingPaths, Start, TrainerSide, WantedImage
from llama3v.feature_cache.ring.wanted import Wanted
from llama3v.feature_cache.ring.work import Work
from llama3v.feature_cache.ring.writer import RingWriter
from llama3v.model.slicing import Grid

MANIFEST = manifest_in("bf16")
GRIDS = [Grid(1, 1), Grid(2, 1)]
TOKENS, WIDTH = 32, 32
PLENTY = 1 << 30
ALONE = Presence(-1)


def image_of(number: int) -> WantedImage:
    return WantedImage(key_number(number), 0, f"{number}.png", GRIDS[number % 2])


def features_of(number: int) -> np.ndarray:
    shape = (GRIDS[number % 2].tiles, TOKENS, WIDTH)
    return np.random.default_rng(number).integers(0, 0x4000, shape).astype(np.uint16)


class Trainer:
    """Lists steps of numbered images."""

    def __init__(
        self, directory: Path, steps: list[list[int]], checkpoint_every: int = 1, listed: int | None = None
    ) -> None:
        self.paths, self.steps = RingPaths(directory, "ring"), steps
        write_manifest(self.paths.features(fingerprint_of(MANIFEST)), MANIFEST)
        self.side = TrainerSide(self.paths)
        self.side.enter()
        self.start = Start(
            number=self.side.start,
            step=0,
            steps=len(steps),
            checkpoint_every=checkpoint_every,
            data=("nowhere",),
            vision="nothing",
            cut=None,
            max_tiles=4,
            codec="bf16",
            fingerprint=fingerprint_of(MANIFEST),
            tokens=TOKENS,
            width=WIDTH,
        )
        self.side.begin(self.start, self.some(0, len(steps) if listed is None else listed))

    def some(self, first: int, end: int) -> list[tuple[int, list[WantedImage]]]:
        return [(step, list(map(image_of, self.steps[step]))) for step in range(first, end)]

    def wanted(self, consumed: int = 0) -> Wanted:
        wanted = Wanted(self.paths, self.start.number, self.start.step)
        wanted.refresh(consumed)
        return wanted


def writer_of(trainer: Trainer, bound: int = PLENTY, shard_bytes: int = 1 << 20) -> RingWriter:
    return RingWriter(trainer.paths, MANIFEST, shard_bytes, bound)


def commit(writer: RingWriter, wanted: Wanted, *numbers: int) -> None:
    writer.begin_round(wanted, lambda: True)
    for number in numbers:
        writer.add_bytes(key_number(number), features_of(number), GRIDS[number % 2])
    writer.commit()
    writer.stock.refresh()


def present(writer: RingWriter) -> set[int]:
    return {number for number in range(200) if key_number(number) in writer.stock.keys}


class Encoder(Work):
    """Encodes by copying `features_of`."""

    def __init__(self, trainer: Trainer, bound: int) -> None:
        position = Position(trainer.paths)
        position.refresh()
        config = EncodeConfig(cache=trainer.paths.cache, follow="ring", max_disk=f"{bound}B")
        nothing: Any = None
        super().__init__(
            config, trainer.paths, trainer.start, position, nothing, 0, Counts(), lambda text: None, lambda used: None
        )
        self.pool = ThreadPoolExecutor(1)

    def work(self) -> bool:
        self.position.refresh()
        return self._work(self.pool)

    def _encode(self, images: list[WantedImage], pool: ThreadPoolExecutor) -> None:
        self.writer.begin_round(self.wanted, self._is_current)
        for image in images:
            number = int(image.name.removesuffix(".png"))
            self.writer.add_bytes(image.key, features_of(number), image.grid)
        self.writer.commit()
        self.claims.release_all()
