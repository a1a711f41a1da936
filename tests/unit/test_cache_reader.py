"""Reading several records at once: the same features, the same errors, in bounded memory."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_process import GRID, features_of, key_number, manifest_in, write
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3v.errors import CacheError
from llama3v.feature_cache import copies, journal
from llama3v.feature_cache.buffers import Buffers
from llama3v.feature_cache.codecs import ALL_CODECS, CODECS
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid

ROOT = Path(__file__).parents[2]
RECORDS = 12
KEYS = [key_number(number) for number in range(RECORDS)]


@pytest.fixture(autouse=True)
def threads_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3v.feature_cache.reader.WORTH_THREADS", 0)
    monkeypatch.setattr(copies, "RETRY_SECONDS", 0)


def write_two_shapes(root: Path, codec: str) -> None:
    """Records of three tiles and of one, in several shards."""
    with CacheWriter(root, manifest_in(codec), shard_bytes=1000) as writer:
        for number, key in enumerate(KEYS):
            grid = GRID if number % 2 else Grid(1, 1)
            features = features_of(number)[: grid.tiles]
            writer.add_bytes(key, features.astype(np.uint8) if codec == "u8" else features, grid)


def damage(root: Path, *numbers: int) -> None:
    """Flip a bit of the first copy of these records."""
    reader = CacheReader(root)
    for record in [reader.record(key_number(number)) for number in numbers]:
        with reader.paths.shard(record.shard).open("r+b") as file:
            file.seek(record.offset + record.bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))


# The same features


@pytest.mark.parametrize("codec", ALL_CODECS)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_several_at_once_are_those_that_are_read_one_by_one(tmp_path: Path, codec: str, threads: int) -> None:
    write_two_shapes(tmp_path, codec)
    with CacheReader(tmp_path, threads=threads) as reader:
        for keys in (KEYS, KEYS[::-1], [KEYS[3], KEYS[0], KEYS[3]], KEYS[5:6]):
            one_by_one = [reader.read(key) for key in keys]
            assert torch.equal(reader.read_many(keys), torch.cat(one_by_one))
            each = list(reader.read_each(keys))
            assert len(each) == len(keys)
            assert all(map(torch.equal, each, one_by_one))


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_read_stays_as_it_is_while_more_is_read(tmp_path: Path, codec: str) -> None:
    write_two_shapes(tmp_path, codec)
    reader = CacheReader(tmp_path, threads=3)
    kept = [reader.read_many(KEYS[number : number + 3]) for number in range(RECORDS - 3)]
    before = [tensor.clone() for tensor in kept]
    for _ in range(20):
        reader.read_many(KEYS)
        list(reader.read_each(KEYS))
    assert all(map(torch.equal, kept, before))


def test_records_of_another_size_of_tile_are_refused_together(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, manifest_in("bf16")) as writer:
        writer.add_bytes(KEYS[0], features_of(0), GRID)
        writer.add_bytes(KEYS[1], features_of(1)[:, :4], GRID)
    with pytest.raises(CacheError, match=rf"{KEYS[0]} and {KEYS[1]} have tiles of 9 x 8 and 4 x 8"):
        CacheReader(tmp_path).read_many(KEYS[:2])


def test_reading_ahead_is_by_one_record_for_each_thread(tmp_path: Path) -> None:
    write(str(tmp_path), range(RECORDS), 4)
    asked: list[str] = []

    def keys() -> Iterator[str]:
        for key in KEYS:
            asked.append(key)
            yield key

    features = CacheReader(tmp_path, threads=3).read_each(keys())
    assert asked == []
    next(features)
    assert len(asked) == 4
    next(features)
    assert len(asked) == 5
    features.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_a_reader_may_be_used_from_threads_that_push_one_anothers_files_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "OPEN_SHARDS", 1)
    write(str(tmp_path), range(RECORDS), 1)
    reader = CacheReader(tmp_path, threads=3)
    right = [features_of(number) for number in range(RECORDS)]

    def look(first: int) -> bool:
        order = [(first + step) % RECORDS for step in range(RECORDS)]
        found = reader.read_many([KEYS[number] for number in order]).view(torch.uint16).numpy()
        return np.array_equal(found, np.concatenate([right[number] for number in order]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(100)))


def test_a_reader_that_was_pickled_or_forked_reads_several_at_once(tmp_path: Path) -> None:
    write(str(tmp_path), range(RECORDS), 4)
    reader = CacheReader(tmp_path, threads=3)
    expected = reader.read_many(KEYS)
    assert torch.equal(pickle.loads(pickle.dumps(reader)).read_many(KEYS), expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(reader.read_many(KEYS), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The same errors


@pytest.mark.parametrize("threads", [1, 3])
def test_all_damaged_records_among_several_are_set_aside_at_once(tmp_path: Path, threads: int) -> None:
    write(str(tmp_path), range(RECORDS), 4)
    damage(tmp_path, 2, 5, 9)
    reader = CacheReader(tmp_path, threads=threads)
    message = rf"record {KEYS[2]} is damaged: its bytes do not match their checksum .* \(and 2 more of them\)"
    with pytest.raises(CacheError, match=message):
        reader.read_many(KEYS)
    assert {entry["key"] for entry in journal.read(reader.paths.damaged)} == {KEYS[2], KEYS[5], KEYS[9]}
    assert sorted(CacheReader(tmp_path).keys()) == sorted(set(KEYS) - {KEYS[2], KEYS[5], KEYS[9]})
    assert write(str(tmp_path), range(RECORDS), 4) == 3
    right = np.concatenate([features_of(number) for number in range(RECORDS)])
    assert np.array_equal(CacheReader(tmp_path).read_many(KEYS).view(torch.uint16).numpy(), right)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_record_is_an_error_at_its_turn(tmp_path: Path, threads: int) -> None:
    write(str(tmp_path), range(RECORDS), 4)
    damage(tmp_path, 4)
    features = CacheReader(tmp_path, threads=threads).read_each(KEYS)
    for number, found in enumerate(islice(features, 4)):
        assert np.array_equal(found.view(torch.uint16).numpy(), features_of(number))
    with pytest.raises(CacheError, match=rf"record {KEYS[4]} is damaged"):
        next(features)


def test_another_copy_stands_in_for_a_damaged_one_among_several(tmp_path: Path) -> None:
    first = CacheWriter(tmp_path, manifest_in("bf16"))
    second = CacheWriter(tmp_path, manifest_in("bf16"))
    for writer in (first, second):
        for number in range(4):
            writer.add_bytes(KEYS[number], features_of(number), GRID)
        writer.close()
    damage(tmp_path, 0, 1, 2, 3)
    found = CacheReader(tmp_path, threads=3).read_many(KEYS[:4]).view(torch.uint16).numpy()
    assert np.array_equal(found, np.concatenate([features_of(number) for number in range(4)]))


def test_a_missing_record_among_several_is_named(tmp_path: Path) -> None:
    write(str(tmp_path), range(3), 4)
    with pytest.raises(CacheError, match=rf"no record of image {KEYS[7]} .*run `llama3v encode`"):
        CacheReader(tmp_path).read_many([KEYS[0], KEYS[7]])


def test_threads_that_set_records_aside_at_once_mark_each_of_them_once(tmp_path: Path) -> None:
    write(str(tmp_path), range(60), 5)
    damage(tmp_path, *range(60))
    reader = CacheReader(tmp_path, threads=8)
    with pytest.raises(CacheError, match="59 more"):
        reader.read_many([key_number(number) for number in range(60)])
    keys = [entry["key"] for entry in journal.read(reader.paths.damaged)]
    assert len(keys) == len(set(keys)) == 60
    assert len(reader) == 0


# Memory


def test_memory_is_lent_again_only_when_nothing_shares_it() -> None:
    buffers = Buffers()

    def address(array: np.ndarray) -> int:
        return array.ctypes.data

    lent = buffers.take(10_000)
    place = address(lent)
    assert place % 4096 == 0
    del lent
    lent = buffers.take(9_000)
    assert address(lent) == place
    parts = [lent[5:6], torch.from_numpy(lent[8:16]).view(torch.bfloat16), memoryview(lent)]  # type: ignore[list-item]
    parts.append(lent.view(np.uint32)[1:].reshape(-1, 1)[::2])
    parts.append(parts[1][1:].numpy)  # type: ignore[union-attr]
    del lent
    while parts:
        assert address(buffers.take(9_000)) != place
        parts.pop()
    assert place in {address(array) for array in [buffers.take(9_000) for _ in range(2)]}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60_000)), max_size=60))
def test_what_is_lent_never_overlaps_and_little_is_kept(asks: list[tuple[int, int]]) -> None:
    buffers, most = Buffers(idle_bytes=100_000), 0
    lent: dict[int, np.ndarray] = {}
    for number, (place, size) in enumerate(asks):
        lent.pop(place, None)
        lent[place] = buffers.take(size)
        assert lent[place].shape == (size,)
        lent[place][:] = number
        spans = sorted((array.ctypes.data, array.ctypes.data + len(array)) for array in lent.values() if len(array))
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        most = max(most, buffers._lent)
        assert buffers._lent + buffers._idle_bytes <= most
    kept = [(place, int(array[0])) for place, array in lent.items() if len(array)]
    assert all(np.all(lent[place] == value) for place, value in kept)
    lent.clear()
    idle = [memory for some in buffers._idle.values() for memory in some]
    assert not buffers._returned
    assert buffers._lent == 0
    assert sum(map(len, idle)) == buffers._idle_bytes <= 100_000


def test_reading_ten_times_the_memory_needs_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import cache_memory

    features = np.zeros((3, 512, 1024), dtype=np.uint16)
    with CacheWriter(tmp_path, manifest_in("bf16"), shard_bytes=16 << 20) as writer:
        for number in range(16):
            features[:] = number
            writer.add_bytes(key_number(number), features[: 1 + 2 * (number % 2)], GRID if number % 2 else Grid(1, 1))
    limit = 44 << 20  # of which the stacks of two threads take 16
    found = cache_memory.measure(tmp_path, limit, rounds=14)
    assert found["read"] > 10 * limit
    assert found["grown"] < limit / 2
