"""Records, shards and indexes, as bytes.

A *record* is one image's features, `[n_tiles, tokens, width]`, one contiguous run of bytes in a shard; codecs.py
makes them. A *shard* is a safetensors file that any tool opens. Its *index* says where each record lies and what its
checksum is; a shard counts only once its index is there: the index is the commit record.
"""

import json
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from llama3v.errors import CacheError
from llama3v.feature_cache.codecs import ALL_CODECS, codec_named
from llama3v.model.slicing import Grid

MAGIC = b"L3VIDX\r\n"  # a transfer that rewrites line ends breaks it, as it would break the rest
INDEX_VERSION = 1
SHARD_ALIGNMENT = 4096  # the first record starts on a page, so that direct I/O stays possible
CHECKSUM_BYTES = 16

_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("record_bytes", "<u4"),  # of one row below
        ("records", "<u8"),
        ("shard_bytes", "<u8"),  # size of the shard's file
        ("shard_header_bytes", "<u8"),  # of the shard before its first record
        ("fingerprint", "V16"),
        ("shard", "V16"),  # the shard's UUID
        ("shard_header_checksum", "V16"),
        ("codec", "S8"),
    ]
)
RECORD = np.dtype(
    [
        ("key_high", ">u8"),  # the key's 16 bytes, first half and second half
        ("key_low", ">u8"),
        ("offset", "<u8"),  # from the start of the shard's file
        ("bytes", "<u8"),
        ("checksum", "V16"),
        ("n_tiles", "<u4"),
        ("tokens", "<u4"),
        ("width", "<u4"),
        ("columns", "<u2"),
        ("rows", "<u2"),
    ]
)


_ROW = struct.Struct("<16sQQ16sIIIHH")
"""The same row, for `struct`."""


@dataclass(frozen=True)
class Record:
    """Where one image's features lie, and what they are.

    Attributes:
        key: hash of the image's bytes, 32 hex digits (`llama3v.model.tiles.image_key`).
        offset, bytes: the run of bytes in the shard's file.
        shape: (n_tiles, tokens, width); tokens is the number of patches of a tile.
        dtype: name of the codec: "bf16", "int8" or "fp8".
        checksum: xxh3_128 of the bytes, 32 hex digits.
        shard: name (UUID) of the shard; empty where the record is not yet in one.
    """

    key: str
    offset: int
    bytes: int
    shape: tuple[int, int, int]
    dtype: str
    grid: Grid
    checksum: str
    shard: str = ""

    @property
    def n_tiles(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class ShardIndex:
    """The content of one .idx file."""

    shard: str
    fingerprint: str
    codec: str
    shard_bytes: int
    shard_header_bytes: int
    shard_header_checksum: str
    rows: np.ndarray
    """[records] of dtype `RECORD`."""

    def record(self, number: int) -> Record:
        row = _ROW.unpack(self.rows[number].tobytes())  # ten times as fast as field by field, and on every read's path
        key, offset, size, checksum, n_tiles, tokens, width, columns, rows = row
        shape, grid = (n_tiles, tokens, width), Grid(columns, rows)
        return Record(key.hex(), offset, size, shape, self.codec, grid, checksum.hex(), self.shard)


def checksum_of(data: bytes | memoryview) -> bytes:
    """xxh3_128, seed 0, in its canonical (big-endian) form: 16 bytes."""
    return xxhash.xxh3_128_digest(data)


def key_bytes(key: str) -> bytes:
    """The 16 bytes of a key.

    Raises:
        CacheError: not 32 lower-case hex digits.
    """
    try:
        value = bytes.fromhex(key)
    except ValueError:
        value = b""
    if value.hex() != key or len(value) != 16:
        raise CacheError(f"{key!r} is no record key; expected 32 lower-case hex digits, as image_key(bytes) makes")
    return value


def shard_header(records: Sequence[Record], fingerprint: str) -> bytes:
    """The safetensors header of records that lie one after another in this order, padded to the alignment.

    Safetensors allows spaces after the JSON. Offsets in it count from the end of the header.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "llama3v features", "fingerprint": fingerprint}}
    position = 0
    for record in records:
        for tensor in codec_named(record.dtype).tensors(record.shape):
            entries[record.key + tensor.suffix] = {
                "dtype": tensor.type,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.bytes],
            }
            position += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % SHARD_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def pack_index(shard: str, fingerprint: str, codec: str, records: Sequence[Record], header: bytes) -> list[bytes]:
    """The bytes of an index, in three pieces: header, rows, checksum. Record offsets count from the file's start."""
    rows = np.array([_row(record) for record in records], dtype=RECORD)
    head = np.array(
        [
            (
                MAGIC,
                INDEX_VERSION,
                RECORD.itemsize,
                len(records),
                len(header) + sum(record.bytes for record in records),
                len(header),
                np.void(bytes.fromhex(fingerprint)),
                np.void(uuid.UUID(shard).bytes),
                np.void(checksum_of(header)),
                codec.encode(),
            )
        ],
        dtype=_HEADER,
    )
    pieces = [head.tobytes(), rows.tobytes()]
    return [*pieces, checksum_of(b"".join(pieces))]


def index_bytes(records: int) -> int:
    """Size of an index of that many records."""
    return _HEADER.itemsize + RECORD.itemsize * records + CHECKSUM_BYTES


def _row(record: Record) -> tuple[object, ...]:
    key = key_bytes(record.key)
    place = (int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"), record.offset, record.bytes)
    checksum = np.void(bytes.fromhex(record.checksum))
    return (*place, checksum, *record.shape, record.grid.columns, record.grid.rows)


def unpack_index(data: bytes, shard: str, fingerprint: str) -> ShardIndex:
    """Parse an index and check it against itself and against the name and place it was found under.

    Raises:
        ValueError: what is wrong, as a phrase.
    """
    smallest = _HEADER.itemsize + CHECKSUM_BYTES
    if len(data) < smallest:
        raise ValueError(f"index is truncated: {len(data)} bytes, at least {smallest} expected")
    if checksum_of(memoryview(data)[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError("index does not match its own checksum: truncated or damaged")
    head = np.frombuffer(data, dtype=_HEADER, count=1)[0]
    if head["magic"] != MAGIC or head["version"] != INDEX_VERSION or head["record_bytes"] != RECORD.itemsize:
        raise ValueError(
            f"index is of version {head['version']} with rows of {head['record_bytes']} bytes; "
            f"this program reads version {INDEX_VERSION} with rows of {RECORD.itemsize}"
        )
    found = ShardIndex(
        shard=str(uuid.UUID(bytes=head["shard"].tobytes())),
        fingerprint=head["fingerprint"].tobytes().hex(),
        codec=head["codec"].decode(),
        shard_bytes=int(head["shard_bytes"]),
        shard_header_bytes=int(head["shard_header_bytes"]),
        shard_header_checksum=head["shard_header_checksum"].tobytes().hex(),
        rows=np.frombuffer(data[_HEADER.itemsize : -CHECKSUM_BYTES], dtype=RECORD),
    )
    if len(found.rows) != head["records"]:
        raise ValueError(f"index has {len(found.rows)} rows and announces {head['records']}")
    if (found.fingerprint, found.shard) != (fingerprint, shard):
        raise ValueError(f"index belongs to shard {found.shard} of fingerprint {found.fingerprint}: it was moved here")
    if found.codec not in ALL_CODECS:
        raise ValueError(f"codec {found.codec!r} is unknown; this program reads {', '.join(ALL_CODECS)}")
    return found
