"""Visual tokens on disk, so that a restart costs no vision. Safe under kill -9: nothing stale or torn is ever served.

    <root>/<fingerprint>/<key>.safetensors      tokens float32 [rows, hidden]; key and checksum in its metadata

A file is written under another name, flushed and renamed (feature_cache/commit.py), and whatever is read is checked against
its checksum, its key and the number of rows that the picture has. What does not fit is removed and computed again. The
fingerprint is a hash of what this very engine's tower makes of a known tile: other weights, another engine or another
precision have another directory.
"""

import hashlib
import json
import logging
import os
import queue
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import xxhash

from llama3v.errors import ConfigError
from llama3v.feature_cache.commit import TEMPORARY, publish, try_lock

log = logging.getLogger("llama3v.server")

_SUFFIX = ".safetensors"
_UNWRITTEN = 16  # entries that may wait for the disk; what comes then is left out


class VisionStore:
    """See Store (vision_cache.py).

    Args:
        root: made where it is absent.
        fingerprint: of the tower, see `fingerprint_of`.
        max_bytes: of all files below root; those that were used the longest ago are removed.

    Raises ConfigError where the directory cannot be made or written.
    """

    def __init__(self, root: Path, fingerprint: str, max_bytes: int) -> None:
        self._directory = root / fingerprint
        self._max_bytes = max_bytes
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self._directory, os.W_OK):
                raise PermissionError(13, "no permission to write")
        except OSError as error:
            raise ConfigError(f"--vision-cache-dir {root} cannot be used ({error.strerror}); give another") from error
        _remove_leftovers(root)
        self._files = _by_age(root)  # the latest last
        self._lock = threading.Lock()
        self._jobs: queue.Queue[tuple[str, np.ndarray] | None] = queue.Queue(_UNWRITTEN)
        self._thread = threading.Thread(target=self._write_all, name="llama3v-vision-store", daemon=True)
        self._thread.start()

    def read(self, key: str, rows: int) -> np.ndarray | None:
        """See Store."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        tokens = _tokens_of(data, key, rows)
        if tokens is None:
            log.warning("a file of the vision cache is damaged and was removed")
            self._remove(path)
            return None
        with self._lock, suppress(OSError):
            os.utime(path)
            if path in self._files:
                self._files.move_to_end(path)
        return tokens

    def write(self, key: str, tokens: np.ndarray) -> None:
        """See Store."""
        with suppress(queue.Full):
            self._jobs.put_nowait((key, tokens))

    def close(self, seconds: float = 5.0) -> None:
        """Write what waits, at most so long."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{_SUFFIX}"

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except OSError as error:  # a full disk costs time later, but no request
                log.warning("the vision cache cannot be written: %s", error.strerror or type(error).__name__)

    def _write(self, key: str, tokens: np.ndarray) -> None:
        metadata = {"key": key, "checksum": _checksum(tokens)}
        data = safetensors.numpy.save({"tokens": np.ascontiguousarray(tokens)}, metadata)
        path = self._path(key)
        with publish(path, [data], "vision"):
            pass
        with self._lock:
            self._files[path] = len(data)
            self._files.move_to_end(path)
            while sum(self._files.values()) > self._max_bytes and self._files:
                oldest, _ = self._files.popitem(last=False)
                oldest.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        with self._lock:
            self._files.pop(path, None)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def fingerprint_of(engine: str, tokens: np.ndarray) -> str:
    """Of a tower, by the visual tokens that it makes of a known tile: 32 hex digits."""
    digest = hashlib.sha256(f"1 {engine} {tokens.shape} {tokens.dtype}".encode())
    digest.update(tokens.tobytes())
    return digest.hexdigest()[:32]


def _checksum(tokens: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens).tobytes())


def _tokens_of(data: bytes, key: str, rows: int) -> np.ndarray | None:
    """What a file holds, or None where it is not whole or not this picture's."""
    try:
        tokens = safetensors.numpy.load(data)["tokens"]
        length = int.from_bytes(data[:8], "little")
        metadata = _metadata(data[8 : 8 + length])
    except (safetensors.SafetensorError, KeyError, ValueError):
        return None
    if tokens.ndim != 2 or len(tokens) != rows or tokens.dtype != np.float32:
        return None
    return tokens if metadata == {"key": key, "checksum": _checksum(tokens)} else None


def _metadata(header: bytes) -> dict[str, str]:
    """The texts in a safetensors header. Raises ValueError."""
    found = json.loads(header).get("__metadata__", {})
    return {str(name): str(value) for name, value in found.items()}


def _remove_leftovers(root: Path) -> None:
    """What a killed process was writing: files whose lock nobody holds."""
    for path in root.glob(f"*/*{TEMPORARY}"):
        with suppress(OSError):
            descriptor = try_lock(path)
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _by_age(root: Path) -> OrderedDict[Path, int]:
    found = []
    for path in root.glob(f"*/*{_SUFFIX}"):
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, path, status.st_size))
    return OrderedDict((path, size) for _, path, size in sorted(found))
