"""Where a feature cache keeps what, and the manifest that says which features it holds.

    <root>/<fingerprint>/manifest.json        what the fingerprint is the hash of, in words
                         shards/<uuid>.safetensors, shards/<uuid>.idx       see records.py
                         refs/<source digest>.jsonl, quarantine.jsonl, damaged.jsonl       see journal.py
                         scores/<fingerprint of the text half>/                            see scores_format.py

docs/cache-format.md specifies all of it, for people who write a reader of their own.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama3v.errors import CacheError
from llama3v.feature_cache.commit import host_tag, publish
from llama3v.feature_cache.records import Record

__all__ = ["CachePaths", "Record", "differences", "fingerprint_of", "fingerprints", "manifest_of"]

FORMAT = "llama3v feature cache"
FORMAT_VERSION = 1

Manifest = Mapping[str, Any]


def manifest_of(
    tower: Mapping[str, str], *, tile_size: int, max_tiles: int, codec: str | None = None
) -> dict[str, str]:
    """What features depend on, in words: the one place where a manifest is made.

    Args:
        tower: `VisionTower.fingerprint()`.
        tile_size: side of a tile in pixels.
        max_tiles: most slices of an image beside its overview.
        codec: how values are stored (codecs.py). A writer must say it; a reader may leave it out, and then takes the
            one codec in which the cache has these features.
    """
    from llama3v.model.slicing import SLICING_VERSION

    rest = {"tile_size": str(tile_size), "slicing": SLICING_VERSION, "max_tiles": str(max_tiles)}
    return dict(tower) | rest | ({} if codec is None else {"codec": codec})


def fingerprint_of(manifest: Manifest) -> str:
    """32 hex digits: BLAKE2b (16 bytes) of the manifest as JSON with sorted keys, no spaces, in UTF-8."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(cached: Manifest, asked: Manifest) -> list[str]:
    """One phrase for every field in which two manifests differ."""
    absent = "(absent)"
    return [
        f"{field}: the cache has {cached.get(field, absent)}, asked for {asked.get(field, absent)}"
        for field in sorted({*cached, *asked})
        if cached.get(field, absent) != asked.get(field, absent)
    ]


@dataclass(frozen=True)
class CachePaths:
    """The files of one fingerprint."""

    root: Path
    fingerprint: str

    @property
    def directory(self) -> Path:
        return self.root / self.fingerprint

    @property
    def manifest(self) -> Path:
        return self.directory / "manifest.json"

    @property
    def shards(self) -> Path:
        return self.directory / "shards"

    @property
    def quarantine(self) -> Path:
        return self.directory / "quarantine.jsonl"

    @property
    def damaged(self) -> Path:
        return self.directory / "damaged.jsonl"

    @property
    def scores(self) -> Path:
        return self.directory / "scores"

    def shard(self, name: str) -> Path:
        return self.shards / f"{name}.safetensors"

    def index(self, name: str) -> Path:
        return self.shards / f"{name}.idx"

    def refs(self, source_digest: str) -> Path:
        return self.directory / "refs" / f"{source_digest}.jsonl"


def new_shard_name() -> str:
    """A random UUID (version 4) whose first 8 digits are the host's tag, so that a host knows its own orphans."""
    return str(uuid.UUID(hex=host_tag() + uuid.uuid4().hex[8:]))


def fingerprints(root: Path) -> list[str]:
    """The fingerprints a cache root holds, sorted.

    Raises:
        CacheError: `root` is not a directory.
    """
    if not root.is_dir():
        raise CacheError(f"no feature cache at {root}: it is not a directory; `llama3v encode` makes one")
    return sorted(path.parent.name for path in root.glob("*/manifest.json"))


def write_manifest(paths: CachePaths, manifest: Manifest) -> None:
    """Make sure that manifest.json says what the fingerprint is made of; a damaged one is written anew.

    Raises:
        OSError: the directory cannot be written.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": paths.fingerprint}
    text = json.dumps(content | {"identity": dict(manifest)}, indent=2, ensure_ascii=False) + "\n"
    for directory in (paths.directory, paths.shards, paths.directory / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    if not (paths.manifest.is_file() and paths.manifest.read_bytes() == text.encode()):
        with publish(paths.manifest, [text.encode()], "manifest"):
            pass


def read_manifest(paths: CachePaths) -> dict[str, Any]:
    """The manifest's identity: field -> value, checked against the directory's name.

    Raises:
        CacheError: it is missing, damaged, of a later format, or of another fingerprint.
    """
    mend = "`llama3v encode` with the options of this cache writes it anew"
    try:
        content = json.loads(paths.manifest.read_bytes().decode())
        found = (content["format"], content["format_version"], content["fingerprint"])
        actual = fingerprint_of(content["identity"])
    except OSError as error:
        raise CacheError(f"cannot read {paths.manifest} ({error.strerror}); {mend}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{paths.manifest} is damaged ({error}); {mend}") from error
    if found[:2] != (FORMAT, FORMAT_VERSION):
        raise CacheError(
            f"{paths.manifest} is of format {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} "
            f"version {FORMAT_VERSION}: use the program that wrote it, or encode into another root"
        )
    if not (actual == found[2] == paths.fingerprint):
        raise CacheError(
            f"{paths.manifest} does not belong here: the directory is {paths.fingerprint}, it names {found[2]} and its "
            f"fields hash to {actual}; they were moved or damaged. Move them back, or {mend}"
        )
    return content["identity"]
