import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3v.data.order import epoch_order
from llama3v.errors import ConfigError

seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 2**32)


@given(seeds, epochs, st.integers(0, 500))
def test_an_epoch_visits_every_sample_once(seed: int, epoch: int, n: int) -> None:
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))


@given(seeds, epochs)
def test_the_order_is_a_function_of_its_arguments(seed: int, epoch: int) -> None:
    assert epoch_order(seed, epoch, 64) == epoch_order(seed, epoch, 64)


@given(st.integers(0, 2**32), epochs)
def test_another_seed_or_another_epoch_is_another_order(seed: int, epoch: int) -> None:
    order = epoch_order(seed, epoch, 64)
    others = [epoch_order(seed + 1, epoch, 64), epoch_order(seed, epoch + 1, 64), epoch_order(epoch, seed, 64)]
    assert others[0] != order
    assert others[1] != order
    assert others[2] != order or seed == epoch


def test_the_order_is_the_recorded_one_on_this_machine_too() -> None:
    """Recorded with numpy 2.4.6 on Linux x86-64: a run that resumes elsewhere must see the same samples."""
    assert epoch_order(0, 0, 12) == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert epoch_order(1, 0, 12) == [3, 5, 2, 9, 7, 10, 0, 8, 6, 11, 1, 4]
    large = ",".join(map(str, epoch_order(3, 2, 100_000)))
    assert hashlib.sha256(large.encode()).hexdigest().startswith("d191cd565e989631054e3f58aff7830b")


def test_every_sample_is_as_likely_in_every_place() -> None:
    n, draws = 8, 4000
    counts = [[0] * n for _ in range(n)]
    for epoch in range(draws):
        for place, sample in enumerate(epoch_order(0, epoch, n)):
            counts[sample][place] += 1
    expected = draws / n
    chi_square = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert chi_square < 86  # 49 degrees of freedom: exceeded by chance once in 1,000


@pytest.mark.parametrize(("epoch", "n"), [(-1, 3), (0, -1)])
def test_negative_epochs_and_sizes_are_refused(epoch: int, n: int) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        epoch_order(0, epoch, n)
