"""Intervals and comparisons: pure functions of scores, checked against exact results."""

import math
from itertools import product

import numpy as np
import pytest

from llama3v.evaluate.statistics import bootstrap, compare, mcnemar, sign_flip, unanimous


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def test_the_bootstrap_interval_of_a_mean_is_near_its_normal_interval() -> None:
    scores = [1.0] * 120 + [0.0] * 80
    interval = bootstrap([(score, 1.0) for score in scores], mean)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert interval.value == pytest.approx(0.6)
    assert interval.low == pytest.approx(0.6 - half, abs=0.01)
    assert interval.high == pytest.approx(0.6 + half, abs=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).random((200, 100)) < 0.3
    covered = 0
    for draw in draws:
        interval = bootstrap([(float(one), 1.0) for one in draw], mean, resamples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / len(draws) <= 0.985


def test_no_right_answer_among_a_few_leaves_room_for_some() -> None:
    none = unanimous(0.0, 1.0, 40)
    assert (none.low, none.high) == (0.0, pytest.approx(0.0881, abs=1e-4))  # Clopper-Pearson, 0 of 40
    assert (1 - none.high) ** 40 == pytest.approx(0.025)
    every = unanimous(1.0, 1.0, 40)
    assert (every.low, every.high) == (pytest.approx(1 - none.high), 1.0)
    assert unanimous(0.0, 1.0, 1).high == pytest.approx(0.975)


def test_equal_answers_within_a_cluster_widen_the_interval_by_the_root_of_its_size() -> None:
    scores = [float(n % 2) for n in range(100) for _ in range(9)]
    tallies = [(score, 1.0) for score in scores]
    alone = bootstrap(tallies, mean)
    together = bootstrap(tallies, mean, [n // 9 for n in range(900)])
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_order_in_memory_does_not_matter() -> None:
    tallies = [(float(n % 3 == 0), 1.0) for n in range(50)]
    assert bootstrap(tallies, mean, seed=3) == bootstrap(tallies, mean, seed=3)
    assert bootstrap(tallies, mean, [0] * 50).low == bootstrap(tallies, mean).value  # one cluster: nothing to resample


def test_no_samples_and_unequal_runs_are_errors() -> None:
    with pytest.raises(ValueError, match="found none"):
        bootstrap(np.zeros((0, 2)), mean)
    with pytest.raises(ValueError, match="2 and 1 scores"):
        compare([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="a cluster for each"):
        bootstrap([(1.0, 1.0)], mean, [1, 2])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (0, 6), (1, 9), (4, 2)])
def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven(first: int, second: int) -> None:
    pairs = first + second
    throws = [sum(throw) for throw in product((0, 1), repeat=pairs)]
    as_uneven = sum(abs(2 * heads - pairs) >= abs(first - second) for heads in throws)
    assert mcnemar(first, second) == pytest.approx(as_uneven / 2**pairs)


def test_the_randomisation_test_agrees_with_mcnemar_on_right_and_wrong() -> None:
    differences = [1.0] * 12 + [-1.0] * 3 + [0.0] * 40
    assert sign_flip(differences) == pytest.approx(mcnemar(12, 3), abs=0.01)
    assert sign_flip([0.0, 0.0]) == 1.0


def test_a_comparison_names_the_test_that_fits_the_scores() -> None:
    first, second = [1.0, 1.0, 1.0, 0.0] * 20, [1.0, 0.0, 0.0, 0.0] * 20
    plain = compare(first, second)
    assert (plain.test, plain.first_better, plain.second_better) == ("McNemar, exact", 40, 0)
    assert plain.difference.value == pytest.approx(0.5)
    assert plain.difference.low > 0.35
    assert plain.p_value < 1e-9
    assert compare([score / 2 for score in first], second).test == "paired randomisation"
    assert compare(first, second, [n // 4 for n in range(80)]).test == "paired randomisation"
    assert compare(first, second, list(range(80))).test == "McNemar, exact"


def test_two_runs_without_a_difference_are_seldom_called_different() -> None:
    draws = np.random.default_rng(2).random((2, 200, 60)) < 0.5
    p_values = [compare(a.astype(float), b.astype(float), resamples=200).p_value for a, b in zip(*draws, strict=True)]
    assert sum(p < 0.05 for p in p_values) / len(p_values) <= 0.08
