"""What the trainer and the encoders of a ring tell one another, through files alone: they may run on different machines.

<cache>/rings/<name>/
  trainer.jsonl          by the trainer: a line for every start (what is to be encoded, and how), then how far it is
  wanted-<start>.jsonl   by the trainer: the images of every step, in order of steps
  failed.jsonl           by the encoders: images that cannot be used
  trainer.lock           held by the trainer
  claims.lock            encoders lock byte <step> of it while they encode what that step lacks
  <fingerprint>/         a feature cache like any other

The `.jsonl` files are journals (journal.py). A trainer that starts again begins a new list: the one before counts no more.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.layout import CachePaths
from llama3v.model.slicing import Grid

STEPS_IN_APPEND = 1000
LOCK_ATTEMPTS = 5
LOOK_FOR_TRAINER_SECONDS = 60.0


@dataclass(frozen=True)
class RingPaths:
    """The files of a ring."""

    cache: Path
    name: str

    @property
    def directory(self) -> Path:
        return self.cache / "rings" / self.name

    @property
    def trainer(self) -> Path:
        return self.directory / "trainer.jsonl"

    @property
    def failed(self) -> Path:
        return self.directory / "failed.jsonl"

    @property
    def trainer_lock(self) -> Path:
        return self.directory / "trainer.lock"

    @property
    def claims(self) -> Path:
        return self.directory / "claims.lock"

    def wanted(self, start: int) -> Path:
        return self.directory / f"wanted-{start}.jsonl"

    def features(self, fingerprint: str) -> CachePaths:
        return CachePaths(self.directory, fingerprint)


@dataclass(frozen=True)
class Start:
    """What a trainer says when it starts.

    Attributes:
        number: counts the starts of a ring from 1.
        step: the first step of this start; steps count from 0. steps: where training ends.
        checkpoint_every: steps between checkpoints, and so between moments at which records become free.
        data: the data sets, as paths that every encoder can open; images name them by number.
        vision, cut, max_tiles, codec: as of `llama3v encode`. fingerprint: of the features that these give.
        tokens, width: of a tile's features.
    """

    number: int
    step: int
    steps: int
    checkpoint_every: int
    data: tuple[str, ...]
    vision: str
    cut: int | None
    max_tiles: int
    codec: str
    fingerprint: str
    tokens: int
    width: int

    def next_checkpoint(self, step: int) -> int:
        """Steps that are done at the first checkpoint behind a step."""
        return min((step // self.checkpoint_every + 1) * self.checkpoint_every, self.steps)


@dataclass(frozen=True)
class WantedImage:
    """An image that a step needs. `source` is the number of its data set."""

    key: str
    source: int
    name: str
    grid: Grid


class TrainerSide:
    """What the trainer writes."""

    def __init__(self, paths: RingPaths) -> None:
        self.paths = paths
        self._lock: int | None = None
        self._start = 0

    def enter(self) -> None:
        """Take the ring for this process, until it ends. Raises CacheError where another trainer has it."""
        self.paths.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.paths.trainer_lock, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(LOCK_ATTEMPTS):  # an encoder may just be looking whether we are there
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        else:
            self.leave()
            raise CacheError(
                f"another training uses the ring {self.paths.name} ({self.paths.directory}); choose another --ring"
            )
        self._start = max((entry["start"] for entry in journal.read(self.paths.trainer)), default=0) + 1

    def leave(self) -> None:
        """Let another trainer have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def start(self) -> int:
        """Number of this start."""
        return self._start

    def begin(self, start: Start, steps: Iterable[tuple[int, Sequence[WantedImage]]]) -> None:
        """Announce this start, with the list as far as it goes for now."""
        for old in self.paths.directory.glob("wanted-*.jsonl"):
            old.unlink()
        self.want(steps)
        entry = asdict(start) | {"data": list(start.data)}
        journal.append(self.paths.trainer, [{"start": entry.pop("number"), "begins": entry}])

    def want(self, steps: Iterable[tuple[int, Sequence[WantedImage]]]) -> None:
        """Append to the list: (step, its images), steps without a gap."""
        lines: list[dict[str, Any]] = []
        for step, images in steps:
            plain = [[image.key, image.source, image.name, image.grid.columns, image.grid.rows] for image in images]
            lines.append({"step": step, "images": plain})
            if len(lines) == STEPS_IN_APPEND:
                journal.append(self.paths.wanted(self._start), lines)
                lines = []
        journal.append(self.paths.wanted(self._start), lines)

    def consumed(self, step: int) -> None:
        """Never again will a step before this one be trained."""
        journal.append(self.paths.trainer, [{"start": self._start, "consumed": step}])

    def done(self) -> None:
        """Nothing is wanted any more."""
        journal.append(self.paths.trainer, [{"start": self._start, "done": True}])


class Position:
    """How far the trainer is, as its encoders see it.

    Attributes:
        start: the trainer's last start; None before the first.
        consumed: steps before this one are never trained again.
        done: whether training has ended.
    """

    def __init__(self, paths: RingPaths) -> None:
        self._paths, self._tail = paths, journal.Tail(paths.trainer)
        self._lock = threading.Lock()
        self._seen = self._looked = time.monotonic()
        self.start: Start | None = None
        self.consumed = 0
        self.done = False

    def refresh(self) -> None:
        """Read what the trainer has written since. Any thread may."""
        with self._lock:
            for entry in self._tail.read():
                self._seen = time.monotonic()
                if "begins" in entry:
                    begins = entry["begins"]
                    self.start = Start(number=entry["start"], **(begins | {"data": tuple(begins["data"])}))
                    self.consumed, self.done = self.start.step, False
                elif self.start is None or entry["start"] != self.start.number:
                    continue  # of a trainer that lost the ring, where there are no locks
                elif "consumed" in entry:
                    self.consumed = entry["consumed"]
                elif "done" in entry:
                    self.done = True

    def absent_for(self) -> float:
        """Seconds since the trainer was last heard of, or last seen to have the ring (looked for once a minute)."""
        now = time.monotonic()
        if now - self._looked > LOOK_FOR_TRAINER_SECONDS:
            self._looked = now
            if trainer_is_there(self._paths):
                self._seen = now
        return now - self._seen


def trainer_is_there(paths: RingPaths) -> bool:
    """Whether a trainer has the ring; it may still be loading its model or its data."""
    if not paths.trainer_lock.exists():
        return False
    with paths.trainer_lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)
    return False


def failures(paths: RingPaths) -> Iterator[dict[str, Any]]:
    """Lines {"start", "key", "name", "reason"} of images that encoders could not use."""
    return journal.read(paths.failed)
