"""`llama3v encode --follow RING`: encode what a trainer will need next, within a bound of disk."""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from llama3v.config import EncodeConfig
from llama3v.data.sources.base import AddressableSource, ImageRef, open_source
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import host_tag
from llama3v.feature_cache.encode import WRITES_UNDER_WAY, Counts, decoding_threads, sigterm_as_interrupt, write_summary
from llama3v.feature_cache.layout import differences, fingerprint_of, manifest_of, read_manifest
from llama3v.feature_cache.pictures import checked, encode_batches
from llama3v.feature_cache.pipeline import Picture, Preparer, make_batches, one_ahead
from llama3v.feature_cache.presence import wait_to_be_alone
from llama3v.feature_cache.progress import EncodeProgress
from llama3v.feature_cache.ring.claims import Claims
from llama3v.feature_cache.ring.files import Position, RingPaths, Start, WantedImage, failures, trainer_is_there
from llama3v.feature_cache.ring.plan import Sizes, choose, in_words, smallest_bound
from llama3v.feature_cache.ring.wanted import Wanted
from llama3v.feature_cache.ring.writer import RingWriter

if TYPE_CHECKING:
    import torch

    from llama3v.feature_cache.encoders.base import TrunkEncoder
    from llama3v.model.vision import VisionTower

LOOK_SECONDS = 0.2
"""Between two looks at what the trainer has done, while there is nothing to encode."""
PATIENCE_SECONDS = 6 * 3600.0
"""How long to wait for a trainer to begin the ring; reading through large data takes it hours."""
OVER_SECONDS = 30.0
"""How long to wait for one where the last training is over."""
SHARDS_IN_BOUND = 16
"""At least: shards of a small ring are smaller than others."""
SHARDS_IN_ROUND = 8
WORTH_COPYING = 0.3
"""Share of some shards that must become free for the rest to be copied, while the trainer does not wait for it."""


def follow(config: EncodeConfig) -> dict[str, Any]:
    """Encode for a ring until its trainer is done.

    Returns the summary, which is also written to <out>/summary.json. Raises as `encode`; CacheError also where the bound
    is too small for what lies between two checkpoints, or nobody begins the ring.
    """
    assert config.follow is not None, "the config was validated"
    ring = RingPaths(config.cache, config.follow)
    following = Following(config, ring)
    try:
        with sigterm_as_interrupt(), following.progress:
            following.run()
    finally:
        summary = following.summary()
        with suppress(CacheError):
            out = config.out or ring.directory / "encoders" / f"{host_tag()}-{os.getpid()}"
            out.mkdir(parents=True, exist_ok=True)
            write_summary(out / "summary.json", summary)
    print(f"ring {ring.name}: {summary['encoded']:,} images encoded ({summary['tiles']:,} tiles); the training is done")
    return summary


class Following:
    """One encoder at work for a ring, through all starts of its trainer."""

    def __init__(self, config: EncodeConfig, ring: RingPaths) -> None:
        self.config, self.ring = config, ring
        self.position = Position(ring)
        self.counts = Counts()
        self.progress = EncodeProgress(self.counts, f"ring {ring.name}", None)
        self.encoder: TrunkEncoder | None = None
        self.tile_size = 0  # of the tower that the encoder runs
        self._fingerprint = ""  # of what the encoder computes
        self._began = time.perf_counter()
        self._largest = 0

    def run(self) -> None:
        """Until the trainer is done."""
        self._wait_for_start()
        while not self.position.done:
            start = self.position.start
            assert start is not None, "it was waited for"
            _OneStart(self, start).run()
        self._free_everything()

    def summary(self) -> dict[str, Any]:
        """What was done so far."""
        counts, seconds = self.counts, time.perf_counter() - self._began
        return {
            "ring": self.ring.name,
            "encoded": counts.encoded,
            "tiles": counts.tiles,
            "left_out": counts.left_out,
            "seconds": seconds,
            "wait_share": counts.wait_share(seconds),
            "largest_bytes": self._largest,
            "engine": self.encoder.name if self.encoder else None,
        }

    def say(self, note: str) -> None:
        """What is done instead of encoding; empty where that is over."""
        self.progress.note = note
        self.progress.update()

    def measured(self, used: int) -> None:
        """Note how many bytes the ring takes."""
        self._largest = max(self._largest, used)

    def open_encoder(self, start: Start) -> "TrunkEncoder":
        """The engine for what a start asks for; the one there is where that is the same."""
        from llama3v.feature_cache.encoders.choose import open_encoder

        if self.encoder is None or self._fingerprint != start.fingerprint:
            began = time.perf_counter()
            self.say("preparing the engine")
            self.encoder = open_encoder(
                self.config.engine,
                self._load_tower(start),
                precision=self.config.precision,
                batch_tiles=self.config.batch_tiles,
            )
            self._fingerprint = start.fingerprint
            self.counts.opening_seconds += time.perf_counter() - began
            self.say("")
        return self.encoder

    def _load_tower(self, start: Start) -> "VisionTower":
        from llama3v.model.vision import load_tower

        tower = load_tower(self.config.vision or start.vision, cut=start.cut)
        manifest = manifest_of(
            tower.fingerprint(), tile_size=tower.tile_size, max_tiles=start.max_tiles, codec=start.codec
        )
        if fingerprint_of(manifest) != start.fingerprint:
            asked = read_manifest(self.ring.features(start.fingerprint))
            raise CacheError(
                f"the ring {self.ring.name} is for other features than this tower gives: "
                f"{'; '.join(differences(asked, manifest))}; give --vision the tower that the training uses"
            )
        self.tile_size = tower.tile_size
        return tower

    def _wait_for_start(self) -> None:
        began = time.monotonic()
        while True:
            self.position.refresh()
            if self.position.start is not None and not self.position.done:
                return self.say("")
            self.say(f"waiting for a training with --ring {self.ring.name} --cache {self.ring.cache}")
            over = self.position.done and not trainer_is_there(self.ring)  # unless the next one is about to begin
            if over and time.monotonic() - began > OVER_SECONDS:
                return None
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise CacheError(
                    f"no training has begun the ring {self.ring.name} ({self.ring.directory}); start one with "
                    f"--ring {self.ring.name} --cache {self.ring.cache}, or correct --follow"
                )
            time.sleep(LOOK_SECONDS)

    def _free_everything(self) -> None:
        start = self.position.start
        assert start is not None, "it was waited for"
        free_ring(self.ring, start.fingerprint)


class _OneStart:
    """What one start of the trainer wants."""

    def __init__(self, following: Following, start: Start) -> None:
        self.following, self.start = following, start
        self.config, self.ring, self.position, self.counts = (
            following.config,
            following.ring,
            following.position,
            following.counts,
        )
        bound = self.config.max_disk_bytes
        shard_bytes = min(self.config.shard_mb << 20, bound // SHARDS_IN_BOUND)
        manifest = read_manifest(self.ring.features(start.fingerprint))
        self.encoder = following.open_encoder(start)
        self.writer = RingWriter(self.ring, manifest, shard_bytes, bound)
        self.wanted = Wanted(self.ring, start.number, start.step)
        self.sizes = Sizes(self.writer.codec, start.tokens, start.width, shard_bytes)
        self.claims = Claims(self.ring.claims)
        self._failed: set[str] = set()  # in this start
        self._broken = {entry["key"] for entry in failures(self.ring)}  # in any
        self._sources: dict[int, AddressableSource] = {}
        self._checked_until = start.step  # the bound is large enough for all steps before
        self._complete, self._losses = start.step, 0  # steps before lack nothing, as long as nothing is lost

    def run(self) -> None:
        """Until the trainer is done or starts again."""
        with closing(self.claims), ThreadPoolExecutor(1, "write") as pool:
            try:
                while self._is_current():
                    if not self._work(pool):
                        time.sleep(LOOK_SECONDS)
            except KeyboardInterrupt:
                self.writer.commit()
                raise KeyboardInterrupt(
                    f"{self.counts.encoded:,} images of this run are encoded; run the same command to go on"
                ) from None

    def _is_current(self) -> bool:
        self.position.refresh()
        return not self.position.done and self.position.start == self.start

    def _work(self, pool: ThreadPoolExecutor) -> bool:
        """One round; whether there was anything to do."""
        stock = self.writer.stock
        self.wanted.refresh(self.position.consumed)
        self._check_bound()
        stock.refresh()
        self.following.measured(stock.used())
        if stock.losses != self._losses:
            self._losses, self._complete = stock.losses, 0
        room = stock.room(self.wanted)
        found = choose(
            self.wanted,
            max(self.position.consumed, self._complete),
            stock.keys,
            self._failed,
            room,
            self.sizes,
            self.claims,
            SHARDS_IN_ROUND * self.writer.shard_bytes,
        )
        self._complete = found.complete
        if found.images:
            self.following.say("")
            self._encode(found.images, pool)
        elif found.blocked_at is not None:
            return self._compact(found.blocked_at, found.shared)
        else:
            self.following.say("all that is wanted is there; waiting for the trainer")
        return bool(found.images)

    def _compact(self, step: int, shared: bool) -> bool:
        urgent = step < self.start.next_checkpoint(
            self.position.consumed
        )  # nothing is freed before this step is trained
        with wait_to_be_alone(self.writer.paths):
            if self.writer.stock.compact(step, self.wanted, self.writer.shard_bytes, 0.0 if urgent else WORTH_COPYING):
                return True
        if urgent and not shared:
            raise self._too_small(*smallest_bound(self.wanted, self.start, self.position.consumed, self.sizes))
        self.following.say("the ring is full; waiting for the trainer")
        return False

    def _check_bound(self) -> None:
        """Before any work for them: that what lies between two checkpoints fits."""
        self._checked_until = max(self._checked_until, self.position.consumed)
        if self._checked_until < self.wanted.end:
            need, first, end = smallest_bound(self.wanted, self.start, self._checked_until, self.sizes)
            if need > self.writer.stock.bound:
                raise self._too_small(need, first, end)
            checked = self._checked_until
            while (following := self.start.next_checkpoint(checked)) <= self.wanted.end and checked < following:
                checked = following
            self._checked_until = checked

    def _too_small(self, need: int, first: int, end: int) -> CacheError:
        bound = max(need, int(self.writer.stock.bound * 1.1))
        return CacheError(
            f"--max-disk is {in_words(self.writer.stock.bound)}, and between two checkpoints (steps {first + 1} to {end}) "
            f"the training needs {in_words(need)} that cannot be freed: give --max-disk {-(-bound // 10**6)}MB or more, or "
            f"the training a --checkpoint-every of less than {self.start.checkpoint_every}"
        )

    def _encode(self, images: list[WantedImage], pool: ThreadPoolExecutor) -> None:
        """Encode and commit a round. It is left early where the trainer is done or starts again."""
        self.writer.begin_round(self.wanted, self._is_current)
        writing: deque[Future] = deque()
        try:
            batches = make_batches(self._pictures(images), self.encoder.tiles_in_pass)
            with closing(batches), one_ahead(batches) as ready:
                for picture, features in encode_batches(ready, self._features):
                    grid, name = picture.tiles.grid, picture.name
                    writing.append(pool.submit(self.writer.add, picture.key, features, grid, name))
                    self.counts.encoded += 1
                    self.counts.tiles += len(features)
                    self.following.progress.update()
                    while writing and (len(writing) > WRITES_UNDER_WAY or writing[0].done()):
                        writing.popleft().result()
        finally:
            while writing:
                writing.popleft().result()
        self.writer.commit()
        self.claims.release_all()

    def _features(self, tiles: np.ndarray) -> "torch.Tensor":
        began = time.perf_counter()
        features = self.encoder.encode(tiles)
        self.counts.tower_seconds += time.perf_counter() - began
        return features

    def _pictures(self, images: list[WantedImage]) -> Iterator[Picture]:
        preparer = Preparer(
            lambda key: False,
            self.following.tile_size,
            self.start.max_tiles,
            depth=2 * self.config.batch_tiles,
            workers=decoding_threads(),
        )
        outcomes = preparer.outcomes((image.key, self._reference(image)) for image in images)
        for image, outcome in zip(images, outcomes, strict=True):
            if not self._is_current():
                return
            self.counts.images += 1
            found = checked(outcome, image.key, image.grid, was_broken=image.key in self._broken)
            if isinstance(found, str):
                self._fail(image, found)
            else:
                yield found

    def _reference(self, image: WantedImage) -> ImageRef:
        if image.source not in self._sources:
            self._sources[image.source] = open_source(self.start.data[image.source])
        return self._sources[image.source].image(image.name)

    def _fail(self, image: WantedImage, reason: str) -> None:
        self.counts.left_out += 1
        self._failed.add(image.key)
        self._broken.add(image.key)
        entry = {"start": self.start.number, "key": image.key, "name": image.name, "reason": reason}
        journal.append(self.ring.failed, [entry])
        self.writer.quarantine(image.name, reason)


def free_ring(ring: RingPaths, fingerprint: str) -> None:
    """Remove all features of a ring whose training is done."""
    from llama3v.feature_cache.ring.stock import Stock

    paths = ring.features(fingerprint)
    with wait_to_be_alone(paths):
        Stock(paths, bound=0).clear()
