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
Value: TypeAlias = Callable[[Array], Array]
"""A figure of sums, [..., k] -> [...]."""

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 2**22  # drawn indices in memory at a time
_ROUNDING = 1e-9  # differences that are this small beside what they are differences of are rounding


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A figure of two runs on the same samples. `difference` is the first's less the second's."""

    first: float
    second: float
    difference: Interval
    p_value: float
    test: str
    samples: int
    first_better: int
    second_better: int


def share(sums: Array) -> Array:
    """First sum over the second, [..., k] -> [...]: the mean of tallies (score, 1); nan, not defined, where the second is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] != 0)


def bootstrap(
    tallies: Sequence[Sequence[float]] | Array,
    value: Value = share,
    clusters: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of a figure that is a function of sums; `unanimous`
    where all draws are equal. None where the figure is not defined.

    tallies: [n, k], what each sample adds. value: sums [..., k] -> figure [...], nan where it is not defined: such draws
    are left out. clusters: the cluster of each sample. bounds: least and largest that the figure can be.
    Raises ValueError without samples.
    """
    sums = _cluster_sums(np.asarray(tallies, dtype=np.float64), clusters)  # [c, k]
    found = float(value(sums.sum(axis=0)))
    if math.isnan(found):
        return None
    drawn = np.concatenate([value(part) for part in _resampled_sums(sums, resamples, seed)])
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    if high - low > _ROUNDING * (bounds[1] - bounds[0]):
        return Interval(found, float(low), float(high))
    counted = int(np.count_nonzero(~np.isnan(value(sums))))
    return unanimous(found, max(1, counted), bounds, confidence=confidence)


def unanimous(
    value: float, clusters: int, bounds: tuple[float, float] = (0.0, 1.0), *, confidence: float = CONFIDENCE
) -> Interval:
    """The interval of a figure that is the same in every cluster that counts for it.

    Draws from equal clusters are equal, so the bootstrap would claim to be certain. A cluster that differs may still have
    a chance of up to 1 - ((1 - confidence) / 2) ** (1 / clusters), the exact bound of Clopper and Pearson (1934) for
    independent clusters; and may take the figure that part of the way to either of its bounds.
    """
    slack = 1 - ((1 - confidence) / 2) ** (1 / clusters)
    least, most = bounds
    return Interval(value, value - slack * (value - least), value + slack * (most - value))


def compare(
    first: Sequence[Sequence[float]] | Array,
    second: Sequence[Sequence[float]] | Array,
    value: Value = share,
    clusters: Sequence[Hashable] | None = None,
    *,
    most: float = 1.0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Comparison | None:
    """Compare a figure of two runs by what the same samples, in the same order, add to it. None where it is not defined.

    first, second: tallies [n, k]. value, clusters: as in `bootstrap`. most: the figure lies in [0, most].
    The interval of the difference is a paired bootstrap. The p-value is McNemar's exact test where the figure is the mean
    of scores 0 or 1 and samples are independent: it needs no resampling and is right for few samples. Partial credit has
    no discordant pairs to count, and clusters break McNemar's independence: there, and for other figures, it is `swap_test`.
    Raises ValueError without samples or where the two differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two runs on the same samples, found {len(first)} and {len(second)} scores")
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    both = np.concatenate([ours, theirs], axis=-1)  # [n, 2k]
    width = both.shape[-1] // 2

    def difference(sums: Array) -> Array:
        return value(sums[..., :width]) - value(sums[..., width:])

    interval = bootstrap(
        both,
        difference,
        clusters,
        bounds=(-most, most),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    if interval is None:
        return None
    each = difference(both)  # nan, hence neither better nor worse, where a sample has no figure of its own
    better, worse = int((each > 0).sum()), int((each < 0).sum())
    alone = clusters is None or len(set(clusters)) == len(clusters)
    if alone and value is share and _all_right_or_wrong(ours) and _all_right_or_wrong(theirs):
        p_value, test = mcnemar(better, worse), "McNemar, exact"
    else:
        pairs = _cluster_sums(both, clusters)
        p_value = swap_test(pairs[:, :width], pairs[:, width:], value, resamples=resamples, seed=seed)
        test = "paired randomisation"
    return Comparison(
        first=float(value(ours.sum(axis=0))),
        second=float(value(theirs.sum(axis=0))),
        difference=interval,
        p_value=p_value,
        test=test,
        samples=len(first),
        first_better=better,
        second_better=worse,
    )


def _all_right_or_wrong(tallies: Array) -> bool:
    return bool((tallies[:, 1] == 1).all() and np.isin(tallies[:, 0], (0, 1)).all())


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value that the discordant pairs fall to either side by a fair coin (McNemar 1947)."""
    pairs, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(pairs, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**pairs)


def swap_test(first: Array, second: Array, value: Value = share, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the difference of two runs' figure when which run made which of each pair is a fair coin
    (Fisher's randomisation).

    first, second: [n, k], what each pair adds to either. It is exact up to its draws. The observed pairs count as one of
    these, so the p-value is never 0 and the test never too eager.
    """
    unlike = (first != second).any(axis=1)  # others change no sum
    if not unlike.any():
        return 1.0
    generator = np.random.default_rng(seed)
    ours, both = first.sum(axis=0), first.sum(axis=0) + second.sum(axis=0)
    change = (second - first)[unlike]  # [pairs, k], what a swap adds to the first run's sums
    # the same numbers, summed in another order, differ by rounding
    reached = abs(value(ours) - value(both - ours)) * (1 - _ROUNDING)
    extreme, rows = 0, max(1, _CHUNK // len(change))
    for start in range(0, resamples, rows):
        swaps = generator.integers(0, 2, size=(min(rows, resamples - start), len(change))).astype(np.float64)
        drawn = ours + swaps @ change
        extreme += int((~(np.abs(value(drawn) - value(both - drawn)) < reached)).sum())
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
