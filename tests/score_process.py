"""Pair scores without a model: imported by tests, and run as a server that forks writers and prunes for tests to kill.

    python tests/score_process.py

It answers every line `CRASH_AT ROOT write|prune` on stdin with the exit code of what was to crash there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cache_process import MANIFEST, key_number, write
from prune_process import FINGERPRINT, KEPT, name

from llama3v.config import CacheConfig
from llama3v.feature_cache.commit import CRASH_VARIABLE
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.scores import Scores, ScoreWriter
from llama3v.feature_cache.scores_format import Score, ScorePaths
from llama3v.feature_cache.tools import cache

IDENTITY = {"scoring": "test", "weights": "none"}
IMAGES, TEXTS_EACH = 6, 2
KEPT_IMAGES = (0, 2, 5)
PAIRS = [(number, text) for number in range(IMAGES) for text in range(TEXTS_EACH)]


def text_of(number: int, text: int) -> str:
    return f"caption {text} of image {number}"


def score_of(number: int, text: int) -> Score:
    """A value that float32 has, and only this pair."""
    return Score((1 + number * TEXTS_EACH + text) / 64, 1 + text)


def make_features(root: Path) -> CachePaths:
    """A cache of the images, of which a data set to keep names some."""
    write(str(root), range(IMAGES), IMAGES)
    paths = CachePaths(root, FINGERPRINT)
    name(paths, KEPT, KEPT_IMAGES)
    return paths


def write_scores(paths: CachePaths, pairs: list[tuple[int, int]] = PAIRS, in_file: int = 5) -> int:
    """Score what is missing, so many in a file; returns how many were missing."""
    writer, added = ScoreWriter(paths, IDENTITY), 0
    for pair in pairs:
        added += writer.add(key_number(pair[0]), text_of(*pair), score_of(*pair))
        if writer.pending == in_file:
            writer.commit()
    writer.commit()
    return added


def read_scores(paths: CachePaths) -> dict[tuple[int, int], Score | None]:
    """All pairs as a reader finds them."""
    scores = Scores(score_paths(paths))
    scores.refresh()
    scores.refuse_broken()
    return {pair: scores.find(key_number(pair[0]), text_of(*pair)) for pair in PAIRS}


def score_paths(paths: CachePaths) -> ScorePaths:
    return ScoreWriter(paths, IDENTITY).paths


def prune(root: Path) -> dict:
    return cache(CacheConfig("prune", root, keep=(KEPT,), yes=True))[FINGERPRINT]


def serve() -> None:
    for line in sys.stdin:
        crash_at, root, what = line.split()
        child = os.fork()
        if child == 0:
            os.environ[CRASH_VARIABLE] = crash_at
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            if what == "write":
                write_scores(CachePaths(Path(root), FINGERPRINT))
            else:
                prune(Path(root))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


__all__ = ["MANIFEST"]

if __name__ == "__main__":
    serve()
