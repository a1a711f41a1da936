"""A prune that is killed, raced or lied to: no record that stays is ever lost, and running it again completes it."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import prune_process
import pytest
from cache_process import MANIFEST, RECORD_BYTES, features_of, key_number, write
from prune_process import FINGERPRINT, KEPT, KEPT_IMAGES, OTHER, PER_SHARD, RECORDS, make_cache, prune

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import commit, tools_prune
from llama3v.feature_cache.commit import CRASH_EXIT_CODE
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.orphans import find_orphans
from llama3v.feature_cache.presence import enter_alone
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.tools import cache
from llama3v.feature_cache.writer import CacheWriter

STEPS = [point for point in commit.CRASH_POINTS if point.startswith(("shard", "index"))]
POINTS = [f"{point}:{time}" for point in (*STEPS, *tools_prune.CRASH_POINTS) for time in (1, 2)]


@pytest.fixture(scope="module")
def run_to_crash() -> Iterator[Callable[[str, Path], int]]:
    """A function that runs a prune up to a crash point, and returns its exit code."""
    command = [sys.executable, prune_process.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(crash_at: str, root: Path) -> int:
            print(crash_at, root, file=stdin, flush=True)
            return int(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("filled") / "cache"
    make_cache(root)
    return root


@pytest.fixture
def root(filled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filled, tmp_path / "cache")


def check_kept(root: Path) -> set[str]:
    """Whatever stays is there and right, and so is everything else that is there. Returns the keys."""
    reader = CacheReader(root, MANIFEST)
    right = {key_number(number): features_of(number).tobytes() for number in range(RECORDS)}
    keys = set(reader.keys())
    assert {key_number(number) for number in KEPT_IMAGES} <= keys
    assert all(reader.read_bytes(key) == right[key] for key in keys)
    return keys


def check_pruned(root: Path) -> None:
    """Nothing but what stays is left, once each, and pruning again changes nothing."""
    assert check_kept(root) == {key_number(number) for number in KEPT_IMAGES}
    paths = CachePaths(root, FINGERPRINT)
    assert list(find_orphans(paths)) == []
    reader = CacheReader(root)
    before = {path: path.stat().st_ino for path in paths.shards.iterdir()}
    assert {path.stem for path in before} == {record.shard for record in reader.records()}
    result = prune(root, KEPT)
    assert (result["bytes freed"], result["bytes to copy"], result["shards of which nothing stays"]) == (0, 0, 0)
    assert {path: path.stat().st_ino for path in paths.shards.iterdir()} == before
    assert cache(CacheConfig("verify", root))[FINGERPRINT]["records"] == len(KEPT_IMAGES)


def test_prune_leaves_exactly_what_the_kept_data_set_names_and_no_used_shard_is_touched(root: Path) -> None:
    paths = CachePaths(root, FINGERPRINT)
    used = next(record.shard for record in CacheReader(root).records() if record.key == key_number(0))
    before = paths.shard(used).stat()
    result = prune(root, KEPT)
    assert result["records that stay"] == len(KEPT_IMAGES)
    assert {reason: found["records"] for reason, found in result["records that go"].items()} == {
        "not named": 6, "duplicates": 1, "set aside": 1,
    }  # fmt: skip
    assert result["data sets forgotten"] == [OTHER]
    if (after := paths.shard(used)).exists():  # else the duplicate of its record 1 stood in the shard that sorts first
        assert after.stat().st_mtime_ns == before.st_mtime_ns
    check_pruned(root)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing_that_stays_and_a_rerun_completes(
    root: Path, run_to_crash: Callable[[str, Path], int], point: str
) -> None:
    fires = point != "prune-refs-removed:2"  # there is one data set to forget
    assert run_to_crash(point, root) == (CRASH_EXIT_CODE if fires else 0)
    check_kept(root)
    assert run_to_crash("never", root) == 0
    check_pruned(root)


def test_kills_at_random_moments_lose_nothing_that_stays(tmp_path: Path) -> None:
    generator = random.Random(0)
    make_cache(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(Path(prune_process.__file__).parent)!r})\n"
    code += f"from prune_process import *; from pathlib import Path; print('go', flush=True); prune(Path({str(tmp_path)!r}), {KEPT!r})"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check_kept(tmp_path)
    prune(tmp_path, KEPT)
    check_pruned(tmp_path)


def test_a_writer_and_a_prune_exclude_each_other(root: Path) -> None:
    writer = CacheWriter(root, MANIFEST)
    with pytest.raises(CacheError, match="is in use: an encode pass"):
        prune(root, KEPT)
    prune(root, KEPT, yes=False)  # looking is no harm
    del writer
    presence, certain = enter_alone(CachePaths(root, FINGERPRINT))
    assert certain
    started = threading.Thread(target=lambda: CacheWriter(root, MANIFEST))
    started.start()
    started.join(0.2)
    assert started.is_alive()  # it waits
    presence.leave()
    started.join(20)
    assert not started.is_alive()


def test_readers_that_were_open_before_read_all_that_stays_and_are_told_what_went(root: Path) -> None:
    unopened, opened = CacheReader(root), CacheReader(root)
    for number in range(RECORDS):
        opened.read_bytes(key_number(number))
    prune(root, KEPT)
    for number in range(RECORDS):
        expected = features_of(number).tobytes()
        assert opened.read_bytes(key_number(number)) == expected  # its files are still open
        if number in KEPT_IMAGES:
            assert unopened.read_bytes(key_number(number)) == expected
        else:
            with pytest.raises(CacheError, match=r"no record of image .* run `llama3v encode`"):
                unopened.read_bytes(key_number(number))
    assert cache(CacheConfig("verify", root))[FINGERPRINT]["damaged"] == []


def test_readers_beside_a_prune_never_miss_or_misread_what_stays(tmp_path: Path) -> None:
    make_cache(tmp_path)
    stop, failures = threading.Event(), []

    def read() -> None:
        reader = CacheReader(tmp_path)
        while not stop.is_set():
            try:
                check_kept(tmp_path)  # a reader that opens now
                for number in KEPT_IMAGES:
                    assert reader.read_bytes(key_number(number)) == features_of(number).tobytes()
                reader.close()
            except (AssertionError, CacheError, OSError) as error:
                failures.append(error)
                return

    def check_kept(root: Path) -> None:
        late = CacheReader(root)
        assert all(key_number(number) in late for number in KEPT_IMAGES)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        prune(tmp_path, KEPT)
        write(str(tmp_path), range(RECORDS), PER_SHARD)  # what went comes back, to be pruned again
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_record_that_was_to_stay_but_is_damaged_is_named_and_set_aside(root: Path) -> None:
    reader = CacheReader(root)
    record = reader.record(key_number(8))  # in a partly used shard
    damage(reader.paths, record.shard, record.offset)
    with pytest.raises(CacheError, match=f"1 records that were to stay are damaged.*{record.key}"):
        prune(root, KEPT)
    left = CacheReader(root)
    assert set(left.keys()) == {key_number(number) for number in KEPT_IMAGES if number != 8}
    with pytest.raises(CacheError, match="no new damage; 1 known images wait"):
        cache(CacheConfig("verify", root))
    write(str(root), range(8, 9), PER_SHARD)
    check_pruned(root)


def test_a_duplicate_saves_a_record_whose_first_copy_is_damaged(root: Path) -> None:
    reader = CacheReader(root)
    first = reader.record(key_number(1))
    damage(reader.paths, first.shard, first.offset)
    with pytest.raises(CacheError, match="1 records that were to stay are damaged"):
        prune(root, KEPT)
    check_pruned(root)


def test_shards_that_are_set_aside_give_their_space_back_once_verify_has_seen_them(root: Path) -> None:
    reader = CacheReader(root)
    shard = reader.record(key_number(0)).shard
    path = reader.paths.index(shard)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"1 damaged shards are not set aside yet.*llama3v cache verify"):
        prune(root, KEPT)
    with pytest.raises(CacheError, match="1 damaged shards"):
        cache(CacheConfig("verify", root))
    write(str(root), range(RECORDS), PER_SHARD)
    size = path.stat().st_size + reader.paths.shard(shard).stat().st_size
    result = prune(root, KEPT)
    assert result["bytes freed"] >= size
    assert not path.exists()
    check_pruned(root)


def test_a_full_disk_stops_a_prune_with_a_clear_error_and_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match=r"prune of .* stopped: No space left on device"):
            prune(root, KEPT)
    check_kept(root)
    prune(root, KEPT)
    check_pruned(root)


def damage(paths: CachePaths, shard: str, offset: int) -> None:
    data = bytearray(paths.shard(shard).read_bytes())
    data[offset + RECORD_BYTES // 2] ^= 4
    paths.shard(shard).write_bytes(data)
