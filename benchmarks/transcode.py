"""Another codec's copy of a bf16 feature cache: the records that `llama3v encode --codec` would write, without the tower.

    python -m benchmarks.transcode cache --codec int8 --out cache

For studies of codecs on one set of photographs. A writer rounds to bf16 before it quantises, so what is stored does not
depend on whether features came from the tower or out of a bf16 cache.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from llama3v.errors import CacheError
from llama3v.feature_cache.layout import CachePaths, fingerprint_of, fingerprints, read_manifest
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter


@dataclass
class Options:
    """What to copy."""

    cache: Annotated[Path, tyro.conf.Positional]
    """Root of a feature cache that holds one bf16 fingerprint."""
    out: Path
    """Root of the cache that is written; it may be the same."""
    codec: Literal["int8", "fp8"] = "int8"
    """How the copies are stored."""


def transcode(options: Options) -> dict[str, Any]:
    """Copy every record, and which image of which data set it is; returns {fingerprint, records, bytes}."""
    found = [read_manifest(CachePaths(options.cache, name)) for name in fingerprints(options.cache)]
    sources = [manifest for manifest in found if manifest.get("codec") == "bf16"]
    if len(sources) != 1:
        raise CacheError(f"{options.cache} holds {len(sources)} bf16 fingerprints; give a root that holds one")
    manifest = sources[0]
    reader = CacheReader(options.cache, manifest=manifest, threads=1)
    with CacheWriter(options.out, {**manifest, "codec": options.codec}) as writer:
        for record in reader.records():
            bits = reader.read(record.key).view(torch.uint16).numpy()  # [n_tiles, tokens, width]
            writer.add_bytes(record.key, bits, record.grid)
    for path in (reader.paths.directory / "refs").glob("*.jsonl"):
        shutil.copyfile(path, writer.paths.directory / "refs" / path.name)
    return {
        "fingerprint": fingerprint_of({**manifest, "codec": options.codec}),
        "records": writer.committed_records,
        "bytes": writer.committed_bytes,
    }


if __name__ == "__main__":
    print(transcode(tyro.cli(Options)))
