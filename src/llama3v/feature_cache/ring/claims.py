"""Which encoder works on which step: so that several of them share a ring's work instead of doing it twice.

A step is claimed by a lock on one byte of a file. The kernel frees the locks of the dead, on this machine and, over a
file system that has locks, on others. Where there are none, encoders may do the same work: they leave one record.
"""

import errno
import fcntl
import os
from pathlib import Path


class Claims:
    """The steps that this process works on."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._held: set[int] = set()

    def take(self, step: int) -> bool:
        """Whether the step is ours: no other process works on it."""
        if step in self._held:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, step)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # else a file system without locks
        self._held.add(step)
        return True

    def release(self, step: int) -> None:
        """Let others have a step."""
        if step in self._held:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, step)
            self._held.discard(step)

    def release_all(self) -> None:
        """Let others have everything."""
        for step in list(self._held):
            self.release(step)

    def close(self) -> None:
        """Release everything, for good."""
        os.close(self._descriptor)
