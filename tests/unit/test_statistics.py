"""Intervals and comparisons: pure functions of scores, checked against exact results."""

import math
from itertools import product

import numpy as np
import pytest

from llama3v.evaluate.statistics import bootstrap, compare, mcnemar, share, swap_test, unanimous


def scored(scores):
    """Tallies of a mean."""
    return [(float(score), 1.0) for score in scores]


def test_the_bootstrap_interval_of_a_mean_is_near_its_normal_interval() -> None:
    scores = [1.0] * 120 + [0.0] * 80
    interval = bootstrap(scored(scores))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert interval.value == pytest.approx(0.6)
    assert interval.low == pytest.approx(0.6 - half, abs=0.01)
    assert interval.high == pytest.approx(0.6 + half, abs=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).random((200, 100)) < 0.3
    covered = 0
    for draw in draws:
        interval = bootstrap(scored(draw), share, resamples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / len(draws) <= 0.985


def test_no_right_answer_among_a_few_leaves_room_for_some() -> None:
    none = bootstrap(scored([0] * 40))
    assert (none.low, none.high) == (0.0, pytest.approx(0.0881, abs=1e-4))  # Clopper-Pearson, 0 of 40
    assert (1 - none.high) ** 40 == pytest.approx(0.025)
    every = bootstrap(scored([1] * 40))
    assert (every.low, every.high) == (pytest.approx(1 - none.high), 1.0)
    assert unanimous(0.0, 1).high == pytest.approx(0.975)
    assert bootstrap(scored([0] * 40), share, [n // 4 for n in range(40)]) == unanimous(0.0, 10)


def test_equal_clusters_never_claim_to_be_certain() -> None:
    half = bootstrap(scored([0.5] * 40))
    assert (half.low, half.high) == (
        pytest.approx(0.5 - 0.0881 / 2, abs=1e-4),
        pytest.approx(0.5 + 0.0881 / 2, abs=1e-4),
    )
    one_picture = bootstrap(scored([1, 0, 0]), share, [0, 0, 0])
    assert one_picture.low < 0.01
    assert one_picture.high > 0.98


def test_two_runs_without_any_difference_may_still_differ() -> None:
    same = compare(scored([0] * 40), scored([0] * 40))
    assert (same.difference.value, same.p_value) == (0.0, 1.0)
    assert (same.difference.low, same.difference.high) == (
        pytest.approx(-0.0881, abs=1e-4),
        pytest.approx(0.0881, abs=1e-4),
    )
    one_scene = compare(scored([1, 1]), scored([0, 1]), share, ["scene"] * 2)
    assert one_scene.difference.low < 0 < one_scene.difference.high


def test_a_ratio_is_bounded_by_what_counts_for_it() -> None:
    """A precision of 1 after three "yes" among forty answers is as sure as three answers are."""
    precision = bootstrap([(1, 1)] * 3 + [(0, 0)] * 37)
    assert precision == unanimous(1.0, 3)
    assert precision.low == pytest.approx(0.025 ** (1 / 3))


def test_a_figure_for_which_nothing_counts_is_not_defined_and_draws_without_it_are_left_out() -> None:
    nothing = [(0, 0)] * 9
    assert bootstrap(nothing) is None
    assert compare(nothing, scored([1] * 9)) is None
    few = bootstrap([(1, 1), (1, 1), *nothing])  # most draws have at least one of the two
    assert few == unanimous(1.0, 2)


def test_equal_answers_within_a_cluster_widen_the_interval_by_the_root_of_its_size() -> None:
    scores = [float(n % 2) for n in range(100) for _ in range(9)]
    tallies = scored(scores)
    alone = bootstrap(tallies)
    together = bootstrap(tallies, share, [n // 9 for n in range(900)])
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_order_in_memory_does_not_matter() -> None:
    tallies = scored(n % 3 == 0 for n in range(50))
    assert bootstrap(tallies, seed=3) == bootstrap(tallies, seed=3)
    assert bootstrap(tallies, share, list(range(50))) == bootstrap(tallies)


def test_no_samples_and_unequal_runs_are_errors() -> None:
    with pytest.raises(ValueError, match="found none"):
        bootstrap(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="2 and 1 scores"):
        compare(scored([1, 0]), scored([1]))
    with pytest.raises(ValueError, match="a cluster for each"):
        bootstrap([(1.0, 1.0)], share, [1, 2])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (0, 6), (1, 9), (4, 2)])
def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven(first: int, second: int) -> None:
    pairs = first + second
    throws = [sum(throw) for throw in product((0, 1), repeat=pairs)]
    as_uneven = sum(abs(2 * heads - pairs) >= abs(first - second) for heads in throws)
    assert mcnemar(first, second) == pytest.approx(as_uneven / 2**pairs)


def test_the_randomisation_test_agrees_with_mcnemar_on_right_and_wrong() -> None:
    first, second = [1] * 12 + [0] * 3 + [1] * 40, [0] * 12 + [1] * 3 + [1] * 40
    ours, theirs = np.array(scored(first)), np.array(scored(second))
    assert swap_test(ours, theirs) == pytest.approx(mcnemar(12, 3), abs=0.01)
    assert swap_test(ours, ours) == 1.0


def test_a_ratio_is_compared_as_a_ratio() -> None:
    """The mean of the first's points is higher, its ratio is not: the judge gave the reference more, too."""
    first, second = [(6.0, 8.0)] * 20, [(5.0, 5.0)] * 20
    found = compare(first, second, most=10.0)
    assert (found.first, found.second, found.difference.value) == (0.75, 1.0, -0.25)
    assert (found.first_better, found.second_better) == (0, 20)
    assert found.p_value < 0.001
    assert found.test == "paired randomisation"
    unread = compare([(6.0, 8.0), (0.0, 0.0)], [(6.0, 8.0), (2.0, 8.0)], most=10.0)
    assert (unread.first, unread.second) == (0.75, 0.5)  # an unreadable verdict is no zero
    assert (unread.first_better, unread.second_better) == (0, 0)


def test_a_comparison_names_the_test_that_fits_the_scores() -> None:
    first, second = [1.0, 1.0, 1.0, 0.0] * 20, [1.0, 0.0, 0.0, 0.0] * 20
    plain = compare(scored(first), scored(second))
    assert (plain.test, plain.first_better, plain.second_better) == ("McNemar, exact", 40, 0)
    assert plain.difference.value == pytest.approx(0.5)
    assert plain.difference.low > 0.35
    assert plain.p_value < 1e-9
    halves = scored(score / 2 for score in first)
    assert compare(halves, scored(second)).test == "paired randomisation"
    quarters, alone = [n // 4 for n in range(80)], list(range(80))
    assert compare(scored(first), scored(second), share, quarters).test == "paired randomisation"
    assert compare(scored(first), scored(second), share, alone).test == "McNemar, exact"


def test_two_runs_without_a_difference_are_seldom_called_different() -> None:
    draws = np.random.default_rng(2).random((2, 200, 60)) < 0.5
    p_values = [compare(scored(a), scored(b), resamples=200).p_value for a, b in zip(*draws, strict=True)]
    assert sum(p < 0.05 for p in p_values) / len(p_values) <= 0.08
