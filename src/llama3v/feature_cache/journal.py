"""Append-only files of JSON lines that several processes write and a kill cannot spoil.

Every line ends in ``"check"``, the xxh3_64 of the line without it. A line that was torn by a kill or damaged on disk
fails its check and is left out on reading, so it can at worst be missing, never wrong; what it said is appended again
by whoever finds it missing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from llama3v.feature_cache.commit import crash_point, flush_to_disk, wait_for_lock, write_all


def append(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append entries durably, all in one write, under the file's lock.

    Raises:
        OSError: the file cannot be written.
    """
    text = b"".join(_line(entry) for entry in entries)
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        wait_for_lock(descriptor)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = b"\n" + text  # the last writer was killed inside a line
        crash_at = len(text) // 2
        write_all(descriptor, text[:crash_at])
        crash_point("journal-half-written")
        write_all(descriptor, text[crash_at:])
        crash_point("journal-written")
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal whose check holds, oldest first; none where the file does not exist.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            entry = _parse(line)
            if entry is not None:
                yield entry


class Tail:
    """Reads a journal while others append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def read(self) -> list[dict[str, Any]]:
        """The entries whose check holds that have been appended since the last call, oldest first.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:  # not there yet, or removed by now
            return []
        lines = data[: data.rfind(b"\n") + 1]  # a line without an end is being written, or was torn
        self._position += len(lines)
        entries = (_parse(line) for line in lines.split(b"\n"))
        return [entry for entry in entries if entry is not None]


def unreadable_lines(path: Path) -> int:
    """How many lines of a journal `read` leaves out: torn by a kill, or damaged. Raises OSError as `read` does."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip() and _parse(line) is None)


def _line(entry: Mapping[str, Any]) -> bytes:
    check = xxhash.xxh3_64_hexdigest(_canonical(entry))
    return json.dumps({**entry, "check": check}, ensure_ascii=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    check = entry.pop("check", None)
    return entry if check == xxhash.xxh3_64_hexdigest(_canonical(entry)) else None


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
