"""Memory for features that is used again as soon as nothing refers to it any more.

New memory is not free: the kernel clears every page of it before its first use. What was used before has its pages
already, and may still be in the processor's cache.
"""

import mmap
import threading
import weakref
from collections import OrderedDict

import numpy as np

PAGE = 4096
IDLE_BYTES = 256 << 20
LARGER = 4
"""So many times larger than what is asked for may be what is lent instead of new memory."""


class Buffers:
    """Lends memory, and keeps what comes back. Any thread may ask.

    It never holds more than was lent at once at some time.

    Args:
        idle_bytes: kept at most while nobody uses it.
    """

    def __init__(self, idle_bytes: int = IDLE_BYTES) -> None:
        self._most_idle = idle_bytes
        self._lent = self._most_lent = self._idle_bytes = 0  # bytes
        self._idle: OrderedDict[int, list[mmap.mmap]] = OrderedDict()  # by size; the size that was used last is last
        self._returned: list[mmap.mmap] = []  # while the lock was taken
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], its content arbitrary. It is lent until the last array or tensor that shares it is gone."""
        rounded = _rounded(size)
        with self._lock:
            self._sort_in()
            fitting = [idle for idle in self._idle if rounded <= idle <= LARGER * rounded]
            memory = self._pop(min(fitting)) if fitting else self._new(rounded)
            self._lent += len(memory)
            self._most_lent = max(self._most_lent, self._lent)
        lent = np.frombuffer(memory, dtype=np.uint8, count=size)  # no view of an array: its own views keep it alive
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: mmap.mmap) -> None:
        """May run anywhere, even while this thread has the lock: so it never waits for it."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.pop()
            self._lent -= len(memory)
            self._idle.setdefault(len(memory), []).append(memory)
            self._idle.move_to_end(len(memory))
            self._idle_bytes += len(memory)
        self._drop_until(self._most_idle)

    def _new(self, size: int) -> mmap.mmap:
        """From the kernel, not from malloc: it begins with a page, and goes back as a whole."""
        self._drop_until(max(0, self._most_lent - self._lent - size))
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of features") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _drop_until(self, idle_bytes: int) -> None:
        while self._idle_bytes > idle_bytes:
            self._pop(next(iter(self._idle)))

    def _pop(self, size: int) -> mmap.mmap:
        memory = self._idle[size].pop()
        self._idle_bytes -= size
        self._idle.move_to_end(size)
        if not self._idle[size]:
            del self._idle[size]
        return memory

    def __getstate__(self) -> dict[str, int]:
        return {"idle_bytes": self._most_idle}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _rounded(size: int) -> int:
    """Up to whole pages, and to one of four sizes in every power of two: so sizes come again. Pages that are not touched
    take no memory."""
    step = max(PAGE, 1 << max(0, size.bit_length() - 3))
    return -(-max(size, 1) // step) * step
