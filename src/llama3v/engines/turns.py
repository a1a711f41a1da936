"""A lock that is given to waiting threads in the order in which they came."""

import threading
from collections import deque
from typing import Any


class FairLock:
    """`with lock:` in many threads; who waits longest is next.

    Python's own lock often goes back to the thread that has just released it, and an answer that takes it for every
    token would keep the others waiting until it has ended.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[Any] = deque()  # a locked lock for each thread

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            gate.acquire()  # until the one before us opens it: the lock is then ours
        except BaseException:  # interrupted
            with self._mutex:
                ours = gate not in self._waiting
                if not ours:
                    self._waiting.remove(gate)
            if ours:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
