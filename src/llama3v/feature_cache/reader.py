"""Read features back: each record one contiguous run of bytes, and its checksum verified every time."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache.buffers import Buffers
from llama3v.feature_cache.codecs import codec_named
from llama3v.feature_cache.copies import Copies, DamageError, GoneError
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths, Manifest, read_manifest
from llama3v.feature_cache.records import Record
from llama3v.feature_cache.refs import Refs
from llama3v.feature_cache.selection import choose_fingerprint, encode_option

if TYPE_CHECKING:
    import torch

MOST_THREADS = 4
"""By default: memory is no faster for more, and a network disk has something to do for that many."""
WORTH_THREADS = 1 << 20
"""Bytes for which it is worth to start them, which takes a tenth of a millisecond each."""


class CacheReader:
    """The committed records of one fingerprint. Safe to use from threads, after fork, and through pickle.

    Args:
        root: the cache's root directory.
        manifest: what the features must depend on (`manifest_of`). A cache of other features is refused with the
            difference, field by field. Without a codec in it, the root must hold such features in exactly one.
        fingerprint: the same as its hash. With neither, the root must hold exactly one fingerprint.
        threads: that read at a time where several records are asked for (default: as many as there are cores, at most
            `MOST_THREADS`). Reading and hashing let other threads run meanwhile.

    Raises:
        CacheError: no such cache, a foreign or damaged manifest, a truncated or damaged shard or index.
    """

    def __init__(
        self,
        root: Path | str,
        manifest: Manifest | None = None,
        fingerprint: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.fingerprint = choose_fingerprint(self.root, manifest, fingerprint)
        self.paths = CachePaths(self.root, self.fingerprint)
        self.manifest: dict[str, Any] = read_manifest(self.paths)
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self._index = Index(self.paths)
        self._files = Copies(self._index)
        self._buffers = Buffers()
        self._refs: dict[str, Refs] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what was committed since this reader was opened.

        Raises:
            CacheError: a shard or an index is truncated, damaged, missing or foreign.
        """
        self._refs.clear()
        self._index.refresh()
        self._files.forget_removed()
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
        """The features of an image: bf16 [n_tiles, tokens, width] (of codec u8 its tiles: uint8), in memory of their own.

        Raises:
            CacheError: there is no such record, or every copy of it is damaged. A damaged record is set aside
                (damaged.jsonl), so that the next `llama3v encode` encodes it anew.
        """
        copies = self._copies(key)
        memory = self._buffers.take(_decoded_bytes(copies[0]))
        self._fill(memory, copies)
        return codec_named(copies[0].dtype).as_tensor(memory, copies[0].shape)

    def read_many(self, keys: Sequence[str]) -> "torch.Tensor":
        """The features of several images, one after another: bf16 [tiles of all, tokens, width], as `torch.cat` of what
        `read` gives. They are read by several threads, straight to where they belong.

        Raises as `read`, after all that can be read was read: so every damaged record among them is set aside.
        """
        found = [self._copies(key) for key in keys]
        records = [copies[0] for copies in found]
        shape = _joint_shape(records)
        sizes = [_decoded_bytes(record) for record in records]
        memory = self._buffers.take(sum(sizes))
        parts = [memory[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        threads = min(self.threads, len(keys)) if len(memory) >= WORTH_THREADS else 1
        if threads == 1:
            outcomes = list(map(self._try_to_fill, parts, found))
        else:
            with ThreadPoolExecutor(threads, "read") as pool:
                outcomes = list(pool.map(self._try_to_fill, parts, found))
        if errors := [error for error in outcomes if error is not None]:
            raise CacheError(f"{errors[0]}" + (f" (and {len(errors) - 1} more of them)" if errors[1:] else ""))
        return codec_named(records[0].dtype).as_tensor(memory, shape)

    def read_each(self, keys: Iterable[str]) -> Iterator["torch.Tensor"]:
        """The features of each image, in this order, as `read` gives them. Several threads read ahead, by one record each.

        Raises as `read`, at its turn.
        """
        if self.threads == 1:
            yield from map(self.read, keys)
            return
        with ThreadPoolExecutor(self.threads, "read") as pool:
            ahead: deque[Future[torch.Tensor]] = deque()
            try:
                for key in keys:
                    ahead.append(pool.submit(self.read, key))
                    if len(ahead) > self.threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def read_bytes(self, key: str) -> bytes:
        """The verified bytes of a record, as they stand in the shard. Raises as `read`."""
        copies = self._copies(key)
        memory = self._buffers.take(copies[0].bytes)
        self._read_verified(copies, memory)
        return memory.tobytes()

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
        self._files.close()

    def __enter__(self) -> "CacheReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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

    def _fill(self, memory: np.ndarray, copies: Sequence[Record]) -> None:
        """Put the features of a record that has these copies into `memory` (uint8 [decoded bytes])."""
        record = copies[0]
        codec = codec_named(record.dtype)
        if codec.is_plain:
            return self._read_verified(copies, memory)
        data = self._buffers.take(record.bytes)
        self._read_verified(copies, data)
        codec.decode(data, record.shape, memory)

    def _try_to_fill(self, memory: np.ndarray, copies: Sequence[Record]) -> CacheError | None:
        try:
            self._fill(memory, copies)
        except CacheError as error:
            return error
        return None

    def _read_verified(self, copies: Sequence[Record], memory: np.ndarray) -> None:
        """The bytes of a record in `memory` (uint8 [bytes])."""
        try:
            return self._read_any(copies, memory)
        except GoneError:  # pruned meanwhile: what was kept stands in a newer shard
            self._index.refresh()
        key = copies[0].key
        try:
            return self._read_any(self._copies(key), memory)
        except GoneError as error:
            raise CacheError(
                f"record {key}: its shard {error} is missing although it has an index; "
                f"`llama3v cache verify {self.root}` sets it aside, `llama3v encode` then encodes it anew"
            ) from None

    def _read_any(self, copies: Sequence[Record], memory: np.ndarray) -> None:
        failures = []
        for record in copies:
            try:
                if record.bytes != len(memory):
                    raise DamageError(f"it has {record.bytes} bytes, and another copy {len(memory)}")
                return self._files.read(record, memory)
            except DamageError as error:
                failures.append(f"{error} (shard {record.shard})")
        raise CacheError(
            f"record {copies[0].key} is damaged: {'; '.join(failures)}; it is set aside: run {self._encode} again on the "
            "data it belongs to, which encodes it anew"
        )


def content_digest(index: Index) -> str:
    """See `CacheReader.content_digest`."""
    digest = hashlib.blake2b(digest_size=16)
    for record in index.records():
        digest.update(f"{record.key} {record.grid.columns}x{record.grid.rows} {record.checksum}\n".encode())
    return digest.hexdigest()


def _decoded_bytes(record: Record) -> int:
    return codec_named(record.dtype).decoded_bytes(record.shape)


def _joint_shape(records: Sequence[Record]) -> tuple[int, int, int]:
    """(tiles of all, tokens, width).

    Raises:
        CacheError: they are of different sizes.
    """
    _, tokens, width = records[0].shape
    for record in records:
        if record.shape[1:] != (tokens, width):
            raise CacheError(
                f"records {records[0].key} and {record.key} have tiles of {tokens} x {width} and "
                f"{record.shape[1]} x {record.shape[2]}; those of one fingerprint are alike, so one of them is wrong"
            )
    return sum(record.n_tiles for record in records), tokens, width
