"""`llama3v cache export`: features by image name, for programs that know only safetensors and JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.records import Record
from llama3v.feature_cache.refs import digests_of, keys_named


def export(paths: CachePaths, config: CacheConfig) -> dict[str, Any]:
    """Write <out>/features-00001.safetensors... (key -> bf16 [n_tiles, tokens, width]), and <out>/images.json:

        {"<digest of the data set>": {"<name of the image>": {"key": ..., "file": ..., "grid": [columns, rows]}}}

    Every record is verified as it is read. An image whose record is not exported has no name there.

    Raises:
        CacheError: the directory holds something already; a damaged record; an unknown data set to keep.
        OSError: a file cannot be written.
    """
    assert config.out is not None
    if config.out.exists() and any(config.out.iterdir()):
        raise CacheError(f"{config.out} is not empty; export needs a new directory, or an empty one")
    config.out.mkdir(parents=True, exist_ok=True)
    named = keys_named(paths, digests_of(config.keep)) if config.keep else None
    wanted = None if named is None else {key.ljust(16, b"\0").hex() for keys in named.values() for key in keys.tolist()}
    places: dict[str, tuple[str, Record]] = {}
    with CacheReader(paths.root, fingerprint=paths.fingerprint) as reader:
        for number, records in enumerate(_files(reader, wanted, config), start=1):
            name = f"features-{number:05}.safetensors"
            _write_features(config.out / name, reader, records)
            places.update((record.key, (name, record)) for record in records)
        refs = sorted(paths.directory.glob("refs/*.jsonl")) if named is None else list(named)
        images = {path.stem: dict(_images(path, places)) for path in refs}
        text = json.dumps(images, indent=0, ensure_ascii=False) + "\n"
        with publish(config.out / "images.json", [text.encode(errors="surrogateescape")], "export"):
            pass
        return {
            "records": len(places),
            "bytes": sum(record.bytes for _, record in places.values()),
            "files": len({name for name, _ in places.values()}),
            "images named, by source": {source: len(names) for source, names in images.items()},
            "made from": reader.manifest,
        }


def _files(reader: CacheReader, wanted: set[str] | None, config: CacheConfig) -> Iterator[list[Record]]:
    """The records of each file."""
    file: list[Record] = []
    count = 0
    for record in reader.records():
        if wanted is not None and record.key not in wanted:
            continue
        if count == config.limit:
            break
        count += 1
        if file and sum(other.bytes for other in file) + record.bytes > config.file_mb << 20:
            yield file
            file = []
        file.append(record)
    if file:
        yield file


def _write_features(path: Path, reader: CacheReader, records: list[Record]) -> None:
    from safetensors.torch import save

    features = {record.key: reader.read(record.key) for record in records}
    metadata = {"format": "pt", "fingerprint": reader.fingerprint}
    with publish(path, [save(features, metadata)], "export"):
        pass


def _images(refs: Path, places: dict[str, tuple[str, Record]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, where its features are); a later line of a name replaces an earlier one."""
    for entry in journal.read(refs):
        if entry["key"] in places:
            file, record = places[entry["key"]]
            yield entry["name"], {"key": entry["key"], "file": file, "grid": [record.grid.columns, record.grid.rows]}
