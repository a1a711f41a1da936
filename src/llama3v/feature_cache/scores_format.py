"""Pair scores on disk: small files that are written once, each its own commit record.

    <fingerprint>/scores/<fingerprint of the text half>/manifest.json      what the scores depend on, in words
                                                        <uuid>.scores      scores of many pairs
                                                        damaged.jsonl      files that are set aside

A score belongs to an image (by its record's key), a text (by its hash) and what computed it. docs/cache-format.md
specifies it to the byte.
"""

import hashlib
import json
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.layout import CachePaths, fingerprint_of
from llama3v.feature_cache.records import CHECKSUM_BYTES, checksum_of, key_bytes

FORMAT = "llama3v pair scores"
FORMAT_VERSION = 1
MAGIC = b"L3VSCR\r\n"
SUFFIX = ".scores"

_HEADER = struct.Struct(
    "<8sIIQ16s16s16s"
)  # magic, version, bytes of a row, rows, features, text half, name of the file
ROW = np.dtype(
    [
        ("pair", "S32"),  # key of the image, hash of the text
        ("score", "<f4"),
        ("pieces", "<u4"),  # in which the text was read
    ]
)


class Score(NamedTuple):
    """The probability that an image and a text belong together, and in how many pieces the text was read."""

    value: float
    pieces: int


@dataclass(frozen=True)
class ScorePaths:
    """The files of one text half. `scorer` is its fingerprint."""

    features: CachePaths
    scorer: str

    @property
    def directory(self) -> Path:
        return self.features.scores / self.scorer

    @property
    def manifest(self) -> Path:
        return self.directory / "manifest.json"

    @property
    def damaged(self) -> Path:
        return self.directory / "damaged.jsonl"

    def file(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"


def scored_by(features: CachePaths) -> list[ScorePaths]:
    """The text halves that have scored pairs of a cache, sorted."""
    found = sorted(path.parent.name for path in features.scores.glob("*/manifest.json"))
    return [ScorePaths(features, name) for name in found]


def pair_bytes(key: str, text: str) -> bytes:
    """What a pair is known by: the key and the BLAKE2b (16 bytes) of the text in UTF-8."""
    return key_bytes(key) + hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def write_score_manifest(paths: ScorePaths, identity: Mapping[str, str]) -> None:
    """Make sure that manifest.json says what the scores depend on. Raises OSError."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": paths.scorer}
    text = json.dumps(content | {"features": paths.features.fingerprint, "identity": dict(identity)}, indent=2) + "\n"
    paths.directory.mkdir(parents=True, exist_ok=True)
    if not (paths.manifest.is_file() and paths.manifest.read_bytes() == text.encode()):
        with publish(paths.manifest, [text.encode()], "scores-manifest"):
            pass


def read_score_manifest(paths: ScorePaths) -> dict[str, str]:
    """What the scores depend on, in words.

    Raises:
        CacheError: it is missing, damaged, of another version, or belongs elsewhere.
    """
    try:
        content = json.loads(paths.manifest.read_bytes().decode())
        found = (content["format"], content["format_version"], content["features"], fingerprint_of(content["identity"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{paths.manifest} is missing or damaged ({error}); `llama3v encode --score` writes it anew"
        ) from error
    expected = (FORMAT, FORMAT_VERSION, paths.features.fingerprint, paths.scorer)
    if found != expected:
        raise CacheError(
            f"{paths.manifest} does not belong here: expected {expected}, found {found}; it was moved, damaged or is of "
            "another version. Remove its directory and run `llama3v encode --score`"
        )
    return content["identity"]


def pack_scores(paths: ScorePaths, name: str, rows: np.ndarray) -> list[bytes]:
    """The bytes of a file, in pieces: header, rows, checksum."""
    owners = (bytes.fromhex(paths.features.fingerprint), bytes.fromhex(paths.scorer), uuid.UUID(name).bytes)
    pieces = [_HEADER.pack(MAGIC, FORMAT_VERSION, ROW.itemsize, len(rows), *owners), rows.tobytes()]
    return [*pieces, checksum_of(b"".join(pieces))]


def unpack_scores(data: bytes, paths: ScorePaths, name: str) -> np.ndarray:
    """[rows] of dtype `ROW`, checked against the file's checksum and the place it was found in.

    Raises:
        ValueError: what is wrong, as a phrase.
    """
    smallest = _HEADER.size + CHECKSUM_BYTES
    if len(data) < smallest:
        raise ValueError(f"it is truncated: {len(data)} bytes, at least {smallest} expected")
    if checksum_of(memoryview(data)[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError("it does not match its own checksum: truncated or damaged")
    magic, version, row_bytes, count, features, scorer, own_name = _HEADER.unpack_from(data)
    if (magic, version, row_bytes) != (MAGIC, FORMAT_VERSION, ROW.itemsize):
        raise ValueError(
            f"it is of version {version} with rows of {row_bytes} bytes; this program reads {FORMAT_VERSION}"
        )
    if (features.hex(), scorer.hex(), own_name) != (paths.features.fingerprint, paths.scorer, uuid.UUID(name).bytes):
        raise ValueError("it belongs to another place: it was moved here")
    rows = np.frombuffer(data[_HEADER.size : -CHECKSUM_BYTES], dtype=ROW)
    if len(rows) != count:
        raise ValueError(f"it has {len(rows)} rows and announces {count}")
    return rows
