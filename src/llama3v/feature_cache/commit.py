"""How a file becomes durable, so that a kill at any moment leaves either the whole file or nothing under its name.

    create a temporary file -> write -> fsync -> rename -> fsync the directory

While the work lasts, the file carries an exclusive `flock`; the kernel drops it when the process dies, however it
dies. So a free lock on an unfinished file means that its owner is gone (see `collect_orphans` in orphans.py).

For tests: with ``LLAMA3V_CRASH_AT=shard-renamed`` in the environment (or ``shard-renamed:3``: the third time), the
process ends there with exit code 137 and without any clean-up, as after ``kill -9``. The points are `CRASH_POINTS`.
"""

import fcntl
import functools
import hashlib
import os
import platform
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
CRASH_VARIABLE = "LLAMA3V_CRASH_AT"
CRASH_EXIT_CODE = 137  # what a shell reports for SIGKILL
_STEPS = ("created", "half-written", "written", "synced", "renamed", "directory-synced")
CRASH_POINTS = (
    *(f"{what}-{step}" for what in ("manifest", "shard", "index") for step in _STEPS),
    "journal-half-written",
    "journal-written",
)

_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """End the process here, as a kill would, if the environment asks for it."""
    wanted = os.environ.get(CRASH_VARIABLE)
    if wanted is None:
        return
    wanted_name, _, time = wanted.partition(":")
    _passed[name] += 1
    if name == wanted_name and _passed[name] == int(time or 1):
        os._exit(CRASH_EXIT_CODE)


@contextmanager
def publish(path: Path, chunks: Sequence[bytes | memoryview], what: str) -> Iterator[None]:
    """Write `chunks` durably as `path`, then hold the file's lock while the body runs.

    Args:
        what: "manifest", "shard", "index"...; names the crash points.

    Raises:
        OSError: the file could not be written (disk full, no permission); nothing is left under `path`.
    """
    temporary = path.with_name(f"{path.name}.{host_tag()}-{secrets.token_hex(4)}{TEMPORARY}")
    descriptor = _create_locked(temporary)
    try:
        try:
            crash_point(f"{what}-created")
            for number, chunk in enumerate(chunks):
                middle = len(chunk) // 2 if number == len(chunks) // 2 else 0
                if middle:
                    write_all(descriptor, chunk[:middle])
                    crash_point(f"{what}-half-written")
                write_all(descriptor, chunk[middle:])
            crash_point(f"{what}-written")
            flush_to_disk(descriptor)
            crash_point(f"{what}-synced")
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        crash_point(f"{what}-renamed")
        flush_directory(path.parent)
        crash_point(f"{what}-directory-synced")
        yield
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written; it may stop early, for example when the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def flush_to_disk(descriptor: int) -> None:
    """Wait until the file's bytes are on the device."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's volatile cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def flush_directory(directory: Path) -> None:
    """Wait until the directory's entries are on the device; without it a rename may be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int) -> None:
    """Take an open file's lock. A file system without locks has none to take: there `try_lock` never succeeds, so
    nothing is collected, and journals rely on O_APPEND alone."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def try_lock(path: Path) -> int | None:
    """Take a file's lock without waiting: its open descriptor, or None where a living process may hold it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where nobody can be known to be dead
        os.close(descriptor)
        return None
    return descriptor


@functools.cache
def host_tag() -> str:
    """8 hex digits for this running machine: they differ after a reboot, and are equal in all its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text() if boot.exists() else platform.node()
    return hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()


def _create_locked(path: Path) -> int:
    """Create a file and take its lock. Between the two a collector may have removed it: then create it again."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        wait_for_lock(descriptor)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
        os.close(descriptor)
