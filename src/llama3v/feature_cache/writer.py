"""Write features. Any number of processes, on any number of hosts, may write to one directory at once.

Records gather in memory and are committed a shard at a time: the shard first, then its index (commit.py). A kill loses
at most the records that were not yet committed. Two writers that race on one image leave two equal records, which
readers take for one.
"""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.codecs import Codec, codec_named
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import (
    CachePaths,
    Manifest,
    fingerprint_of,
    new_shard_name,
    read_manifest,
    write_manifest,
)
from llama3v.feature_cache.orphans import collect_orphans
from llama3v.feature_cache.presence import Presence, enter_as_writer
from llama3v.feature_cache.records import (
    Record,
    checksum_of,
    key_bytes,
    pack_index,
    shard_header,
)
from llama3v.model.slicing import Grid

if TYPE_CHECKING:
    import torch

_BF16_EXPONENT = 0x7F80  # all ones: infinite or NaN


class CacheWriter:
    """Adds records to one fingerprint of a cache.

    As a context manager it commits what is pending on a clean exit, and drops it after an error.

    Args:
        root: the cache's root directory; made if it is not there.
        manifest: what the features depend on (`manifest_of`), their codec included; its hash is the fingerprint.
        shard_bytes: size at which a shard is committed.

    Attributes:
        collected: orphans of dead writers that were removed at the start.
        set_aside: (shard, reason) of damaged shards that were found at the start; what they held is absent now.

    Raises:
        CacheError: the directory cannot be written, or the manifest names no codec.
    """

    def __init__(self, root: Path | str, manifest: Manifest, shard_bytes: int = 256 << 20) -> None:
        self.codec = codec_named(manifest.get("codec"))
        self.fingerprint = fingerprint_of(manifest)
        self.paths = CachePaths(Path(root), self.fingerprint)
        self.shard_bytes = shard_bytes
        self.committed_records = 0
        self.committed_bytes = 0
        self._pending: dict[str, tuple[Record, bytes]] = {}
        self._pending_bytes = 0
        self._quarantined: set[tuple[str, str]] | None = None
        self._index = Index(self.paths)
        try:
            write_manifest(self.paths, manifest)
            read_manifest(self.paths)
            self._presence = self._enter()
            self.collected = collect_orphans(self.paths)
            self._index.refresh()
        except OSError as error:
            raise self._cannot_write(error) from error
        self.set_aside = list(self._index.broken.items())
        self._index.set_aside([(shard, "", reason) for shard, reason in self.set_aside])

    def __contains__(self, key: str) -> bool:
        """Whether a good record of this key is committed (by anyone, as of this writer's last commit) or pending."""
        return key in self._pending or key in self._index

    def __len__(self) -> int:
        """Number of committed logical records, as of this writer's last commit."""
        return len(self._index)

    def add(self, key: str, features: "torch.Tensor", grid: Grid, name: str = "") -> bool:
        """Add the features of one image; commit if the shard is full. (For codec u8 its tiles: uint8.)

        Args:
            key: `image_key` of the image's bytes.
            features: [n_tiles, tokens, width], any float type; rounded to bf16, which the codec then stores. So a record
                does not depend on the type they came in. Tiles in the order of `make_tiles`.
            grid: the image's grid; `grid.tiles` is n_tiles.
            name: name of the image, for messages.

        Returns:
            False if the key is already there: nothing is written then.

        Raises:
            CacheError: NaN or infinite values, a wrong shape, or the shard could not be written.
        """
        import torch

        if self.codec.takes is np.uint8:
            return self.add_bytes(key, features.cpu().numpy(), grid, name)
        stored = features.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        return self.add_bytes(key, stored.view(torch.uint16).numpy(), grid, name)

    def add_bytes(self, key: str, features: np.ndarray, grid: Grid, name: str = "") -> bool:
        """`add` for what is already in bf16: uint16 [n_tiles, tokens, width], the bits of the values. Or, for codec u8,
        tiles: uint8 [n_tiles, pixels, 3]."""
        if key in self:
            return False
        record, data = _make_record(key, features, grid, name, self.codec)
        self._pending[key] = (record, data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= self.shard_bytes:
            self.commit()
        return True

    def quarantine(self, name: str, reason: str) -> None:
        """Note an image that could not be read (by key or by name) in quarantine.jsonl, once.

        Raises:
            CacheError: the note could not be written.
        """
        if self._quarantined is None:
            entries = journal.read(self.paths.quarantine)
            self._quarantined = {(entry["name"], entry["reason"]) for entry in entries}
        if (name, reason) in self._quarantined:
            return
        try:
            journal.append(self.paths.quarantine, [{"name": name, "reason": reason}])
        except OSError as error:
            raise self._cannot_write(error) from error
        self._quarantined.add((name, reason))

    def commit(self) -> int:
        """Make everything that was added durable and visible, as one shard. Returns the number of records.

        Raises:
            CacheError: it could not be written. The records stay pending, so that `commit` may be called again.
        """
        if not self._pending:
            return 0
        try:
            write_shard(self.paths, list(self._pending.values()))
            self._index.refresh()
        except OSError as error:
            raise self._cannot_write(error) from error
        written = len(self._pending)
        self.committed_records += written
        self.committed_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        return written

    def close(self) -> None:
        """Commit what is pending, and let a prune begin."""
        self.commit()
        self._leave()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._leave()

    def _enter(self) -> Presence | None:
        return enter_as_writer(self.paths)  # until `close`, or until this object goes

    def _leave(self) -> None:
        if self._presence is not None:
            self._presence.leave()

    def _cannot_write(self, error: OSError) -> CacheError:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            existing = next(path for path in (self.paths.root, *self.paths.root.parents) if path.exists())
            free = shutil.disk_usage(existing).free >> 20
            reason += f" ({self._pending_bytes >> 20} MiB to write, {free} MiB free)"
        return CacheError(
            f"cannot write to the cache {self.paths.directory}: {reason}; the {len(self._index)} records committed "
            "before are safe. Mend that and run the same command again"
        )


def write_shard(paths: CachePaths, pending: Sequence[tuple[Record, bytes]]) -> str:
    """Commit records with their bytes as one new shard, and return its name. Their offsets and shard are set here.

    Raises:
        OSError: it could not be written; nothing is left then.
    """
    shard = new_shard_name()
    header = shard_header([record for record, _ in pending], paths.fingerprint)
    records, offset = [], len(header)
    for record, _ in pending:
        records.append(replace(record, offset=offset, shard=shard))
        offset += record.bytes
    index = pack_index(shard, paths.fingerprint, records[0].dtype, records, header)
    data = [data for _, data in pending]
    shard_path, index_path = paths.shard(shard), paths.index(shard)
    try:
        # The index is written inside the shard's lock: until it is there, no collector may take the shard away.
        with publish(shard_path, [header, *data], "shard"), publish(index_path, index, "index"):
            pass
    except BaseException:
        if not index_path.exists():
            shard_path.unlink(missing_ok=True)
        raise
    return shard


def _make_record(key: str, features: np.ndarray, grid: Grid, name: str, codec: Codec) -> tuple[Record, bytes]:
    """Check a record's shape and values. Its offset is not known yet."""
    key_bytes(key)
    image = f"image {key} ({name})" if name else f"image {key}"
    if features.dtype != codec.takes or features.ndim != 3 or 0 in features.shape:
        raise CacheError(
            f"features of {image} are {features.dtype} of shape {list(features.shape)}; "
            f"expected {'tiles' if codec.takes is np.uint8 else 'bf16 bits'} ({codec.takes.__name__}) "
            "[n_tiles, tokens, width]"
        )
    if features.shape[0] != grid.tiles:
        raise CacheError(
            f"features of {image} have {features.shape[0]} tiles, and a grid of {grid.columns} x {grid.rows} "
            f"has {grid.tiles} with the overview; give the grid that make_tiles returned"
        )
    not_finite = 0
    if codec.takes is np.uint16:
        not_finite = int(np.count_nonzero((features & _BF16_EXPONENT) == _BF16_EXPONENT))
    if not_finite:
        raise CacheError(
            f"features of {image} have {not_finite} NaN or infinite values of {features.size}; they are not "
            "stored. Look for broken weights, or encode with --precision fp32"
        )
    data = codec.encode(features)
    n_tiles, tokens, width = features.shape
    assert len(data) == codec.bytes_of((n_tiles, tokens, width))
    return Record(key, 0, len(data), (n_tiles, tokens, width), codec.name, grid, checksum_of(data).hex()), data
