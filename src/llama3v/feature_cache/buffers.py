"""Memory for features that is used again as soon as nothing refers to it any more.

New memory is not free: the kernel clears every page of it before its first use, which takes about as long as reading
half the record. What was read before and is not needed any more has its pages already.
"""

import threading
import weakref
from collections import deque

import numpy as np

PAGE = 4096
IDLE_BYTES = 256 << 20


class Buffers:
    """Lends memory, and keeps what comes back. Any thread may ask.

    Args:
        idle_bytes: kept at most while nobody uses it.
    """

    def __init__(self, idle_bytes: int = IDLE_BYTES) -> None:
        self._idle_bytes = idle_bytes
        self._idle: list[np.ndarray] = []  # the one that came back last is last
        self._returned: deque[np.ndarray] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], its content arbitrary. It is lent until the last array or tensor that shares it is gone."""
        pages = -(-max(size, 1) // PAGE) * PAGE
        memory = self._find(pages)
        if memory is None:
            memory = _new(pages)
        # Through a memoryview, since numpy gives views of an array's view that array as their base, and so would not keep
        # `lent` alive.
        lent = np.frombuffer(memory.data, dtype=np.uint8, count=size)
        weakref.finalize(lent, self._returned.append, memory).atexit = False  # may run anywhere, so it takes no lock
        return lent

    def _find(self, size: int) -> np.ndarray | None:
        """The smallest idle memory of that size that is not twice as large."""
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
            fits = [place for place, memory in enumerate(self._idle) if size <= len(memory) <= 2 * size]
            found = self._idle.pop(min(fits, key=lambda place: len(self._idle[place]))) if fits else None
            while sum(map(len, self._idle)) > self._idle_bytes:
                self._idle.pop(0)
            return found

    def __getstate__(self) -> dict[str, int]:
        return {"idle_bytes": self._idle_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _new(size: int) -> np.ndarray:
    """uint8 [size] that begins with a page, to which the kernel copies faster."""
    memory = np.empty(size + PAGE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]
