"""What the vision tower made of the latest pictures: visual tokens by the picture's key, in memory and, if wanted, on disk.

A picture that is asked about again costs no vision. The key (pictures.py) is a hash of the decoded pixels, their mode and
size, and how they were cut; the model is part of the directory's name. So nothing that could differ is ever shared.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np


class Store(Protocol):
    """Where visual tokens outlive the process."""

    def read(self, key: str, rows: int) -> np.ndarray | None:
        """float32 [rows, hidden], or None where there is nothing that is whole."""
        ...

    def write(self, key: str, tokens: np.ndarray) -> None:
        """Keep them; returns at once."""
        ...

    def close(self) -> None:
        """Write what waits."""
        ...


class VisionCache:
    """Args:
    max_bytes: of visual tokens in memory; the ones that were used last stay.
    store: on disk; None: memory alone.
    """

    def __init__(self, max_bytes: int, store: Store | None = None) -> None:
        self.hits = {"memory": 0, "disk": 0}
        self.misses = 0
        self.bytes = 0
        self._max_bytes = max_bytes
        self._store = store
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()  # the latest last
        self._lock = threading.Lock()
        self._making: dict[str, list] = {}  # key -> [its lock, how many hold or wait for it]

    def __len__(self) -> int:
        return len(self._kept)

    def close(self) -> None:
        """Let the disk have what it lacks."""
        if self._store is not None:
            self._store.close()

    def get(self, key: str, rows: int, make: Callable[[], np.ndarray]) -> tuple[np.ndarray, bool]:
        """The visual tokens of a picture, and whether they were there already.

        Two that want the same picture wait for one tower. Whatever `make` raises, the next one tries again.

        Args:
            rows: visual tokens of the picture.
        """
        with self._alone(key):
            found = self._in_memory(key)
            if found is not None:
                return found, True
            found = None if self._store is None else self._store.read(key, rows)
            if found is not None:
                self.hits["disk"] += 1
                self._keep(key, found)
                return found, True
            self.misses += 1
            made = make()
            self._keep(key, made)
            if self._store is not None:
                self._store.write(key, made)
            return made, False

    def _in_memory(self, key: str) -> np.ndarray | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            self.hits["memory"] += 1
            return self._kept[key]

    def _keep(self, key: str, tokens: np.ndarray) -> None:
        if tokens.nbytes > self._max_bytes:
            return
        with self._lock:
            self._kept[key] = tokens
            self.bytes += tokens.nbytes
            while self.bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= oldest.nbytes

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """One thread at a time for one key; others do not wait."""
        with self._lock:
            entry = self._making.setdefault(key, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self._lock:
                entry[1] -= 1
                if not entry[1]:
                    del self._making[key]
