"""Read features back: one contiguous run of bytes a record, and its checksum verified every time.

Reads go through `pread` into memory that the caller owns, not through a mapping: measured on page-cached records of
1.7 MB it is as fast as mapping, checking and copying; what was verified cannot change under the caller's hands (the
kernel may drop a mapped page and read it again); and an I/O error is an exception that names the record, where a
mapping kills the process (SIGBUS).
"""

import errno
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from llama3v.config import EncodeConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.codecs import CODECS, PIXELS, codec_named
from llama3v.feature_cache.index import Index, shard_header_is_whole
from llama3v.feature_cache.layout import (
    CachePaths,
    Manifest,
    differences,
    fingerprint_of,
    fingerprints,
    read_manifest,
)
from llama3v.feature_cache.records import Record, ShardIndex
from llama3v.feature_cache.refs import Refs

if TYPE_CHECKING:
    import torch

READ_ATTEMPTS = 3
RETRY_SECONDS = 0.05  # doubles with every attempt
PIECE_BYTES = 512 << 10  # hashed while it is in the core's cache: measured 15% faster than a whole record at its end
OPEN_SHARDS = 128  # file descriptors kept; a process may usually have 1024


class CacheReader:
    """The committed records of one fingerprint. Safe to use from threads, after fork, and through pickle.

    Args:
        root: the cache's root directory.
        manifest: what the features must depend on (`manifest_of`). A cache of other features is refused with the
            difference, field by field. Without a codec in it, the root must hold such features in exactly one.
        fingerprint: the same as its hash. With neither, the root must hold exactly one fingerprint.

    Raises:
        CacheError: no such cache, a foreign or damaged manifest, a truncated or damaged shard or index.
    """

    def __init__(self, root: Path | str, manifest: Manifest | None = None, fingerprint: str | None = None) -> None:
        self.root = Path(root)
        self.fingerprint = _choose(self.root, manifest, fingerprint)
        self.paths = CachePaths(self.root, self.fingerprint)
        self.manifest: dict[str, Any] = read_manifest(self.paths)
        self._index = Index(self.paths)
        self._files: OrderedDict[str, _ShardFile] = OrderedDict()
        self._files_lock = threading.Lock()
        self._refs: dict[str, Refs] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what was committed since this reader was opened.

        Raises:
            CacheError: a shard or an index is truncated, damaged, missing or foreign.
        """
        self._refs.clear()
        self._index.refresh()
        with self._files_lock:  # a file that is removed takes its space as long as it is open
            for shard in self._files.keys() - self._index.shards.keys():
                del self._files[shard]
        if self._index.broken:
            name, reason = next(iter(self._index.broken.items()))
            more = len(self._index.broken) - 1
            raise CacheError(
                f"shard {name} in {self.paths.shards}: {reason}"
                + (f" (and {more} more shards)" if more else "")
                + "; run `llama3v encode` again to encode anew what it held, or "
                f"`llama3v cache verify {self.root}` to set it aside"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> Iterator[str]:
        """The keys of all logical records, sorted."""
        return (record.key for record in self._index.records())

    def records(self) -> Iterator[Record]:
        """All logical records, sorted by key."""
        return self._index.records()

    def record(self, key: str) -> Record:
        """Grid, shape and place of a record, without reading it.

        Raises:
            CacheError: there is no such record.
        """
        return self._copies(key)[0]

    def read(self, key: str) -> "torch.Tensor":
        """The features of an image: bf16 [n_tiles, tokens, width], in memory of their own.

        Raises:
            CacheError: there is no such record, or every copy of it is damaged. A damaged record is set aside
                (damaged.jsonl), so that the next `llama3v encode` encodes it anew.
        """
        record, data = self._read_verified(key)
        return codec_named(record.dtype).decode(data, record.shape)

    def read_bytes(self, key: str) -> bytes:
        """The verified bytes of a record, as they stand in the shard. Raises as `read`."""
        return self._read_verified(key)[1].tobytes()

    def key_of(self, source_digest: str, image_name: str) -> str | None:
        """The key of an image of a data set by its name; None where the encode pass has not seen it."""
        if source_digest not in self._refs:
            self._refs[source_digest] = Refs(self.paths.refs(source_digest))
        return self._refs[source_digest].key_of(image_name)

    def content_digest(self) -> str:
        """Hash over all logical records (key, grid, checksum): equal for caches with equal content."""
        return content_digest(self._index)

    def close(self) -> None:
        """Close the shards' files; reading opens them again."""
        with self._files_lock:
            self._files.clear()

    def __enter__(self) -> "CacheReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_files_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files_lock = threading.Lock()

    @property
    def _encode(self) -> str:
        """The command that fills this cache, as messages name it."""
        return f"`llama3v encode{encode_option(str(self.manifest.get('codec')))}`"

    def _copies(self, key: str) -> list[Record]:
        copies = self._index.find(key)
        if not copies:
            raise CacheError(
                f"no record of image {key} in {self.paths.directory}; run {self._encode} on the data it belongs to"
            )
        return copies

    def _read_verified(self, key: str) -> tuple[Record, np.ndarray]:
        try:
            return self._read_any_copy(key)
        except _GoneError:  # pruned meanwhile: what was kept stands in a newer shard
            self._index.refresh()
        try:
            return self._read_any_copy(key)
        except _GoneError as error:
            raise CacheError(
                f"record {key}: its shard {error} is missing although it has an index; "
                f"`llama3v cache verify {self.root}` sets it aside, `llama3v encode` then encodes it anew"
            ) from None

    def _read_any_copy(self, key: str) -> tuple[Record, np.ndarray]:
        failures = []
        for record in self._copies(key):
            try:
                return record, self._read_copy(record)
            except _DamageError as error:
                failures.append(f"{error} (shard {record.shard})")
        raise CacheError(
            f"record {key} is damaged: {'; '.join(failures)}; it is set aside: run {self._encode} again on the "
            "data it belongs to, which encodes it anew"
        )

    def _read_copy(self, record: Record) -> np.ndarray:
        """uint8 [bytes]. Raises _DamageError, after setting the record or its shard aside, or _GoneError."""
        wait = RETRY_SECONDS
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                data, checksum = self._fetch(record)
                if checksum == record.checksum:
                    return data
                reason = "its bytes do not match their checksum"
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE):
                    with self._files_lock:
                        self._files.pop(record.shard, None)
                    raise _GoneError(record.shard) from error
                reason = f"it cannot be read ({error.strerror or error})"
            if attempt < READ_ATTEMPTS:
                time.sleep(wait)
                wait *= 2
        raise self._set_aside(record.shard, record.key, reason)

    def _fetch(self, record: Record) -> tuple[np.ndarray, str]:
        """The bytes and their checksum. Raises OSError, also where the file ends early."""
        data, digest = np.empty(record.bytes, dtype=np.uint8), xxhash.xxh3_128()
        view, position = data.data, 0
        descriptor = self._open(record).descriptor
        while position < record.bytes:
            piece = view[position : position + PIECE_BYTES]
            count = os.preadv(descriptor, [piece], record.offset + position)
            if count == 0:
                raise OSError(f"{self.paths.shard(record.shard).name} ends inside it: truncated after it was opened")
            digest.update(piece[:count])
            position += count
        return data, digest.hexdigest()

    def _open(self, record: Record) -> "_ShardFile":
        with self._files_lock:
            file = self._files.get(record.shard)
            if file is not None:
                self._files.move_to_end(record.shard)
                return file
        index = self._index.shards.get(record.shard)
        if index is None:  # another thread set it aside, or found it pruned
            aside = (record.shard, "") in self._index.damaged
            raise _DamageError("its shard was set aside") if aside else _GoneError(record.shard)
        return self._open_new(index)

    def _open_new(self, index: ShardIndex) -> "_ShardFile":
        if not shard_header_is_whole(self.paths, index):
            raise self._set_aside(index.shard, "", "the header of its shard is damaged")
        file = _ShardFile(self.paths.shard(index.shard))
        with self._files_lock:
            self._files[index.shard] = file
            while len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def _set_aside(self, shard: str, key: str, reason: str) -> "_DamageError":
        try:
            self._index.set_aside([(shard, key, reason)])
        except CacheError as error:  # the damage is the news; that it could not be marked is told beside it
            return _DamageError(f"{reason}; {error}")
        return _DamageError(reason)


def encode_option(codec: str) -> str:
    """What `llama3v encode` needs beside its default options to fill a cache of this codec."""
    options = {EncodeConfig.codec: "", PIXELS.name: " --mode pixels"}
    return options.get(codec, f" --codec {codec}")


def content_digest(index: Index) -> str:
    """See `CacheReader.content_digest`."""
    digest = hashlib.blake2b(digest_size=16)
    for record in index.records():
        digest.update(f"{record.key} {record.grid.columns}x{record.grid.rows} {record.checksum}\n".encode())
    return digest.hexdigest()


class _DamageError(Exception):
    """One copy of a record cannot be used."""


class _GoneError(Exception):
    """The shard's file is not there any more; carries its name."""


class _ShardFile:
    """An open shard; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _choose(root: Path, manifest: Manifest | None, fingerprint: str | None) -> str:
    """The fingerprint that is asked for, if the root has it."""
    found = fingerprints(root)
    if manifest is not None and "codec" not in manifest:
        manifest = _with_codec(root, manifest, found)
    wanted = fingerprint_of(manifest) if manifest is not None else fingerprint
    if manifest is not None and fingerprint not in (None, wanted):
        raise CacheError(f"asked for fingerprint {fingerprint} and for a manifest that hashes to {wanted}; give one")
    if wanted is None:
        if len(found) == 1:
            return found[0]
        raise CacheError(
            f"{root} holds {len(found)} fingerprints ({', '.join(found) or 'none'}); say which one: "
            f"`llama3v cache info {root}` shows them in words"
        )
    if wanted in found:
        return wanted
    raise CacheError(f"{root} has no features of this kind: {_why_foreign(root, found, wanted, manifest)}")


def _with_codec(root: Path, manifest: Manifest, found: list[str]) -> Manifest:
    """The manifest with the one codec in which the root has such features; as it is where it has none."""
    manifests = {name: {**manifest, "codec": name} for name in CODECS}
    present = [name for name, candidate in manifests.items() if fingerprint_of(candidate) in found]
    if len(present) > 1:
        raise CacheError(
            f"{root} holds these features in {len(present)} codecs ({', '.join(present)}); say which one to read: "
            f"--codec {present[0]}"
        )
    return manifests[present[0]] if present else manifest


def _why_foreign(root: Path, found: list[str], wanted: str, manifest: Manifest | None) -> str:
    if not found:
        return "it holds no cache at all; run `llama3v encode`"
    if manifest is None:
        return f"asked for fingerprint {wanted}, found {', '.join(found)}"
    phrases = []
    for name in found:
        cached = read_manifest(CachePaths(root, name))
        different = "; ".join(differences(cached, {"codec": cached.get("codec"), **manifest}))
        phrases.append(f"{name} differs in {different}")
    return " | ".join(phrases) + "; encode with these options, or name the vision tower the cache was made with"
