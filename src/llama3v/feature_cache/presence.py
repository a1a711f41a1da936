"""Who is at work on a cache: writers together, or one prune alone.

A writer holds a shared `flock` on <fingerprint>/writers.lock for as long as it lives, a prune an exclusive one. A prune
cannot see what a writer counts on, so it must not begin beside one. The kernel frees the locks of the dead.
"""

import errno
import fcntl
import os
import sys

from llama3v.errors import CacheError
from llama3v.feature_cache.layout import CachePaths


class Presence:
    """A lock that is held until `leave`, or until this object goes.

    Attributes:
        certain: whether it is held indeed: a file system without locks cannot tell who else is there.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.certain = True

    def leave(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "Presence":
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def __del__(self) -> None:
        self.leave()


def enter_as_writer(paths: CachePaths) -> Presence:
    """Any number of writers; waits while a prune is at work. Raises OSError where the directory cannot be written."""
    presence, descriptor = _open(paths)
    if _try(descriptor, fcntl.LOCK_SH) is False:
        print(f"waiting until `llama3v cache prune` is done with {paths.directory}", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return presence


def enter_alone(paths: CachePaths) -> tuple[Presence, bool]:
    """Nobody else from now on; and whether that is certain: a file system without locks cannot tell.

    Raises:
        CacheError: a writer, or another prune, is at work.
    """
    presence, descriptor = _open(paths)
    alone = _try(descriptor, fcntl.LOCK_EX)
    if alone is False:
        presence.leave()
        raise CacheError(
            f"{paths.directory} is in use: an encode pass or another prune is at work on it; "
            "run this again when it has ended"
        )
    return presence, alone is True


def wait_to_be_alone(paths: CachePaths) -> Presence:
    """`enter_alone`, for those who hold it for moments only: the encoders of a ring."""
    presence, descriptor = _open(paths)
    alone = _try(descriptor, fcntl.LOCK_EX)
    if alone is False:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    presence.certain = alone is not None
    return presence


def _open(paths: CachePaths) -> tuple[Presence, int]:
    descriptor = os.open(paths.directory / "writers.lock", os.O_RDWR | os.O_CREAT, 0o644)
    return Presence(descriptor), descriptor


def _try(descriptor: int, kind: int) -> bool | None:
    """Whether the lock is ours now; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
    return True
