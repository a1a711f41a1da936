"""Read and write pair scores. Any number of processes may write at once.

Several scores of one pair, which writers that raced have left, are one: that of the file whose name sorts first.
Every file is checked as a whole when it is read.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.layout import CachePaths, fingerprint_of, new_shard_name
from llama3v.feature_cache.scores_format import (
    ROW,
    SUFFIX,
    Score,
    ScorePaths,
    pack_scores,
    pair_bytes,
    scored_by,
    unpack_scores,
    write_score_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

CRASH_POINTS = tuple(
    f"scores-{step}" for step in ("created", "half-written", "written", "synced", "renamed", "directory-synced")
)
"""Where `LLAMA3V_CRASH_AT` (commit.py) may end a process that commits scores."""


class Scores:
    """The scores that one text half has given to pairs of one cache.

    Attributes:
        files: name -> rows of every file that could be trusted, in order of names.
        broken: name -> reason, for files that could not and are not set aside yet.
    """

    def __init__(self, paths: ScorePaths) -> None:
        self.paths = paths
        self.files: dict[str, np.ndarray] = {}
        self.broken: dict[str, str] = {}
        self._view = _View([])

    def refresh(self) -> None:
        """Take in what was committed or set aside since the last time. Raises OSError."""
        names, found = self._listed(), None
        while found is None:
            found = self._load_all(names)
            before, names = names, self._listed()
            if names != before:
                found = None  # a prune may just have moved scores to a file that the list did not have
        if list(found) != list(self.files):
            self.files = found
            self._view = _View(list(found.values()))

    def find(self, key: str, text: str) -> Score | None:
        """The score of an image, by the key of its record, and a text."""
        return self._view.find(pair_bytes(key, text))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._view.first)

    @property
    def rows(self) -> np.ndarray:
        """[pairs] of dtype `ROW`: one row for every pair, sorted by pair."""
        return self._view.rows[self._view.first]

    def set_aside(self) -> list[tuple[str, str]]:
        """Mark the broken files for everyone, so that their pairs are scored anew, and return (name, reason) of them.

        Raises:
            CacheError: the mark could not be written.
        """
        entries = [{"file": name, "reason": reason} for name, reason in self.broken.items()]
        try:
            journal.append(self.paths.damaged, entries)
        except OSError as error:
            raise CacheError(
                f"cannot mark {len(entries)} damaged files in {self.paths.damaged} ({error.strerror}); make the cache "
                "directory writable and run `llama3v cache verify` on it"
            ) from error
        found, self.broken = list(self.broken.items()), {}
        return found

    def refuse_broken(self) -> None:
        """CacheError where a file is damaged."""
        if self.broken:
            name, reason = next(iter(self.broken.items()))
            raise CacheError(
                f"{len(self.broken)} files of pair scores are damaged, the first is {self.paths.file(name)} ({reason}); "
                f"run `llama3v encode --score` again on the data, or `llama3v cache verify {self.paths.features.root}` "
                "to set them aside"
            )

    def _listed(self) -> list[str]:
        damaged = {entry["file"] for entry in journal.read(self.paths.damaged)}
        names = sorted(path.stem for path in self.paths.directory.glob(f"*{SUFFIX}"))
        return [name for name in names if name not in damaged]

    def _load_all(self, names: list[str]) -> dict[str, np.ndarray] | None:
        """None where a file went meanwhile."""
        files: dict[str, np.ndarray] = {}
        self.broken = {}
        for name in names:
            try:
                files[name] = self.files[name] if name in self.files else self._load(name)
            except FileNotFoundError:
                return None
            except (ValueError, OSError) as error:
                self.broken[name] = str(error)
        return files

    def _load(self, name: str) -> np.ndarray:
        return unpack_scores(self.paths.file(name).read_bytes(), self.paths, name)


class _View:
    """Rows of several files, to be searched. Replaced as a whole, so that threads see the old one or the new one."""

    def __init__(self, files: "Iterable[np.ndarray]") -> None:
        self.rows = np.concatenate([np.zeros(0, ROW), *files])
        self._order = np.argsort(self.rows["pair"], kind="stable")  # equal pairs stay in order of files
        self._sorted = self.rows["pair"][self._order]
        new = np.ones(len(self.rows), dtype=bool)
        new[1:] = self._sorted[1:] != self._sorted[:-1]
        self.first = self._order[new]
        """[pairs]: the row that counts."""

    def find(self, pair: bytes) -> Score | None:
        wanted = np.array(pair, dtype=self._sorted.dtype)
        place = int(np.searchsorted(self._sorted, wanted))
        if place == len(self._sorted) or self._sorted[place] != wanted:
            return None
        row = self.rows[self._order[place]]
        return Score(float(row["score"]), int(row["pieces"]))


def open_scores(features: CachePaths) -> Scores | None:
    """The scores of a cache; None where no pair was ever scored.

    Raises:
        CacheError: several text halves have scored its pairs, or a file is damaged.
    """
    found = scored_by(features)
    if len(found) > 1:
        directories = ", ".join(str(paths.directory) for paths in found)
        raise CacheError(
            f"pairs of {features.directory} were scored by {len(found)} text halves: {directories}; "
            f"`llama3v cache info {features.root}` shows them in words: remove the directories of all but one"
        )
    if not found:
        return None
    scores = Scores(found[0])
    scores.refresh()
    scores.refuse_broken()
    return scores


class ScoreWriter:
    """Adds scores, in memory until `commit`.

    Damaged files that it finds are set aside, so their pairs are absent and are scored anew.

    Args:
        features: the cache whose images are scored; a CacheWriter must be at work on it, which keeps prunes away.
        identity: what the scores depend on beside the features (`PairScorer.identity`).

    Raises:
        CacheError: the directory cannot be written.
    """

    def __init__(self, features: CachePaths, identity: Mapping[str, str]) -> None:
        self.paths = ScorePaths(features, fingerprint_of(identity))
        self._scores = Scores(self.paths)
        self._pending: dict[bytes, Score] = {}
        try:
            write_score_manifest(self.paths, identity)
            self._scores.refresh()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._scores.set_aside()

    def has(self, key: str, text: str) -> bool:
        """Whether a pair has a score: committed (by anyone, as of this writer's last commit), or pending."""
        return pair_bytes(key, text) in self._pending or self._scores.find(key, text) is not None

    def __len__(self) -> int:
        """Number of committed pairs, as of this writer's last commit."""
        return len(self._scores)

    @property
    def pending(self) -> int:
        """Scores that wait for `commit`."""
        return len(self._pending)

    def add(self, key: str, text: str, score: Score) -> bool:
        """Returns False if the pair has a score already: nothing is written then.

        Raises:
            CacheError: the score is no probability.
        """
        if not 0 <= score.value <= 1:
            raise CacheError(
                f"the pair score of image {key} is {score.value}; expected a probability. Look for broken weights"
            )
        if self.has(key, text):
            return False
        self._pending[pair_bytes(key, text)] = score
        return True

    def commit(self) -> int:
        """Make what was added durable and visible, as one file. Returns the number of scores.

        Raises:
            CacheError: it could not be written. The scores stay pending.
        """
        if not self._pending:
            return 0
        rows = np.array([(pair, *score) for pair, score in self._pending.items()], dtype=ROW)
        try:
            write_scores(self.paths, rows)
            self._scores.refresh()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._pending = {}
        return len(rows)

    def _cannot_write(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot write pair scores to {self.paths.directory} ({error.strerror or error}); what was committed before is "
            "safe. Mend that and run the same command again"
        )


def write_scores(paths: ScorePaths, rows: np.ndarray) -> str:
    """Commit rows as a new file and return its name. Raises OSError; nothing is left then."""
    name = new_shard_name()
    with publish(paths.file(name), pack_scores(paths, name, rows), "scores"):
        return name
