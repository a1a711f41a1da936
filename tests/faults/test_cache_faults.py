"""Faults injected into the feature cache: kills, flipped bits, truncation, races, full disks, I/O errors.

The property everywhere: no committed-but-wrong record, no lost committed record, and the same command completes.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cache_process
import pytest
from cache_process import GRID, MANIFEST, RECORD_BYTES, features_of, key_number, manifest_in, write

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.codecs import codec_named
from llama3v.feature_cache.commit import CRASH_EXIT_CODE, CRASH_POINTS, CRASH_VARIABLE, TEMPORARY
from llama3v.feature_cache.layout import CachePaths, fingerprint_of
from llama3v.feature_cache.orphans import collect_orphans, find_orphans
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.refs import Refs, RefsWriter
from llama3v.feature_cache.tools import cache
from llama3v.feature_cache.writer import CacheWriter

FINGERPRINT = fingerprint_of(MANIFEST)
RECORDS = 10
PER_SHARD = 4


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, cache_process.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def run_to_crash() -> Iterator[Callable[..., int]]:
    """A function that runs a writer up to a crash point, and returns its exit code."""
    command = [sys.executable, cache_process.__file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(crash_at: str, *arguments: object) -> int:
            print(crash_at, *arguments, file=stdin, flush=True)
            return int(stdout.readline())

        yield run
        stdin.close()


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def check_records(root: Path, least: int, codec: str = "bf16") -> int:
    """Every record that a reader sees is right, and there are at least so many. Returns how many."""
    manifest = manifest_in(codec)
    if not CachePaths(root, fingerprint_of(manifest)).manifest.exists():
        assert least == 0
        return 0
    reader = CacheReader(root, manifest)
    right = {key_number(number): codec_named(codec).encode(features_of(number)) for number in range(RECORDS)}
    found = list(reader.keys())
    assert all(reader.read_bytes(key) == right[key] for key in found)
    assert len(found) >= least
    return len(found)


# One commit of the first shard, one of the second: a kill at the second must keep the first.
@pytest.mark.parametrize("time_passed", [1, 2])
@pytest.mark.parametrize("point", [point for point in CRASH_POINTS if not point.startswith("journal")])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_kill_at_any_point_of_a_commit_leaves_right_records_and_a_rerun_completes(
    tmp_path: Path, run_to_crash: Callable[..., int], codec: str, point: str, time_passed: int
) -> None:
    paths = CachePaths(tmp_path, fingerprint_of(manifest_in(codec)))
    if point.startswith("manifest") and time_passed == 2:
        time_passed = 1
        write(str(tmp_path), range(3), PER_SHARD, codec=codec)  # killed while it mends the manifest of a filled cache
        paths.manifest.unlink()
    assert run_to_crash(f"{point}:{time_passed}", tmp_path, 0, RECORDS, PER_SHARD, codec) == CRASH_EXIT_CODE
    check_records(tmp_path, PER_SHARD if time_passed == 2 else 0, codec)
    write(str(tmp_path), range(RECORDS), PER_SHARD, codec=codec)
    assert check_records(tmp_path, RECORDS, codec) == RECORDS
    assert list(find_orphans(paths)) == []
    assert write(str(tmp_path), range(RECORDS), PER_SHARD, codec=codec) == 0


def test_kills_at_random_moments_lose_no_committed_record_and_reruns_complete(tmp_path: Path) -> None:
    generator, committed = random.Random(0), 0
    for _ in range(8):
        process = start(tmp_path, 0, RECORDS, 1, 0.01)
        time.sleep(generator.uniform(0.1, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        committed = check_records(tmp_path, committed)
    write(str(tmp_path), range(RECORDS), 1)
    assert check_records(tmp_path, RECORDS) == RECORDS
    reader = CacheReader(tmp_path)
    assert sum(1 for _ in reader.paths.shards.glob("*.idx")) == RECORDS  # nothing was written twice


@pytest.mark.parametrize("point", ["journal-half-written", "journal-written"])
def test_a_kill_inside_a_journal_tears_at_most_its_last_line(tmp_path: Path, point: str) -> None:
    path = tmp_path / "refs.jsonl"
    code = (
        f"import pathlib; from llama3v.feature_cache import journal; p = pathlib.Path({str(path)!r});"
        "[journal.append(p, [{'name': n, 'key': 'ab'}]) for n in ('one', 'two')]"
    )
    environment = {**os.environ, CRASH_VARIABLE: f"{point}:2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == CRASH_EXIT_CODE
    journal.append(path, [{"name": "two", "key": "ab"}, {"name": "three", "key": "cd"}])
    names = [entry["name"] for entry in journal.read(path)]
    assert names[0] == "one"
    assert names[-2:] == ["two", "three"]
    assert set(names) == {"one", "two", "three"}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged bytes are read three times; without the waits between."""
    monkeypatch.setattr("llama3v.feature_cache.copies.RETRY_SECONDS", 0)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("suffix", ["safetensors", "idx"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_any_flipped_bit_of_a_shard_or_index_is_detected_named_and_encoded_anew(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    write(str(tmp_path), range(RECORDS), PER_SHARD, codec=codec)
    paths = CachePaths(tmp_path, fingerprint_of(manifest_in(codec)))
    files = sorted(paths.shards.glob(f"*.{suffix}"))
    generator = random.Random(suffix)
    for _ in range(30):
        path = generator.choice(files)
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(CacheError, match=path.stem):
            read_all(tmp_path, codec)
        with CacheWriter(tmp_path, manifest_in(codec)) as writer:
            missing = [number for number in range(RECORDS) if key_number(number) not in writer]
            assert missing, f"bit {bit} of {path.name} was noticed, but nothing is encoded anew"
            for number in missing:
                writer.add_bytes(key_number(number), features_of(number), GRID)
        assert check_records(tmp_path, RECORDS, codec) == RECORDS
        flip(path, bit)  # back to the first state, for the next bit
        paths.damaged.unlink()
        for extra in set(paths.shards.iterdir()) - {
            file.with_suffix(end) for file in files for end in (".idx", ".safetensors")
        }:
            extra.unlink()


@pytest.mark.parametrize("suffix", ["safetensors", "idx"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_verify_finds_any_flipped_bit_and_is_content_once_it_is_encoded_anew(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    generator = random.Random(suffix)
    for number in range(8):
        root = tmp_path / str(number)  # of its own: a mended shard holds bytes that no record needs any more
        paths = CachePaths(root, fingerprint_of(manifest_in(codec)))
        write(str(root), range(RECORDS), PER_SHARD, codec=codec)
        live = sorted({record.shard for record in CacheReader(root).records()})
        path = paths.shards / f"{generator.choice(live)}.{suffix}"
        flip(path, generator.randrange(8 * path.stat().st_size))
        with pytest.raises(CacheError, match=f"1 damaged (records|shards): .* in shard {path.stem}"):
            cache(CacheConfig("verify", root))
        write(str(root), range(RECORDS), PER_SHARD, codec=codec)
        result = cache(CacheConfig("verify", root))[paths.fingerprint]
        assert (result["records"], result["damaged"]) == (RECORDS, [])
        assert check_records(root, RECORDS, codec) == RECORDS


def read_all(root: Path, codec: str) -> None:
    reader = CacheReader(root, manifest_in(codec))
    for number in range(RECORDS):
        reader.read_bytes(key_number(number))


def test_any_flipped_bit_of_a_manifest_is_detected_or_harmless_and_the_writer_mends_it(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    path = CachePaths(tmp_path, FINGERPRINT).manifest
    whole, detected = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 7):  # every bit of a byte has its turn
        flip(path, bit)
        try:
            assert CacheReader(tmp_path, MANIFEST).manifest == MANIFEST
        except CacheError as error:
            assert str(path) in str(error)  # noqa: PT017 (a flip in white space is harmless)
            detected += 1
        path.write_bytes(whole)
    assert detected > 0.9 * len(whole)
    flip(path, 100)
    write(str(tmp_path), range(1), 1)
    assert path.read_bytes() == whole


def test_any_flipped_bit_of_refs_never_names_a_wrong_record(tmp_path: Path) -> None:
    path = tmp_path / "refs.jsonl"
    right = {name: key_number(number) for number, name in enumerate(("image1", "image2", "image3"))}

    def append_missing() -> None:
        writer = RefsWriter(path)
        for name, key in right.items():
            writer.add(name, key)
        writer.flush()

    append_missing()
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        flip(path, bit)
        refs = Refs(path)
        assert all(refs.key_of(name) in (key, None) for name, key in right.items())
        append_missing()
        refs = Refs(path)
        assert all(refs.key_of(name) == key for name, key in right.items())
        path.write_bytes(whole)


@pytest.mark.parametrize("suffix", ["safetensors", "idx"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_detected_when_the_cache_is_opened(tmp_path: Path, suffix: str, share: float) -> None:
    write(str(tmp_path), range(RECORDS), PER_SHARD)
    path = next(CachePaths(tmp_path, FINGERPRINT).shards.glob(f"*.{suffix}"))
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(CacheError, match=f"shard {path.stem} .*truncated.*llama3v encode"):
        CacheReader(tmp_path)
    assert write(str(tmp_path), range(RECORDS), PER_SHARD) > 0
    assert check_records(tmp_path, RECORDS) == RECORDS


def test_a_missing_shard_is_detected_when_the_cache_is_opened(tmp_path: Path) -> None:
    write(str(tmp_path), range(RECORDS), PER_SHARD)
    next(CachePaths(tmp_path, FINGERPRINT).shards.glob("*.safetensors")).unlink()
    with pytest.raises(CacheError, match="is missing"):
        CacheReader(tmp_path)
    write(str(tmp_path), range(RECORDS), PER_SHARD)
    assert check_records(tmp_path, RECORDS) == RECORDS


def test_a_shard_of_another_cache_or_under_another_name_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path / "here"), range(2), 1)
    other = {**MANIFEST, "vision.cut": "1"}
    with CacheWriter(tmp_path / "there", other) as writer:
        writer.add_bytes(key_number(0), features_of(5), GRID)
    here, there = CachePaths(tmp_path / "here", FINGERPRINT), CachePaths(tmp_path / "there", fingerprint_of(other))
    foreign = next(there.shards.glob("*.idx"))
    for path in (foreign, foreign.with_suffix(".safetensors")):
        path.rename(here.shards / path.name)
    with pytest.raises(CacheError, match=f"index belongs to .* of fingerprint {there.fingerprint}"):
        CacheReader(tmp_path / "here")
    for suffix in ("idx", "safetensors"):
        here.shards.joinpath(foreign.name).with_suffix(f".{suffix}").unlink()
    one, two = sorted(here.shards.glob("*.idx"))
    one.replace(two)
    with pytest.raises(CacheError, match="index belongs to shard"):
        CacheReader(tmp_path / "here")


def test_a_directory_under_the_name_of_another_fingerprint_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path), range(1), 1)
    other = {**MANIFEST, "vision.cut": "1"}
    (tmp_path / FINGERPRINT).rename(tmp_path / fingerprint_of(other))
    with pytest.raises(CacheError, match=f"does not belong here.*{FINGERPRINT}"):
        CacheReader(tmp_path, other)


def test_processes_that_race_on_the_same_keys_leave_one_logical_record_each(tmp_path: Path) -> None:
    results = [finish(process) for process in [start(tmp_path, 0, RECORDS, 1, 0.005) for _ in range(3)]]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert sum(int(out) for _, out, _ in results) >= RECORDS
    assert check_records(tmp_path, RECORDS) == RECORDS
    write(str(tmp_path / "alone"), range(RECORDS), PER_SHARD)
    assert CacheReader(tmp_path, MANIFEST).content_digest() == CacheReader(tmp_path / "alone").content_digest()


def test_a_full_disk_is_a_clear_error_and_earlier_shards_are_safe(tmp_path: Path) -> None:
    write(str(tmp_path), range(2), 1)  # small shards, below the limit that follows
    code, _, err = finish(start(tmp_path, 0, RECORDS, RECORDS, 0.0, 4096 + 3 * RECORD_BYTES))
    assert code == 1
    assert "CacheError: cannot write to the cache" in err
    assert "MiB free" in err
    assert "the 2 records committed before are safe" in err
    assert "Traceback" not in err
    assert check_records(tmp_path, 2) == 2
    assert list(find_orphans(CachePaths(tmp_path, FINGERPRINT))) == []
    write(str(tmp_path), range(RECORDS), PER_SHARD)
    assert check_records(tmp_path, RECORDS) == RECORDS


def test_a_commit_that_failed_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CacheWriter(tmp_path, MANIFEST)
    writer.add_bytes(key_number(1), features_of(1), GRID)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match="No space left on device"):
            writer.commit()
    assert len(CacheReader(tmp_path)) == 0
    assert writer.commit() == 1
    assert CacheReader(tmp_path).read_bytes(key_number(1)) == features_of(1).tobytes()


@pytest.mark.usefixtures("no_waiting")
def test_a_passing_read_error_is_retried_and_a_lasting_one_names_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), range(2), 2)
    reader, real, faults = CacheReader(tmp_path), os.preadv, [OSError(5, "Input/output error"), 7, 1000]

    def faulty(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        fault = faults.pop(0) if faults else None
        if isinstance(fault, OSError):
            raise fault
        return real(descriptor, [buffers[0][:fault]], offset)

    monkeypatch.setattr("os.preadv", faulty)
    assert reader.read_bytes(key_number(0)) == features_of(0).tobytes()  # one EIO, two short reads
    assert not faults
    faults += [OSError(5, "Input/output error")] * 3
    with pytest.raises(CacheError, match=rf"{key_number(1)} is damaged: it cannot be read \(Input/output error\)"):
        reader.read_bytes(key_number(1))
    assert key_number(1) not in CacheWriter(tmp_path, MANIFEST)


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_no_crash(tmp_path: Path) -> None:
    write(str(tmp_path), range(4), 4)
    reader = CacheReader(tmp_path)
    reader.read_bytes(key_number(0))
    os.truncate(next(reader.paths.shards.glob("*.safetensors")), 4096 + 100)
    with pytest.raises(CacheError, match="truncated after it was opened"):
        reader.read_bytes(key_number(0))


def test_orphans_are_collected_only_when_their_owner_is_known_to_be_dead(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, MANIFEST)
    shards = writer.paths.shards
    write(str(tmp_path), range(1), 1)
    shard = next(shards.glob("*.safetensors"))
    shard.with_suffix(".idx").unlink()  # now an orphan of this host
    foreign = shards / f"00000000-0000-4000-8000-000000000000.safetensors.00000000-12345678{TEMPORARY}"
    foreign.write_bytes(b"half a shard of another host")
    assert len(CacheReader(tmp_path)) == 0  # readers ignore both
    with shard.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert collect_orphans(writer.paths) == []
    assert collect_orphans(writer.paths) == [shard]
    assert foreign.exists()
    old = time.time() - 25 * 3600
    os.utime(foreign, (old, old))
    assert collect_orphans(writer.paths) == [foreign]


def test_a_living_writer_keeps_its_shard_while_others_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer starts, and collects, between every two steps of a commit."""
    from llama3v.feature_cache import commit

    paths, found = CachePaths(tmp_path, FINGERPRINT), []

    def collect(point: str) -> None:
        found.append(point)
        assert collect_orphans(paths) == [], point

    writer = CacheWriter(tmp_path, MANIFEST)
    writer.add_bytes(key_number(0), features_of(0), GRID)
    monkeypatch.setattr(commit, "crash_point", collect)
    writer.commit()
    assert set(found) == {point for point in CRASH_POINTS if point.startswith(("shard", "index"))}
    assert len(CacheReader(tmp_path)) == 1


@pytest.mark.usefixtures("no_waiting")
def test_damage_in_a_read_only_cache_is_told_although_it_cannot_be_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), range(2), 2)
    flip(next(CachePaths(tmp_path, FINGERPRINT).shards.glob("*.safetensors")), 8 * 4100)
    real = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(30, "Read-only file system")
        return real(path, flags, mode)

    monkeypatch.setattr("os.open", read_only)
    reader = CacheReader(tmp_path)
    with pytest.raises(CacheError, match=r"is damaged.*cannot mark.*Read-only file system"):
        reader.read_bytes(key_number(0))
    assert key_number(0) not in reader  # this process heeds it all the same
