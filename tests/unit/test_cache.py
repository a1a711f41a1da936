"""The feature cache: what is written is read, what is foreign is refused, what is odd is not stored."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_process import GRID, MANIFEST, RECORD_BYTES, features_of, key_number, write
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.codecs import CODECS
from llama3v.feature_cache.index import SortedKeys
from llama3v.feature_cache.layout import CachePaths, fingerprint_of, manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.records import Record, checksum_of, pack_index, shard_header, unpack_index
from llama3v.feature_cache.refs import RefsWriter
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

KEY = key_number(1)
PATHS = fingerprint_of(MANIFEST)


def flip_first_record(root: Path, shard: str = "*") -> None:
    """Damage the first record of a shard."""
    path = next((root / PATHS / "shards").glob(f"{shard}.safetensors"))
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 8
    path.write_bytes(data)


def signed_features_of(number: int) -> np.ndarray:
    """As `features_of`, with either sign."""
    return features_of(number) | (features_of(number + 1000) << 15)


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 9, 8)
    with CacheWriter(tmp_path, MANIFEST) as writer:
        assert writer.add(KEY, features, GRID)
    with CacheReader(tmp_path, MANIFEST) as reader:
        found = reader.read(KEY)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, features.bfloat16())
        assert list(reader.keys()) == [KEY]
        record = reader.record(KEY)
        assert (record.grid, record.n_tiles, record.shape, record.dtype) == (GRID, 3, (3, 9, 8), "bf16")


def test_features_of_a_batch_may_be_a_slice_and_are_copied(tmp_path: Path) -> None:
    batch = torch.ones(5, 9, 8, dtype=torch.bfloat16)
    with CacheWriter(tmp_path, MANIFEST) as writer:
        writer.add(KEY, batch[1:4], GRID)
        batch.zero_()
    assert torch.equal(CacheReader(tmp_path).read(KEY), torch.ones(3, 9, 8, dtype=torch.bfloat16))


def test_a_shard_opens_with_the_stock_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(str(tmp_path), range(5), records_per_shard=5)
    reader = CacheReader(tmp_path)
    (shard,) = reader.paths.shards.glob("*.safetensors")
    with safe_open(shard, framework="pt") as tensors:
        assert sorted(tensors.keys()) == list(reader.keys())
        for key in reader.keys():  # noqa: SIM118 (a reader is no mapping)
            stored = tensors.get_tensor(key)
            assert stored.dtype == torch.bfloat16
            assert torch.equal(stored.view(torch.uint16), reader.read(key).view(torch.uint16))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", [8, 7])
def test_the_specification_is_enough_to_write_a_reader(tmp_path: Path, codec: str, width: int) -> None:
    with CacheWriter(tmp_path, {**MANIFEST, "codec": codec}, shard_bytes=5 * RECORD_BYTES) as writer:
        for number in range(12):
            writer.add_bytes(key_number(number), signed_features_of(number)[..., :width], GRID)
    reader = CacheReader(tmp_path)
    page = (Path(__file__).parents[2] / "docs/cache-format.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(example, names)
    read = dict(names["read_cache"](reader.paths.directory))
    assert sorted(read) == list(reader.keys())
    assert len(read) == 12
    for key, bits in read.items():
        assert np.array_equal(bits, reader.read(key).view(torch.uint16).numpy())


def test_index_bytes_and_fingerprints_never_change() -> None:
    """Golden values: a cache that was written today must be readable for ever."""
    record = Record(KEY, 4096, 16, (1, 4, 2), "bf16", Grid(1, 1), checksum_of(bytes(16)).hex())
    header = shard_header([record], PATHS)
    assert len(header) == 4096
    packed = b"".join(pack_index("01234567-89ab-4def-8123-456789abcdef", PATHS, "bf16", [record], header))
    assert len(packed) == 96 + 64 + 16
    assert checksum_of(header).hex() == "64d225ad2d7de24312ace93dd330edeb"
    assert packed[-16:].hex() == "9ff64a183e5f2cb73ec9e56eba27bb99"
    assert PATHS == "c95f33d2750a5131d8aa60879e77475c"
    found = unpack_index(packed, "01234567-89ab-4def-8123-456789abcdef", PATHS)
    assert found.record(0) == Record(**{**record.__dict__, "shard": found.shard})


def test_the_fingerprint_depends_on_every_field_and_not_on_their_order() -> None:
    assert fingerprint_of(dict(reversed(MANIFEST.items()))) == PATHS
    assert len({fingerprint_of({**MANIFEST, field: "other"}) for field in MANIFEST} | {PATHS}) == len(MANIFEST) + 1


def test_the_manifest_names_all_that_features_depend_on() -> None:
    manifest = manifest_of({"vision.cut": "2"}, tile_size=42, max_tiles=4, codec="int8")
    assert set(manifest) == {"vision.cut", "tile_size", "slicing", "max_tiles", "codec"}
    assert manifest["max_tiles"] == "4"


def test_a_foreign_manifest_is_refused_with_the_difference_field_by_field(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    asked = {**MANIFEST, "vision.cut": "1", "tile_size": "384"}
    with pytest.raises(CacheError) as caught:
        CacheReader(tmp_path, asked)
    assert "tile_size: the cache has 42, asked for 384" in str(caught.value)
    assert "vision.cut: the cache has 2, asked for 1" in str(caught.value)
    assert "codec" not in str(caught.value)


def test_a_root_with_two_fingerprints_wants_one_named(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    other = {**MANIFEST, "vision.cut": "1"}
    CacheWriter(tmp_path, other)
    with pytest.raises(CacheError, match="holds 2 fingerprints"):
        CacheReader(tmp_path)
    assert len(CacheReader(tmp_path, MANIFEST)) == 1
    assert len(CacheReader(tmp_path, fingerprint=fingerprint_of(other))) == 0
    with pytest.raises(CacheError, match="asked for fingerprint abc"):
        CacheReader(tmp_path, fingerprint="abc")
    with pytest.raises(CacheError, match="no feature cache at"):
        CacheReader(tmp_path / "elsewhere")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_features_that_are_not_finite_in_bf16_are_never_stored(tmp_path: Path, poison: float) -> None:
    features = torch.zeros(3, 9, 8)
    features[1, 4, 2] = poison
    with CacheWriter(tmp_path, MANIFEST) as writer:
        with pytest.raises(CacheError, match=f"{KEY} have 1 NaN or infinite values of 216"):
            writer.add(KEY, features, GRID)
        assert KEY not in writer
    assert len(CacheReader(tmp_path)) == 0


def test_wrong_shapes_grids_and_keys_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, MANIFEST)
    with pytest.raises(CacheError, match="have 2 tiles, and a grid of 2 x 1 has 3"):
        writer.add(KEY, torch.zeros(2, 9, 8), GRID)
    with pytest.raises(CacheError, match=r"shape \[3, 72\]"):
        writer.add(KEY, torch.zeros(3, 72), GRID)
    for key in ("", "photo.jpg", KEY[:-1], "A" * 32, KEY[:-1] + " "):
        with pytest.raises(CacheError, match="is no record key"):
            writer.add(key, torch.zeros(3, 9, 8), GRID)


def test_a_key_is_written_once_and_is_there_from_add_on(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, MANIFEST) as writer:
        assert KEY not in writer
        assert writer.add_bytes(KEY, features_of(1), GRID)
        assert KEY in writer
        assert not writer.add_bytes(KEY, features_of(1), GRID)
        assert writer.commit() == 1
        assert KEY in writer
        assert not writer.add_bytes(KEY, features_of(1), GRID)
        assert writer.commit() == 0
    assert writer.committed_records == 1


def test_a_shard_is_committed_when_it_is_full(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, MANIFEST, shard_bytes=2 * RECORD_BYTES)
    for number in range(5):
        writer.add_bytes(key_number(number), features_of(number), GRID)
    reader = CacheReader(tmp_path)
    assert len(reader) == 4
    assert key_number(4) not in reader
    writer.close()
    reader.refresh()
    assert key_number(4) in reader


def test_an_error_inside_the_with_block_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CacheWriter(tmp_path, MANIFEST) as writer:  # noqa: PT012
        writer.add_bytes(KEY, features_of(1), GRID)
        raise ZeroDivisionError
    assert KEY not in CacheReader(tmp_path)


def test_two_writers_of_one_key_leave_one_logical_record(tmp_path: Path) -> None:
    first, second = CacheWriter(tmp_path, MANIFEST), CacheWriter(tmp_path, MANIFEST)
    for writer in (first, second):
        assert writer.add_bytes(KEY, features_of(1), GRID)
        writer.commit()
    reader = CacheReader(tmp_path)
    assert len(reader) == 1
    assert len(list(reader.paths.shards.glob("*.idx"))) == 2
    assert reader.read_bytes(KEY) == features_of(1).tobytes()
    assert reader.record(KEY).shard == min(path.stem for path in reader.paths.shards.glob("*.idx"))


def test_a_writer_sees_what_others_committed_when_it_commits(tmp_path: Path) -> None:
    first, second = CacheWriter(tmp_path, MANIFEST), CacheWriter(tmp_path, MANIFEST)
    first.add_bytes(KEY, features_of(1), GRID)
    first.commit()
    second.add_bytes(key_number(2), features_of(2), GRID)
    assert KEY not in second
    second.commit()
    assert KEY in second


@pytest.mark.parametrize("codec", CODECS)
def test_the_content_digest_depends_on_content_and_not_on_shards(tmp_path: Path, codec: str) -> None:
    write(str(tmp_path / "one"), range(10), records_per_shard=10, codec=codec)
    write(str(tmp_path / "many"), range(9, -1, -1), records_per_shard=3, codec=codec)
    write(str(tmp_path / "less"), range(9), records_per_shard=3, codec=codec)
    one, many, less = (CacheReader(tmp_path / name).content_digest() for name in ("one", "many", "less"))
    assert one == many != less


def test_a_damaged_record_is_named_set_aside_and_superseded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3v.feature_cache.copies.RETRY_SECONDS", 0)
    write(str(tmp_path), range(3), records_per_shard=3)
    flip_first_record(tmp_path)
    reader, bad = CacheReader(tmp_path), key_number(0)
    with pytest.raises(CacheError) as caught:
        reader.read(bad)
    assert bad in str(caught.value)
    assert reader.record(key_number(1)).shard in str(caught.value)
    assert "llama3v encode" in str(caught.value)
    assert reader.read_bytes(key_number(1)) == features_of(1).tobytes()
    assert bad not in reader
    assert bad not in CacheReader(tmp_path)
    assert write(str(tmp_path), range(3), records_per_shard=3) == 1
    assert CacheReader(tmp_path).read_bytes(bad) == features_of(0).tobytes()


def test_another_copy_stands_in_for_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3v.feature_cache.copies.RETRY_SECONDS", 0)
    writers = CacheWriter(tmp_path, MANIFEST), CacheWriter(tmp_path, MANIFEST)
    for writer in writers:
        writer.add_bytes(KEY, features_of(1), GRID)
        writer.commit()
    reader = CacheReader(tmp_path)
    flip_first_record(tmp_path, reader.record(KEY).shard)
    assert reader.read_bytes(KEY) == features_of(1).tobytes()
    assert reader.paths.damaged.exists()


def test_a_missing_record_says_what_to_run(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    with pytest.raises(CacheError, match=f"no record of image {key_number(7)} .* run `llama3v encode`"):
        CacheReader(tmp_path).read(key_number(7))


def test_refs_find_a_key_by_name_and_the_last_line_counts(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    paths = CachePaths(tmp_path, PATHS)
    for key in (key_number(5), key_number(6)):
        refs = RefsWriter(paths.refs("digest"))
        refs.add("photos/ä b.jpg", key)
        refs.add("second", key_number(9))
        refs.flush()
    reader = CacheReader(tmp_path)
    assert reader.key_of("digest", "photos/ä b.jpg") == key_number(6)
    assert reader.key_of("digest", "second") == key_number(9)
    assert reader.key_of("digest", "unknown") is None
    assert reader.key_of("other digest", "second") is None
    assert len(paths.refs("digest").read_text().splitlines()) == 3
    refs.add("third", KEY)
    refs.flush()
    reader.refresh()
    assert reader.key_of("digest", "third") == KEY


def test_an_image_is_quarantined_once(tmp_path: Path) -> None:
    for _ in range(2):
        writer = CacheWriter(tmp_path, MANIFEST)
        writer.quarantine("a.jpg", "the file is empty")
        writer.quarantine("a.jpg", "the file is empty")
        writer.quarantine("b.jpg", "the file is empty")
    names = [entry["name"] for entry in journal.read(writer.paths.quarantine)]
    assert names == ["a.jpg", "b.jpg"]


def test_a_reader_goes_through_pickle(tmp_path: Path) -> None:
    write(str(tmp_path), range(3), 2)
    reader = CacheReader(tmp_path)
    reader.read_bytes(key_number(2))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read_bytes(key_number(2)) == features_of(2).tobytes()


def test_a_reader_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3v.feature_cache.copies.OPEN_SHARDS", 2)
    write(str(tmp_path), range(8), 1)
    with CacheReader(tmp_path) as reader:
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        for number in [*range(8), *range(8)]:
            assert reader.read_bytes(key_number(number)) == features_of(number).tobytes()
        if before:
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_reading_and_writing_bytes_need_no_torch() -> None:
    code = "import sys, llama3v.feature_cache.reader, llama3v.feature_cache.writer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(st.binary(min_size=16, max_size=16).map(lambda key: b"\0" * 7 + key[7:9] + b"\0" * 7), max_size=40))
def test_sorted_keys_find_every_position_in_order(keys: list[bytes]) -> None:
    halves = np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    index = SortedKeys(halves[:, 0], halves[:, 1])
    assert len(index.first_of_each()) == len(set(keys))
    for key in {*keys, b"\1" * 16}:
        assert index.find(key).tolist() == [place for place, other in enumerate(keys) if other == key]
