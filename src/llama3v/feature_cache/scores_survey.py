"""All scores of some data sets, as `llama3v cache scores` looks at them, in flat memory but for a number per sample."""

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np

from llama3v.data.sources import ImageRef, Rejected, Sample, Source
from llama3v.errors import ImageError
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.refs import Refs
from llama3v.feature_cache.scores import Scores
from llama3v.feature_cache.scores_judge import Judged, NotScoredError, judge
from llama3v.model.tiles import image_key


@dataclass(frozen=True)
class Seen:
    """A sample with its score, to be shown."""

    sample: str
    image: ImageRef
    judged: Judged


class Survey:
    """Goes through data sets as training would.

    Attributes:
        without_score: samples of which a pair has no score, or an image cannot be found.
        without_pair: samples that have nothing to score: no image, or no answer.
        rejected: rows that are no samples.
        lowest: the pairs with the lowest scores. below, above: those next to the threshold.

    Args:
        worst: how many of `lowest` to keep. near: how many of `below` and `above`.
        threshold: None keeps none of these.
    """

    def __init__(self, worst: int, near: int, threshold: float | None) -> None:
        self.without_score = self.without_pair = self.rejected = 0
        self.lowest, self.below, self.above = _Smallest(worst), _Smallest(near), _Smallest(near)
        self._threshold = threshold
        self._scores = array("f")

    def scores(self) -> np.ndarray:
        """float32 [samples]: the score of every sample that has one."""
        return np.asarray(self._scores, np.float32)

    def add(self, paths: CachePaths, scores: Scores, source: Source) -> None:
        """Look at every sample of a data set."""
        refs = Refs(paths.refs(source.digest))
        for row in source:
            if isinstance(row, Rejected):
                self.rejected += 1
                continue
            try:
                keys = [refs.key_of(image.name) or image_key(image.read()) for image in row.images]
                found = judge(scores, row, keys)
            except (ImageError, NotScoredError):
                self.without_score += 1
                continue
            if found is None:
                self.without_pair += 1
            else:
                self._scores.append(found.score)
                self._show(row, keys[found.image], found)

    def _show(self, sample: Sample, key: str, found: Judged) -> None:
        seen = Seen(sample.id, sample.images[found.image], found)
        pair = key, found.text
        self.lowest.put(found.score, pair, seen)
        if self._threshold is not None and found.score < self._threshold:
            self.below.put(self._threshold - found.score, pair, seen)
        elif self._threshold is not None:
            self.above.put(found.score - self._threshold, pair, seen)


class _Smallest:
    """Keeps the items with the smallest values, each pair once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, tuple[str, str], Seen]] = []  # the largest value first
        self._pairs: set[tuple[str, str]] = set()
        self._number = count()

    def put(self, value: float, pair: tuple[str, str], item: Seen) -> None:
        if not self._most or pair in self._pairs:
            return
        if len(self._heap) == self._most:
            if -self._heap[0][0] <= value:
                return
            self._pairs.discard(heapq.heappop(self._heap)[2])
        heapq.heappush(self._heap, (-value, -next(self._number), pair, item))
        self._pairs.add(pair)

    def sorted(self) -> list[Seen]:
        """From the smallest value on."""
        return [item for _, _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]


def below(scores: np.ndarray, thresholds: Iterable[float]) -> dict[float, int]:
    """Threshold -> how many scores are below it, and so would be left out. Thresholds are compared as float32, as scores
    are stored."""
    return {threshold: int((scores < np.float32(threshold)).sum()) for threshold in thresholds}
