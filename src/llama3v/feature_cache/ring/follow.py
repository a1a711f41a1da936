"""`llama3v encode --follow RING`: encode what a trainer will need next, within a bound of disk."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import EncodeConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.commit import host_tag
from llama3v.feature_cache.encode import Counts, sigterm_as_interrupt, write_summary
from llama3v.feature_cache.layout import differences, fingerprint_of, manifest_of, read_manifest
from llama3v.feature_cache.presence import wait_to_be_alone
from llama3v.feature_cache.progress import EncodeProgress
from llama3v.feature_cache.ring.files import Position, RingPaths, Start, trainer_is_there
from llama3v.feature_cache.ring.stock import Stock
from llama3v.feature_cache.ring.work import LOOK_SECONDS, Work

if TYPE_CHECKING:
    from llama3v.feature_cache.encoders.base import TrunkEncoder
    from llama3v.model.vision import VisionTower

PATIENCE_SECONDS = 6 * 3600.0
"""How long to wait for a trainer to begin the ring; reading through large data takes it hours."""
OVER_SECONDS = 30.0
"""How long to wait for one where the last training is over."""


def follow(config: EncodeConfig) -> dict[str, Any]:
    """Encode for a ring until its trainer is done.

    Returns the summary, which is also written to <out>/summary.json. Raises as `encode`; CacheError also where the bound
    is too small for what lies between two checkpoints, or nobody begins the ring.
    """
    assert config.follow is not None, "the config was validated"
    ring = RingPaths(config.cache, config.follow)
    following = Following(config, ring)
    out = config.out or ring.directory / "encoders" / f"{host_tag()}-{os.getpid()}"
    try:
        with sigterm_as_interrupt(), following.progress:
            following.run()
    except BaseException:
        with suppress(CacheError, OSError):  # what stopped us is the news
            _write(out, following.summary())
        raise
    summary = following.summary()
    _write(out, summary)
    print(f"ring {ring.name}: {summary['encoded']:,} images encoded ({summary['tiles']:,} tiles); the training is done")
    return summary


def _write(out: Path, summary: dict[str, Any]) -> None:
    if summary["begun"]:  # else the name may be a wrong one
        out.mkdir(parents=True, exist_ok=True)
        write_summary(out / "summary.json", summary)


class Following:
    """One encoder at work for a ring, through all starts of its trainer."""

    def __init__(self, config: EncodeConfig, ring: RingPaths) -> None:
        self.config, self.ring = config, ring
        self.position = Position(ring)
        self.counts = Counts()
        self.progress = EncodeProgress(self.counts, f"ring {ring.name}", None)
        self.encoder: TrunkEncoder | None = None
        self._tile_size = 0  # of the tower that the encoder runs
        self._fingerprint = ""  # of what the encoder computes
        self._began = time.perf_counter()
        self._largest = 0

    def run(self) -> None:
        """Until the trainer is done."""
        self._wait_for_start()
        while not self.position.done:
            start = self.position.start
            assert start is not None, "it was waited for"
            encoder = self._open_encoder(start)
            Work(
                self.config,
                self.ring,
                start,
                self.position,
                encoder,
                self._tile_size,
                self.counts,
                self._say,
                self._measured,
            ).run()
        assert self.position.start is not None, "it was waited for"
        free_ring(self.ring, self.position.start.fingerprint, self._is_over)

    def _is_over(self) -> bool:
        self.position.refresh()
        return self.position.done

    def summary(self) -> dict[str, Any]:
        """What was done so far."""
        counts, seconds = self.counts, time.perf_counter() - self._began
        return {
            "ring": self.ring.name,
            "begun": self.position.start is not None,
            "encoded": counts.encoded,
            "tiles": counts.tiles,
            "left_out": counts.left_out,
            "seconds": seconds,
            "wait_share": counts.wait_share(seconds),
            "largest_bytes": self._largest,
            "engine": self.encoder.name if self.encoder else None,
        }

    def _say(self, note: str) -> None:
        """What is done instead of encoding; empty where that is over."""
        self.progress.note = note
        self.progress.update()

    def _measured(self, used: int) -> None:
        """Note how many bytes the ring takes."""
        self._largest = max(self._largest, used)

    def _open_encoder(self, start: Start) -> "TrunkEncoder":
        """The engine for what a start asks for; the one there is where that is the same."""
        from llama3v.feature_cache.encoders.choose import open_encoder

        if self.encoder is None or self._fingerprint != start.fingerprint:
            began = time.perf_counter()
            self._say("preparing the engine")
            self.encoder = open_encoder(
                self.config.engine,
                self._load_tower(start),
                precision=self.config.precision,
                batch_tiles=self.config.batch_tiles,
            )
            self._fingerprint = start.fingerprint
            self.counts.opening_seconds += time.perf_counter() - began
            self._say("")
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
        self._tile_size = tower.tile_size
        return tower

    def _wait_for_start(self) -> None:
        began = time.monotonic()
        while True:
            self.position.refresh()
            if self.position.start is not None and not self.position.done:
                return self._say("")
            self._say(f"waiting for a training with --ring {self.ring.name} --cache {self.ring.cache}")
            over = self.position.done and not trainer_is_there(self.ring)  # unless the next one is about to begin
            if over and time.monotonic() - began > OVER_SECONDS:
                return None
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise CacheError(
                    f"no training has begun the ring {self.ring.name} ({self.ring.directory}); start one with "
                    f"--ring {self.ring.name} --cache {self.ring.cache}, or correct --follow"
                )
            time.sleep(LOOK_SECONDS)


def free_ring(ring: RingPaths, fingerprint: str, is_over: Callable[[], bool] = lambda: True) -> None:
    """Remove all features of a ring whose training is done.

    Args:
        is_over: asked again when nobody else can commit: the next training may have begun by then.
    """
    paths = ring.features(fingerprint)
    with wait_to_be_alone(paths) as alone:
        if is_over():
            Stock(paths, bound=0).clear(alone)
