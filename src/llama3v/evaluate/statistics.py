"""How sure is a score, and is one model better than another? Pure functions of per-sample scores.

Samples about one picture are not independent, so everything here resamples *clusters* of samples where it is given them.
All draws come from a seed: the same scores give the same interval on every machine.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 2**22  # drawn indices in memory at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same samples. `difference` is the first's mean score less the second's."""

    difference: Interval
    p_value: float
    test: str
    samples: int
    first_better: int
    second_better: int


def bootstrap(
    tallies: Sequence[Sequence[float]] | Array,
    value: Callable[[Array], Array],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of a figure that is a function of sums.

    tallies: [n, k], what each sample adds. value: sums [..., k] -> figure [...]. clusters: the cluster of each sample.
    Raises ValueError without samples.
    """
    sums = _cluster_sums(np.asarray(tallies, dtype=np.float64), clusters)  # [c, k]
    drawn = np.concatenate([value(part) for part in _resampled_sums(sums, resamples, seed)])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value(sums.sum(axis=0))), float(low), float(high))


def unanimous(value: float, most: float, clusters: int, *, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a mean score in [0, most] where every score is 0, or every score is `most`.

    Draws from equal scores are equal, so the bootstrap would claim to be certain. A score that differs may still have
    a chance of up to 1 - ((1 - confidence) / 2) ** (1 / clusters): the exact bound of Clopper and Pearson (1934), for
    independent clusters.
    """
    slack = most * (1 - ((1 - confidence) / 2) ** (1 / clusters))
    return Interval(value, max(0.0, value - slack), min(most, value + slack))


def compare(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Comparison:
    """Compare two runs by their scores on the same samples, in the same order.

    The interval of the difference is a paired bootstrap. The p-value is McNemar's exact test where every score is 0 or
    1 and samples are independent: it needs no resampling and is right for few samples. Partial credit has no
    discordant pairs to count, and clusters break McNemar's independence: there it is a paired randomisation test,
    which flips the signs of (clusters of) differences and is exact up to its draws, of which it makes `resamples`.
    Raises ValueError without samples or where the two differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two runs on the same samples, found {len(first)} and {len(second)} scores")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    counted = np.stack([difference, np.ones_like(difference)], axis=1)
    interval = bootstrap(
        counted,
        lambda sums: sums[..., 0] / sums[..., 1],
        clusters,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    alone = clusters is None or len(set(clusters)) == len(clusters)
    if alone and set(first) | set(second) <= {0.0, 1.0}:
        return Comparison(interval, mcnemar(better, worse), "McNemar, exact", len(first), better, worse)
    p_value = sign_flip(_cluster_sums(difference[:, None], clusters)[:, 0], resamples=resamples, seed=seed)
    return Comparison(interval, p_value, "paired randomisation", len(first), better, worse)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value that the discordant pairs fall to either side by a fair coin (McNemar 1947)."""
    pairs, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(pairs, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**pairs)


def sign_flip(differences: Sequence[float] | Array, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the sum of differences when the sign of each is a fair coin (Fisher's randomisation).

    The observed signs count as one of the draws, so the p-value is never 0 and the test never too eager.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]  # they change no sum
    if not len(values):
        return 1.0
    generator = np.random.default_rng(seed)
    reached = abs(values.sum()) * (1 - 1e-12)  # sums of the same numbers in another order differ by rounding
    extreme, rows = 0, max(1, _CHUNK // len(values))
    for start in range(0, resamples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resamples - start), len(values))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ values) >= reached).sum())
    return (extreme + 1) / (resamples + 1)


def _cluster_sums(tallies: Array, clusters: Sequence[Hashable] | None) -> Array:
    """[n, k] -> [c, k], the sums of each cluster, in order of appearance."""
    if len(tallies) == 0:
        raise ValueError("expected scores of one or more samples, found none")
    if clusters is None:
        return tallies
    if len(clusters) != len(tallies):
        raise ValueError(f"expected a cluster for each of {len(tallies)} samples, found {len(clusters)}")
    places: dict[Hashable, int] = {}
    owners = [places.setdefault(cluster, len(places)) for cluster in clusters]
    sums = np.zeros((len(places), tallies.shape[1]))
    np.add.at(sums, owners, tallies)
    return sums


def _resampled_sums(sums: Array, resamples: int, seed: int) -> list[Array]:
    """`resamples` sums over as many clusters as there are, drawn with replacement: parts of [resamples, k]."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(sums))
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, len(sums), size=(min(rows, resamples - start), len(sums)))
        parts.append(np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=-1))
    return parts
