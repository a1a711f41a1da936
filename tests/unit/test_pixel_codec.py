"""A cache of tiles: the same records, with pixels in them instead of features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llama3v.errors import CacheError
from llama3v.feature_cache.layout import manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

KEY = "0123456789abcdef" * 2
MANIFEST = manifest_of({}, tile_size=7, max_tiles=4, codec="u8")
TILES = np.random.default_rng(0).integers(0, 256, (3, 49, 3), dtype=np.uint8)  # no multiple of 4 bytes


def test_tiles_come_back_as_they_were(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, MANIFEST) as writer:
        assert writer.add_bytes(KEY, TILES, Grid(2, 1))
        assert writer.add_bytes(KEY[::-1], TILES[:1], Grid(1, 1))
    reader = CacheReader(tmp_path, manifest=MANIFEST)
    assert torch.equal(reader.read(KEY), torch.from_numpy(TILES))
    assert (reader.record(KEY).bytes, reader.record(KEY).grid) == (3 * 49 * 3, Grid(2, 1))
    [shard] = reader.paths.shards.glob("*.safetensors")
    assert np.array_equal(load_file(shard)[KEY], TILES)  # any tool reads them


def test_a_cache_of_tiles_takes_no_features_and_one_of_features_no_tiles(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"expected tiles \(uint8\)"):
        CacheWriter(tmp_path, MANIFEST).add_bytes(KEY, TILES.astype(np.uint16), Grid(2, 1))
    with pytest.raises(CacheError, match=r"expected bf16 bits \(uint16\)"):
        CacheWriter(tmp_path, {**MANIFEST, "codec": "int8"}).add_bytes(KEY, TILES, Grid(2, 1))


def test_tiles_of_another_size_or_slicing_have_another_fingerprint() -> None:
    same = manifest_of({}, tile_size=7, max_tiles=4, codec="u8")
    assert same == MANIFEST
    assert not any(field.startswith("vision") for field in same)
    for change in ({"tile_size": 8}, {"max_tiles": 3}):
        assert manifest_of({}, **{"tile_size": 7, "max_tiles": 4, **change}, codec="u8") != MANIFEST
