"""One copy of a record, read into the caller's memory and verified on the way.

Reads go through `pread` into memory that the caller owns, not through a mapping: measured on page-cached records of
1.7 MB it is as fast as mapping, checking and copying; what was verified cannot change under the caller's hands (the
kernel may drop a mapped page and read it again); and an I/O error is an exception that names the record, where a
mapping kills the process (SIGBUS).
"""

import errno
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import xxhash

from llama3v.errors import CacheError
from llama3v.feature_cache.index import Index, shard_header_is_whole
from llama3v.feature_cache.records import Record, ShardIndex

READ_ATTEMPTS = 3
RETRY_SECONDS = 0.05  # doubles with every attempt
PIECE_BYTES = 512 << 10  # hashed while it is in the core's cache: measured 15% faster than a whole record at its end
OPEN_SHARDS = 128  # file descriptors kept; a process may usually have 1024


class DamageError(Exception):
    """One copy of a record cannot be used; it is set aside."""


class GoneError(Exception):
    """The shard's file is not there any more; carries its name."""


class Copies:
    """The records in the shards of an index. Any thread may read; shards are opened when they are first needed."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files: OrderedDict[str, _ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, record: Record, memory: np.ndarray) -> None:
        """Put the bytes of a record into `memory`, uint8 [record.bytes]. What stands there after an error is not verified.

        Raises:
            DamageError: it cannot be read, or not with the right checksum, after several attempts. It is set aside by now.
            GoneError: its shard was removed.
        """
        wait = RETRY_SECONDS
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                if self._fetch(record, memory.data) == record.checksum:
                    return
                reason = "its bytes do not match their checksum"
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE):
                    with self._lock:
                        self._files.pop(record.shard, None)
                    raise GoneError(record.shard) from error
                reason = f"it cannot be read ({error.strerror or error})"
            if attempt < READ_ATTEMPTS:
                time.sleep(wait)
                wait *= 2
        raise self._set_aside(record.shard, record.key, reason)

    def forget_removed(self) -> None:
        """Close the files that the index does not have any more: one that is removed takes its space while it is open."""
        with self._lock:
            for shard in self._files.keys() - self._index.shards.keys():
                del self._files[shard]

    def close(self) -> None:
        """Close all files; reading opens them again."""
        with self._lock:
            self._files.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_index": self._index}

    def __setstate__(self, state: dict[str, Index]) -> None:
        self.__init__(state["_index"])  # type: ignore[misc]

    def _fetch(self, record: Record, view: memoryview) -> str:
        """Read the bytes; returns their checksum. Raises OSError, also where the file ends early."""
        digest, position = xxhash.xxh3_128(), 0
        file = self._open(record)  # held on to: another thread may push it out of the files that are kept open
        while position < record.bytes:
            piece = view[position : position + PIECE_BYTES]
            count = os.preadv(file.descriptor, [piece], record.offset + position)
            if count == 0:
                name = self._index.paths.shard(record.shard).name
                raise OSError(f"{name} ends inside it: truncated after it was opened")
            digest.update(piece[:count])
            position += count
        return digest.hexdigest()

    def _open(self, record: Record) -> "_ShardFile":
        with self._lock:
            file = self._files.get(record.shard)
            if file is not None:
                self._files.move_to_end(record.shard)
                return file
        index = self._index.shards.get(record.shard)
        if index is None:  # another thread set it aside, or found it pruned
            aside = (record.shard, "") in self._index.damaged
            raise DamageError("its shard was set aside") if aside else GoneError(record.shard)
        return self._open_new(index)

    def _open_new(self, index: ShardIndex) -> "_ShardFile":
        if not shard_header_is_whole(self._index.paths, index):
            raise self._set_aside(index.shard, "", "the header of its shard is damaged")
        file = _ShardFile(self._index.paths.shard(index.shard))
        with self._lock:
            self._files[index.shard] = file
            while len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def _set_aside(self, shard: str, key: str, reason: str) -> DamageError:
        try:
            self._index.set_aside([(shard, key, reason)])
        except CacheError as error:  # the damage is the news; that it could not be marked is told beside it
            return DamageError(f"{reason}; {error}")
        return DamageError(reason)


class _ShardFile:
    """An open shard; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
