from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3v.data.packing import CANDIDATES, WINDOW, arrange, deal, even_out, fill, loads, pack
from llama3v.errors import DataError


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    row_tokens = draw(st.integers(1, 300))
    return draw(st.lists(st.integers(1, row_tokens), max_size=200)), row_tokens


@settings(deadline=None)
@given(problems(), st.integers(0, 5), st.integers(0, 5))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(
    problem: tuple[list[int], int], seed: int, epoch: int
) -> None:
    lengths, row_tokens = problem
    rows = pack(lengths, row_tokens, seed=seed, epoch=epoch)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_tokens for row in rows)


@settings(deadline=None)
@given(problems())
def test_no_two_rows_of_a_window_could_be_one(problem: tuple[list[int], int]) -> None:
    lengths, row_tokens = problem
    totals = sorted(sum(lengths[index] for index in row) for row in pack(lengths, row_tokens, seed=0, epoch=0))
    assert len(totals) < 2 or totals[0] + totals[1] > row_tokens


def test_packing_is_the_recorded_one_on_this_machine_too() -> None:
    assert pack([5, 3, 4, 7, 2, 6, 1, 8, 5, 3], 10, seed=0, epoch=0) == [[1, 6], [9, 3], [2, 5], [0, 8], [4, 7]]


def test_numpy_lengths_pack_like_plain_ones() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 500)
    assert pack(lengths, 2048, seed=0, epoch=0) == pack(lengths.tolist(), 2048, seed=0, epoch=0)  # type: ignore[arg-type]


def captions(random: np.random.Generator, n: int) -> np.ndarray:
    """One tile (81 visual tokens), the frame of the prompt and a caption of about 18 tokens."""
    return 96 + random.poisson(18, n)


def conversations(random: np.random.Generator, n: int) -> np.ndarray:
    """Sliced images (1 to 7 tiles) and long-tailed text."""
    text = np.minimum(20 + random.lognormal(5, 0.8, n).astype(int), 1200)
    return 81 * random.choice([1, 3, 5, 7], n, p=[0.4, 0.2, 0.2, 0.2]) + text


def text_only(random: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(random.lognormal(5.5, 1, n).astype(int), 20, 2048)


def uniform(random: np.random.Generator, n: int) -> np.ndarray:
    return random.integers(50, 2048, n)


MIXES = [captions, conversations, text_only, uniform]


@pytest.mark.parametrize("n", [3000, 2 * WINDOW + WINDOW // 2 - 1])
@pytest.mark.parametrize("mix", MIXES)
def test_rows_are_at_least_97_percent_full(mix: Callable[..., np.ndarray], n: int) -> None:
    lengths = mix(np.random.default_rng(0), n).tolist()
    assert fill(pack(lengths, 2048, seed=0, epoch=0), lengths, 2048) >= 0.97


@pytest.mark.parametrize("mix", MIXES)
def test_neighbours_and_rows_change_with_the_epoch_and_with_the_seed(mix: Callable[..., np.ndarray]) -> None:
    lengths = mix(np.random.default_rng(1), 3000).tolist()

    def neighbours(seed: int, epoch: int) -> set[frozenset[int]]:
        rows = pack(lengths, 2048, seed=seed, epoch=epoch)
        return {frozenset((a, b)) for row in rows for a in row for b in row if a < b}

    first = neighbours(0, 0)
    for other in (neighbours(0, 1), neighbours(1, 0)):
        assert len(first & other) < 0.15 * len(first)
    assert neighbours(0, 0) == first


def test_a_place_in_the_epoch_says_nothing_about_length() -> None:
    lengths = text_only(np.random.default_rng(2), 6000).tolist()
    rows = pack(lengths, 2048, seed=0, epoch=0)
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    means = [np.mean([lengths[index] for row in half for index in row]) for half in halves]
    assert abs(means[0] - means[1]) < 0.1 * np.mean(lengths)
    longest_first = [lengths[row[0]] == max(lengths[index] for index in row) for row in rows if len(row) > 3]
    assert np.mean(longest_first) < 0.5


@pytest.mark.parametrize("length", [0, -3, 11])
def test_a_sample_that_is_empty_or_longer_than_a_row_is_refused(length: int) -> None:
    with pytest.raises(DataError, match=rf"sample 1: expected 1 to 10 tokens \(--row-tokens\), found {length}"):
        pack([3, length], 10, seed=0, epoch=0)


def test_no_samples_make_no_rows() -> None:
    assert pack([], 10, seed=0, epoch=0) == []
    assert fill([], [], 10) == 0


def mixed(random: np.random.Generator, n: int) -> tuple[list[int], list[int]]:
    """Text only, one image, and several sliced ones, side by side: (tokens, tiles)."""
    text = np.minimum(20 + random.lognormal(5, 0.8, n).astype(int), 1200)
    tiles = random.choice([0, 1, 3, 5, 7], n, p=[0.3, 0.3, 0.15, 0.1, 0.15])
    return (81 * tiles + text).tolist(), tiles.tolist()


def spread_of_steps(rows: list[list[int]], lengths: list[int], tiles: list[int], size: int) -> tuple[float, float]:
    """Of groups of `size` rows: the standard deviation of tiles and of attention pairs, against their means."""
    load = loads(rows, lengths, tiles)
    sums = load[: len(load) // size * size].reshape(-1, size, 3).sum(axis=1)
    return tuple((sums.std(axis=0) / sums.mean(axis=0))[1:])


def test_steps_are_alike_in_tiles_and_attention_whatever_their_size() -> None:
    lengths, tiles = mixed(np.random.default_rng(0), 12_000)
    plain = pack(lengths, 2048, seed=0, epoch=0)
    even = pack(lengths, 2048, seed=0, epoch=0, tiles=tiles)
    assert sorted(plain) == sorted(even)  # the same rows, as full as before
    assert fill(even, lengths, 2048) >= 0.97
    for size, most in ((8, 0.08), (32, 0.03), (128, 0.015)):
        for before, after in zip(
            spread_of_steps(plain, lengths, tiles, size), spread_of_steps(even, lengths, tiles, size), strict=True
        ):
            assert after < most
            assert after < before / 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 9)), max_size=300), st.integers(0, 3))
def test_evening_out_loses_no_sample_in_any_mix(samples: list[tuple[int, int]], epoch: int) -> None:
    lengths, tiles = [length for length, _ in samples], [count for _, count in samples]
    rows = pack(lengths, 100, seed=0, epoch=epoch, tiles=tiles)
    assert sorted(index for row in rows for index in row) == list(range(len(samples)))
    assert rows == pack(lengths, 100, seed=0, epoch=epoch, tiles=tiles)


def test_evening_out_moves_rows_by_a_little_only() -> None:
    lengths, tiles = mixed(np.random.default_rng(0), 12_000)
    rows = pack(lengths, 2048, seed=0, epoch=0)
    order = even_out(loads(rows, lengths, tiles))
    assert sorted(order) == list(range(len(rows)))
    moved = np.abs(np.arange(len(rows)) - order)
    assert np.median(moved) <= CANDIDATES
    first = set(order[: len(rows) // 2])
    assert len(first & set(range(len(rows) // 2))) > 0.95 * len(first)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.1, 10), max_size=24), st.integers(1, 9), st.integers(1, 4))
def test_rows_of_a_step_are_arranged_without_losing_one(load: list[float], rows_per_pass: int, ranks: int) -> None:
    load = load * ranks  # ranks divide the rows of a step
    assert sorted(arrange(load, rows_per_pass, ranks)) == list(range(len(load)))
    assert [len(share) for share in deal(load, [len(load) - 1, 1] if load else [])] == (
        [len(load) - 1, 1] if load else []
    )


@pytest.mark.parametrize(("rows_per_pass", "ranks"), [(8, 1), (4, 2), (2, 8)])
def test_no_rank_or_pass_is_far_heavier_than_another(rows_per_pass: int, ranks: int) -> None:
    lengths, tiles = mixed(np.random.default_rng(0), 12_000)
    rows = pack(lengths, 2048, seed=0, epoch=0, tiles=tiles)
    load = loads(rows, lengths, tiles).sum(axis=1)

    def worst(order: Callable[[np.ndarray], list[int]]) -> float:
        """The heaviest pass of any rank against the mean of its step, over all steps."""
        ratios = []
        for step in range(len(rows) // 64):
            some = load[64 * step : 64 * step + 64]
            placed = some[order(some)].reshape(-1, rows_per_pass, ranks)  # [passes, rows of a pass, ranks]
            ratios.append(placed.sum(axis=1).max() / placed.sum(axis=1).mean())
        return max(ratios)

    arranged = worst(lambda some: arrange(some.tolist(), rows_per_pass, ranks))
    assert arranged < 1.25
    assert arranged - 1 < 0.5 * (worst(lambda some: list(range(64))) - 1)
