"""The writer of a ring: commits only what fits, and makes room for it first."""

import time
from collections.abc import Callable

import numpy as np

from llama3v.feature_cache.layout import Manifest
from llama3v.feature_cache.presence import Presence, wait_to_be_alone
from llama3v.feature_cache.ring.files import RingPaths
from llama3v.feature_cache.ring.stock import Stock, file_bytes
from llama3v.feature_cache.ring.wanted import Wanted
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

COMMIT_SECONDS = 30.0
"""A shard is committed then though it is not full: the trainer may be waiting for it."""


class RingWriter(CacheWriter):
    """Takes no record for granted, so it holds the cache's lock only while it commits.

    What does not fit is given up: it is found missing again when there is room.

    Args:
        bound: bytes that the shards of the ring may take.

    Attributes:
        given_up: records that did not fit, for other encoders were quicker.
    """

    def __init__(self, ring: RingPaths, manifest: Manifest, shard_bytes: int, bound: int) -> None:
        super().__init__(ring.directory, manifest, shard_bytes)
        self.stock = Stock(self.paths, bound)
        self.stock.refresh()
        self.given_up = 0
        self._wanted: Wanted | None = None
        self._is_wanted: Callable[[], bool] = lambda: False
        self._oldest = 0.0

    def begin_round(self, wanted: Wanted, is_wanted: Callable[[], bool]) -> None:
        """See what the others did. From now on this list says what is needed when, and `is_wanted` whether anything is
        wanted still: otherwise what is pending is forgotten instead of committed."""
        self._wanted, self._is_wanted = wanted, is_wanted
        self._index.refresh()

    def add_bytes(self, key: str, features: np.ndarray, grid: Grid, name: str = "") -> bool:
        if not self._pending:
            self._oldest = time.monotonic()
        added = super().add_bytes(key, features, grid, name)
        if self._pending and time.monotonic() - self._oldest > COMMIT_SECONDS:
            self.commit()
        return added

    def commit(self) -> int:
        if not self._pending:
            return 0
        with wait_to_be_alone(self.paths) as alone:
            if not self._is_wanted():
                self._pending, self._pending_bytes = {}, 0
            self._make_room(alone)
            return super().commit()

    def _make_room(self, alone: Presence) -> None:
        """For as much of what is pending as possible, nearest first."""
        if self._wanted is None:
            return
        order = sorted(self._pending, key=self._wanted.next_use)
        while order:
            step = self._wanted.next_use(order[-1])
            size = file_bytes([self._pending[key] for key in order])
            if self.stock.make_room(size, step, self._wanted, alone):
                return
            record, _ = self._pending.pop(order.pop())
            self._pending_bytes -= record.bytes
            self.given_up += 1

    def _enter(self) -> Presence | None:
        return None
