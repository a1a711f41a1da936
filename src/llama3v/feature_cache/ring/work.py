"""What one start of a trainer wants, encoded round by round."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from llama3v.config import EncodeConfig
from llama3v.data.sources.base import AddressableSource, ImageRef, open_source
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.encode import WRITES_UNDER_WAY, Counts, decoding_threads
from llama3v.feature_cache.layout import read_manifest
from llama3v.feature_cache.pictures import checked, encode_batches
from llama3v.feature_cache.pipeline import Picture, Preparer, make_batches, one_ahead
from llama3v.feature_cache.presence import wait_to_be_alone
from llama3v.feature_cache.ring.claims import Claims
from llama3v.feature_cache.ring.files import Position, RingPaths, Start, WantedImage, failures
from llama3v.feature_cache.ring.plan import Sizes, choose, in_words, smallest_bound
from llama3v.feature_cache.ring.wanted import Wanted
from llama3v.feature_cache.ring.writer import RingWriter

if TYPE_CHECKING:
    import torch

    from llama3v.feature_cache.encoders.base import TrunkEncoder

LOOK_SECONDS = 0.1
"""Between two looks at what the trainer has done, while there is nothing to encode."""
SHARDS_IN_BOUND = 16
"""At least: shards of a small ring are smaller than others."""
SHARDS_IN_ROUND = 8
WORTH_COPYING = 0.3
"""Share of some shards that must become free for the rest to be copied, while the trainer does not wait for it."""
ABSENCE_SECONDS = 6 * 3600.0
"""How long to wait for a trainer that is not there any more to start again."""
LOOKS_BEFORE_GIVING_UP = 5
"""Times in a row that nothing fits, before the bound is said to be too small: others may just have been quicker."""


class Work:
    """Keeps encoding what a start lacks.

    Args:
        position: of the trainer; its start is `start`.
        counts: of the images that are encoded; they grow.
        say: told what is done instead of encoding; with an empty text, that this is over, or that counts have grown.
        measured: told how many bytes the ring takes.
    """

    def __init__(
        self,
        config: EncodeConfig,
        ring: RingPaths,
        start: Start,
        position: Position,
        encoder: "TrunkEncoder",
        tile_size: int,
        counts: Counts,
        say: Callable[[str], None],
        measured: Callable[[int], None],
    ) -> None:
        self.config, self.ring, self.start, self.position = config, ring, start, position
        self.encoder, self.tile_size, self.counts, self.say, self.measured = encoder, tile_size, counts, say, measured
        bound = config.max_disk_bytes
        shard_bytes = min(config.shard_mb << 20, bound // SHARDS_IN_BOUND)
        manifest = read_manifest(ring.features(start.fingerprint))
        self.writer = RingWriter(ring, manifest, shard_bytes, bound)
        self.wanted = Wanted(ring, start.number, start.step)
        self.sizes = Sizes(self.writer.codec, start.tokens, start.width, shard_bytes)
        self.claims = Claims(ring.claims)
        self._failed: set[str] = set()  # in this start
        self._broken = {entry["key"] for entry in failures(ring)}  # in any
        self._sources: dict[int, AddressableSource] = {}
        self._checked_until = self._checked_end = start.step  # the bound is large enough for all steps before
        self._looks_in_vain = 0
        self._complete, self._losses = start.step, 0  # steps before lack nothing, as long as nothing is lost

    def run(self) -> None:
        """Until the trainer is done or starts again."""
        with closing(self.claims), ThreadPoolExecutor(1, "write") as pool:
            try:
                self._shrink()
                while self._is_current():
                    if not self._work(pool):
                        self._refuse_absence()
                        time.sleep(LOOK_SECONDS)
            except KeyboardInterrupt:
                self.writer.commit()
                raise KeyboardInterrupt(
                    f"{self.counts.encoded:,} images of this run are encoded; run the same command to go on"
                ) from None

    def _shrink(self) -> None:
        """An encoder before may have had a larger bound."""
        self.wanted.refresh(self.position.consumed)
        stays_until = self.start.next_checkpoint(self.position.consumed)
        with wait_to_be_alone(self.writer.paths) as alone:
            self.writer.stock.make_room(0, stays_until, self.wanted, alone)

    def _refuse_absence(self) -> None:
        if self.position.absent_for() > ABSENCE_SECONDS:
            raise CacheError(
                f"the training of the ring {self.ring.name} ({self.ring.directory}) is not running, and has not been for "
                f"{ABSENCE_SECONDS / 3600:.0f} hours; resume it, and run this command again"
            )

    def _is_current(self) -> bool:
        self.position.refresh()
        return not self.position.done and self.position.start == self.start

    def _work(self, pool: ThreadPoolExecutor) -> bool:
        """One round; whether there was anything to do."""
        stock = self.writer.stock
        self.wanted.refresh(self.position.consumed)
        self._check_bound()
        stock.refresh()
        self.measured(stock.used())
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
        if found.images or found.blocked_at is None:
            self._looks_in_vain = 0
        if found.images:
            self.say("")
            self._encode(found.images, pool)
        elif found.blocked_at is not None:
            return self._compact(found.blocked_at, found.shared)
        else:
            self.say("all that is wanted is there; waiting for the trainer")
        return bool(found.images)

    def _compact(self, step: int, shared: bool) -> bool:
        """Where nothing fits for a step. Returns whether it may fit now."""
        urgent = step < self.start.next_checkpoint(self.position.consumed)  # nothing is free before it is trained
        least_gain = 0.0 if urgent else WORTH_COPYING
        with wait_to_be_alone(self.writer.paths):
            if self.writer.stock.compact(step, self.wanted, self.writer.shard_bytes, least_gain):
                return True
        self._looks_in_vain = self._looks_in_vain + 1 if urgent and not shared else 0
        if self._looks_in_vain > LOOKS_BEFORE_GIVING_UP:
            raise self._too_small(*smallest_bound(self.wanted, self.start, self.position.consumed, self.sizes))
        self.say("the ring is full; waiting for the trainer")
        return False

    def _check_bound(self) -> None:
        """Before any work for them: that what lies between two checkpoints fits."""
        if self._checked_end == self.wanted.end:
            return
        first = max(self._checked_until, self.position.consumed)
        need, begin, end = smallest_bound(self.wanted, self.start, first, self.sizes)
        if need > self.writer.stock.bound:
            raise self._too_small(need, begin, end)
        while first < (checkpoint := self.start.next_checkpoint(first)) <= self.wanted.end:
            first = checkpoint
        self._checked_until, self._checked_end = first, self.wanted.end

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
                    self.say("")
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
            self.tile_size,
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
