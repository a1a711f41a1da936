"""Mode features with a ring: encoders that run beside the training make the features ahead of it.

The trainer lists what its steps need, waits for what is not there yet, and tells after every checkpoint what it will
never need again. It needs the images itself only to plan with: each is read once, and its header is enough.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.layout import Manifest, fingerprint_of, fingerprints, write_manifest
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.ring.files import Position, RingPaths, Start, TrainerSide, WantedImage
from llama3v.feature_cache.ring.follow import free_ring
from llama3v.train.features.base import Demand, FeatureSource, Say, StoppedError
from llama3v.train.features.broken import BrokenImages
from llama3v.train.features.streamed import ImageHeaders
from llama3v.train.locations import Locate

LOOK_SECONDS = 0.1
"""Between two looks for features that are waited for."""
UNTOLD_SECONDS = 1.0
"""A wait that is shorter is only counted."""
PATIENCE_SECONDS = 1800.0
"""Without a new shard in that time, no encoder seems to be at work."""
REFRESH_SECONDS = 5.0
"""After so long the reader looks for what was removed, and closes its files, which would take space as long as they are
open."""
READS = 3
"""Times that features are read of which some turn out to be damaged, or to be gone; the encoders make them anew each time.
"""


@dataclass(frozen=True)
class RingTask:
    """What the encoders are to compute. `data` and `vision` as the user named them; see `Start`."""

    data: tuple[str, ...]
    vision: str
    cut: int | None
    tile_size: int
    max_tiles: int
    codec: str
    tokens: int
    width: int


class RingFeatures(FeatureSource):
    """Reads what encoders leave in a ring.

    Args:
        side: of a ring that this process has entered.
        manifest: of the features. broken: the file of the run that says which images turned out to be broken.
    """

    needs_files = True

    def __init__(self, side: TrainerSide, task: RingTask, manifest: Manifest, broken: Path) -> None:
        self.lookup, self.fingerprint = ImageHeaders(task.tile_size, task.max_tiles), fingerprint_of(manifest)
        self._side, self._ring = side, side.paths
        self._task, self._manifest, self._broken = task, manifest, BrokenImages(broken)
        self._say: Say = lambda text: None
        self._stopped = False
        self._refreshing, self._refreshed = threading.Lock(), 0.0

    def open_files(self, locate: Locate) -> None:
        self._locate = locate

    def expect(self, demand: Demand) -> None:
        self._demand, self._listed = demand, demand.step
        write_manifest(self._ring.features(self.fingerprint), self._manifest)
        others = set(fingerprints(self._ring.directory)) - {self.fingerprint}
        for other in others:  # left by a training of other features that never ended
            free_ring(self._ring, other)
        start = Start(
            number=self._side.start,
            step=demand.step,
            steps=demand.steps,
            checkpoint_every=demand.checkpoint_every,
            data=tuple(map(_absolute, self._task.data)),
            vision=_absolute(self._task.vision),
            cut=self._task.cut,
            max_tiles=self._task.max_tiles,
            codec=self._task.codec,
            fingerprint=self.fingerprint,
            tokens=self._task.tokens,
            width=self._task.width,
        )
        self._side.begin(start, self._list_until(self._horizon(demand.step)))
        for other in others:  # again: until now an encoder may have been at work for that training
            free_ring(self._ring, other)
        self._position = Position(self._ring)
        self._reader = CacheReader(self._ring.directory, fingerprint=self.fingerprint)
        self._failures = _Failures(self._ring, start.number)

    def features(self, keys: Sequence[str]) -> Tensor:
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refresh()
        for _ in range(READS - 1):
            self._wait_for(keys)
            try:
                return self._reader.read_many(keys)
            except CacheError:  # what could not be read is set aside or gone by now, and the encoders see that, too
                self._refresh()
        self._wait_for(keys)
        return self._reader.read_many(keys)

    def checkpointed(self, step: int) -> None:
        self._reader.close()  # an open file takes its space though it is removed
        self._side.consumed(step)
        self._side.want(self._list_until(self._horizon(step)))

    def finished(self) -> None:
        self._side.done()
        free_ring(self._ring, self.fingerprint)

    def report_waiting(self, say: Say) -> None:
        self._say = say

    def stop(self) -> None:
        self._stopped = True

    def _horizon(self, step: int) -> int:
        """An epoch ahead of a checkpoint, and enough to reach the next but one."""
        ahead = self._demand.checkpoint_every + max(self._demand.epoch_steps, self._demand.checkpoint_every)
        return min(step + ahead, self._demand.steps)

    def _list_until(self, end: int) -> Iterator[tuple[int, list[WantedImage]]]:
        for step in range(self._listed, end):
            yield step, [self._wanted(key) for key in self._demand.keys_of(step)]
        self._listed = max(self._listed, end)

    def _wanted(self, key: str) -> WantedImage:
        place = self._locate(key)
        return WantedImage(key, place.source, place.image.name, place.grid)

    def _wait_for(self, keys: Sequence[str]) -> None:
        """Until all of them are there.

        Raises:
            DataError: one cannot be encoded. CacheError: no encoder is at work. StoppedError: `stop` was called.
        """
        if all(key in self._reader for key in keys):
            return
        began = committed = time.monotonic()
        shards = self._shards()
        while missing := [key for key in keys if key not in self._reader]:
            self._refuse_failed(missing)
            self._refuse_another_training()
            if self._stopped:
                raise StoppedError
            if (now := self._shards()) - shards:
                committed = time.monotonic()
            shards = now
            if time.monotonic() - committed > PATIENCE_SECONDS:
                raise self._nobody(missing)
            if time.monotonic() - began > UNTOLD_SECONDS:
                self._say("waiting for the encoder")
            self._refresh()
            if any(key not in self._reader for key in missing):
                time.sleep(LOOK_SECONDS)
        self._say("")

    def _shards(self) -> set[str]:
        return {path.stem for path in self._reader.paths.shards.glob("*.idx")}

    def _refresh(self) -> None:
        with self._refreshing:
            self._refreshed = time.monotonic()
            try:
                self._reader.refresh()
            except CacheError:  # a shard that cannot be trusted: an encoder sets it aside, and makes it anew
                return

    def _refuse_failed(self, keys: Sequence[str]) -> None:
        self._failures.refresh()
        for key in keys:
            if (reason := self._failures.reason(key)) is not None:
                place = self._locate(key)
                raise self._broken.note(key, place.data, place.image.name, reason)

    def _refuse_another_training(self) -> None:
        """Where there are locks, it could not begin."""
        self._position.refresh()
        if self._position.start is not None and self._position.start.number > self._side.start:
            raise CacheError(
                f"another training has begun the ring {self._ring.name} ({self._ring.directory}), whose file system has no "
                "locks to prevent it: give each training its own --ring, and run the same command to resume"
            )

    def _nobody(self, missing: Sequence[str]) -> CacheError:
        image = self._locate(missing[0]).image.name
        return CacheError(
            f"waited {PATIENCE_SECONDS / 60:.0f} minutes for the features of {image}, in which nobody added any to the ring "
            f"{self._ring.name}; start `llama3v encode --follow {self._ring.name} --cache {self._ring.cache} "
            "--max-disk 200GB` (as much as there is), and run the same command to resume"
        )


class _Failures:
    """What encoders could not use in this start."""

    def __init__(self, ring: RingPaths, start: int) -> None:
        self._tail, self._start = journal.Tail(ring.failed), start
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        with self._lock:
            for entry in self._tail.read():
                if entry["start"] == self._start:
                    self._reasons[entry["key"]] = entry["reason"]

    def reason(self, key: str) -> str | None:
        return self._reasons.get(key)


def _absolute(name: str) -> str:
    """A path that other processes can use; a hub name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
