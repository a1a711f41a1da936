"""Pair scores in `llama3v cache info | verify | prune`.

What stays of a partly used file is committed in a new one before the old one goes, as for features: a kill at any moment
loses no score that stays, and leaves some twice at worst.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import crash_point, flush_directory
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.scores import Scores, write_scores
from llama3v.feature_cache.scores_format import ROW, ScorePaths, read_score_manifest, scored_by

PRUNE_CRASH_POINT = "prune-scores-removed"


def scores_info(features: CachePaths) -> dict[str, dict[str, Any]]:
    """Text half (its fingerprint) -> what it has scored.

    Raises:
        CacheError: a manifest is damaged. OSError: something cannot be read.
    """
    return {paths.scorer: _counts(paths) | read_score_manifest(paths) for paths in scored_by(features)}


def verify_scores(features: CachePaths) -> tuple[int, list[dict[str, str]]]:
    """Read every file, set damaged ones aside, and return the number of whole pairs and the damage that is new.

    Raises:
        CacheError: a manifest is damaged, or damage could not be marked.
    """
    pairs, damage = 0, []
    for paths in scored_by(features):
        read_score_manifest(paths)
        scores = Scores(paths)
        scores.refresh()
        pairs += len(scores)
        damage += [{"file": str(paths.file(name)), "reason": reason} for name, reason in scores.set_aside()]
    return pairs, damage


class ScorePruning:
    """Drops scores of images that no kept data set names, second scores of a pair, and files that are set aside.

    Args:
        named: refs of the kept data sets -> the keys they name (S16); None keeps the scores of all images.

    Raises:
        CacheError: files are damaged and not set aside yet.

    Attributes:
        stays, goes: number of scores.
    """

    def __init__(self, features: CachePaths, named: Mapping[Path, np.ndarray] | None) -> None:
        self.stays = self.goes = 0
        self._files: list[tuple[ScorePaths, str, np.ndarray | None]] = []  # which change, and the rows that stay
        self._aside: list[Path] = []
        kept = None if named is None else np.concatenate([*named.values(), np.zeros(0, "S16")])
        for paths in scored_by(features):
            scores = Scores(paths)
            scores.refresh()
            scores.refuse_broken()
            self._plan(paths, scores, kept)

    def run(self) -> None:
        """Raises OSError: run it again."""
        for paths in {paths for paths, _, _ in self._files}:
            rows = [rows for other, _, rows in self._files if other == paths and rows is not None]
            if rows:
                write_scores(paths, np.concatenate(rows))
        for path in (*(paths.file(name) for paths, name, _ in self._files), *self._aside):
            path.unlink(missing_ok=True)
            crash_point(PRUNE_CRASH_POINT)
            flush_directory(path.parent)

    def _plan(self, paths: ScorePaths, scores: Scores, kept: np.ndarray | None) -> None:
        seen = np.zeros(0, ROW["pair"])
        for name, rows in scores.files.items():  # in order of names, as readers choose among duplicates
            keys = np.ascontiguousarray(rows["pair"]).view("S16")[::2]
            stays = np.ones(len(rows), dtype=bool) if kept is None else np.isin(keys, kept)
            stays &= ~np.isin(rows["pair"], seen)
            seen = np.concatenate([seen, rows["pair"][stays]])
            self.stays += int(stays.sum())
            self.goes += int((~stays).sum())
            if not stays.all():
                self._files.append((paths, name, rows[stays] if stays.any() else None))
        aside = (paths.file(entry["file"]) for entry in journal.read(paths.damaged))
        self._aside += [path for path in aside if path.exists()]


def _counts(paths: ScorePaths) -> dict[str, Any]:
    scores = Scores(paths)
    scores.refresh()
    return {
        "pairs": len(scores),
        "in pieces": int((scores.rows["pieces"] > 1).sum()),
        "files": len(scores.files),
        "bytes": sum(paths.file(name).stat().st_size for name in scores.files),
        "damaged files": len(scores.broken),
    }
