"""Pair scores that are killed, flipped, moved or raced: none is ever wrong, none that was committed is lost."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import score_process
from cache_process import key_number
from prune_process import FINGERPRINT
from score_process import (
    IDENTITY,
    KEPT_IMAGES,
    PAIRS,
    make_features,
    prune,
    read_scores,
    score_of,
    score_paths,
    text_of,
    write_scores,
)

from llama3v.config import CacheConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.commit import CRASH_EXIT_CODE
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.orphans import find_orphans
from llama3v.feature_cache.scores import CRASH_POINTS, Scores, ScoreWriter, open_scores
from llama3v.feature_cache.scores_format import Score
from llama3v.feature_cache.scores_tools import PRUNE_CRASH_POINT
from llama3v.feature_cache.tools import cache
from llama3v.feature_cache.writer import CacheWriter


@pytest.fixture(scope="module")
def run_to_crash() -> Iterator[Callable[[str, Path, str], int]]:
    """A function that runs a writer or a prune up to a crash point, and returns its exit code."""
    command = [sys.executable, score_process.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(crash_at: str, root: Path, what: str) -> int:
            print(crash_at, root, what, file=stdin, flush=True)
            return int(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture
def paths(tmp_path: Path) -> CachePaths:
    return make_features(tmp_path)


def check(paths: CachePaths, least: int) -> int:
    """Every score that a reader finds is right, and there are at least so many. Returns how many."""
    found = {pair: score for pair, score in read_scores(paths).items() if score is not None}
    assert all(score == score_of(*pair) for pair, score in found.items())
    assert len(found) >= least
    return len(found)


MANIFEST_POINTS = [point.replace("scores-", "scores-manifest-") for point in CRASH_POINTS]


@pytest.mark.parametrize("point", [*(f"{point}:{time}" for point in CRASH_POINTS for time in (1, 2)), *MANIFEST_POINTS])
def test_a_kill_at_any_point_of_a_commit_leaves_right_scores_and_a_rerun_scores_only_the_rest(
    paths: CachePaths, run_to_crash: Callable[[str, Path, str], int], point: str
) -> None:
    assert run_to_crash(point, paths.root, "write") == CRASH_EXIT_CODE
    before = check(paths, 5 if point.endswith(":2") else 0)
    assert write_scores(paths) == len(PAIRS) - before
    assert check(paths, len(PAIRS)) == len(PAIRS)
    assert write_scores(paths) == 0
    CacheWriter(paths.root, score_process.MANIFEST).close()  # which collects what the dead left
    assert list(find_orphans(paths)) == []


@pytest.mark.parametrize("point", [*CRASH_POINTS, *(f"{PRUNE_CRASH_POINT}:{time}" for time in (1, 2))])
def test_a_prune_that_is_killed_loses_no_score_that_stays_and_a_rerun_completes(
    paths: CachePaths, run_to_crash: Callable[[str, Path, str], int], point: str
) -> None:
    write_scores(paths)
    kept = [pair for pair in PAIRS if pair[0] in KEPT_IMAGES]
    assert run_to_crash(point, paths.root, "prune") == CRASH_EXIT_CODE
    found = read_scores(paths)
    assert all(found[pair] == score_of(*pair) for pair in kept)
    prune(paths.root)
    assert {pair for pair, score in read_scores(paths).items() if score is not None} == set(kept)
    check(paths, len(kept))
    before = sorted(score_paths(paths).directory.iterdir())
    again = prune(paths.root)
    assert (again["pair scores that stay"], again["pair scores that go"]) == (len(kept), 0)
    assert sorted(score_paths(paths).directory.iterdir()) == before


def test_a_prune_without_keep_drops_second_scores_and_no_others(paths: CachePaths) -> None:
    one, other = ScoreWriter(paths, IDENTITY), ScoreWriter(paths, IDENTITY)
    for writer in (one, other):  # neither sees what the other is about to write
        for pair in PAIRS:
            writer.add(key_number(pair[0]), text_of(*pair), score_of(*pair))
    one.commit()
    other.commit()
    told = cache(CacheConfig("prune", paths.root))[FINGERPRINT]
    assert (told["pair scores that stay"], told["pair scores that go"]) == (len(PAIRS), len(PAIRS))
    cache(CacheConfig("prune", paths.root, yes=True))
    assert check(paths, len(PAIRS)) == len(PAIRS)
    assert len(list(score_paths(paths).directory.glob("*.scores"))) == 1


def test_writers_that_race_leave_one_logical_score_for_each_pair(paths: CachePaths) -> None:
    """Their values differ here, as those of two engines might in the last bits: all readers take the same one."""

    def race(value: float) -> None:
        writer = ScoreWriter(paths, IDENTITY)
        for number, text in PAIRS:
            writer.add(key_number(number), text_of(number, text), Score(value, 1))
            writer.commit()

    threads = [threading.Thread(target=race, args=(value,)) for value in (0.25, 0.5, 0.75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scores = open_scores(paths)
    assert scores is not None
    assert len(scores) == len(PAIRS)
    first = [scores.find(key_number(number), text_of(number, text)) for number, text in PAIRS]
    again = open_scores(paths)
    assert again is not None
    assert [again.find(key_number(number), text_of(number, text)) for number, text in PAIRS] == first


def test_any_flipped_bit_is_detected_named_and_scored_anew(tmp_path: Path) -> None:
    generator = random.Random(0)
    paths = make_features(tmp_path)
    write_scores(paths)
    for _ in range(40):
        file = generator.choice(sorted(score_paths(paths).directory.glob("*.scores")))
        data = bytearray(file.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CacheError, match=rf"1 files of pair scores are damaged.*{file.name}.*encode --score"):
            open_scores(paths)
        missing = write_scores(paths)
        assert 0 < missing < len(PAIRS)
        assert check(paths, len(PAIRS)) == len(PAIRS)
        file.unlink()  # else the next turn may damage what is set aside


def test_verify_sets_damaged_scores_aside_names_them_and_is_content_from_then_on(paths: CachePaths) -> None:
    write_scores(paths)
    whole = cache(CacheConfig("verify", paths.root))[FINGERPRINT]
    assert (whole["pair scores"], whole["damaged files of pair scores"]) == (len(PAIRS), [])
    file = min(score_paths(paths).directory.glob("*.scores"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheError, match=rf"1 damaged files of pair scores are set aside, such as .*{file.name}"):
        cache(CacheConfig("verify", paths.root))
    again = cache(CacheConfig("verify", paths.root))[FINGERPRINT]
    assert again["pair scores"] < len(PAIRS)
    assert 0 < write_scores(paths) < len(PAIRS)
    prune(paths.root)
    assert not file.exists()


def test_a_prune_refuses_damaged_scores_that_are_not_set_aside(paths: CachePaths) -> None:
    write_scores(paths)
    file = min(score_paths(paths).directory.glob("*.scores"))
    file.write_bytes(b"")
    with pytest.raises(CacheError, match="llama3v cache verify"):
        prune(paths.root)


def test_scores_of_another_cache_or_under_another_name_are_refused(paths: CachePaths) -> None:
    write_scores(paths)
    file = min(score_paths(paths).directory.glob("*.scores"))
    file.with_name("01234567-89ab-4def-8123-456789abcdef.scores").write_bytes(file.read_bytes())
    with pytest.raises(CacheError, match="it was moved here"):
        open_scores(paths)


def test_a_full_disk_is_a_clear_error_and_the_scores_can_be_committed_later(
    paths: CachePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ScoreWriter(paths, IDENTITY)
    writer.add(key_number(0), "a text", Score(0.5, 1))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match=r"cannot write pair scores to .*No space left"):
            writer.commit()
    assert writer.commit() == 1
    scores = Scores(writer.paths)
    scores.refresh()
    assert scores.find(key_number(0), "a text") == Score(0.5, 1)


def test_what_is_no_probability_is_not_stored(paths: CachePaths) -> None:
    writer = ScoreWriter(paths, IDENTITY)
    for value in (float("nan"), -0.1, 1.5):
        with pytest.raises(CacheError, match="expected a probability"):
            writer.add(key_number(0), "a text", Score(value, 1))


def test_the_reader_in_the_documents_finds_every_score(paths: CachePaths) -> None:
    write_scores(paths)
    directory = score_paths(paths).directory
    file = min(directory.glob("*.scores"))
    file.write_bytes(file.read_bytes()[:-1])
    write_scores(paths)  # sets it aside
    page = (Path(__file__).parents[2] / "docs/cache-format.md").read_text()
    names: dict = {}
    for example in page.split("```python\n")[1:]:
        exec(example.split("```")[0], names)
    found = {(key, text): score for key, text, score in names["read_scores"](directory)}
    assert found == {
        (key_number(number), hashlib.blake2b(text_of(number, text).encode(), digest_size=16).hexdigest()): score_of(
            number, text
        ).value
        for number, text in PAIRS
    }


def test_bytes_on_disk_never_change() -> None:
    """Golden values: scores that were written today must be readable for ever."""
    import numpy as np

    from llama3v.feature_cache.scores_format import ROW, ScorePaths, pack_scores, pair_bytes, unpack_scores

    where = ScorePaths(CachePaths(Path("root"), "ab" * 16), "cd" * 16)
    name = "01234567-89ab-4def-8123-456789abcdef"
    rows = np.array([(pair_bytes("00" * 16, "a red square"), 0.25, 1)], dtype=ROW)
    packed = b"".join(pack_scores(where, name, rows))
    assert len(packed) == 72 + 40 + 16
    assert packed[:24].hex() == "4c335653 43520d0a 01000000 28000000 01000000 00000000".replace(" ", "")
    assert packed[88:104].hex() == "453ef15885f4e6eb7ca87226604c7d4f"
    assert packed[-16:].hex() == "9c906a9a20a487d101b0edb8bff5c722"
    assert unpack_scores(packed, where, name).tobytes() == rows.tobytes()
