"""Checkpoints at Young's interval: the one that loses the least, from what a save is measured to take."""

import pytest

from llama3v.train.pace import Pace, young_interval


def lost_share(interval: float, save: float, mean: float) -> float:
    """Of the time: saving, and half an interval's work per preemption."""
    return save / interval + interval / 2 / mean


@pytest.mark.parametrize(("save", "hours"), [(1.0, 4.0), (60.0, 4.0), (0.1, 24.0)])
def test_no_other_interval_loses_less(save: float, hours: float) -> None:
    best = young_interval(save, hours)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert lost_share(best, save, hours * 3600) < lost_share(factor * best, save, hours * 3600)


def test_without_preemptions_checkpoints_come_every_so_many_steps() -> None:
    pace = Pace(every=4)
    assert [step for step in range(1, 13) if pace.due(step)] == [4, 8, 12]


def test_with_preemptions_the_first_save_is_at_once_and_the_next_ones_follow_the_formula() -> None:
    pace, saves = Pace(every=4, preemption_hours=2.0), []
    for step in range(1, 1001):
        if pace.due(step):
            saves.append(step)
            pace.saved(step, seconds=2.0, step_seconds=0.5)
    interval = young_interval(2.0, 2.0) / 0.5  # sqrt(2 x 2 x 7200) = 170 seconds
    assert saves == [1, *(1 + round(interval) * count for count in (1, 2))]


def test_processes_take_the_interval_that_they_agreed_on() -> None:
    paces = [Pace(every=4, preemption_hours=1.0, agreed=lambda number: 7.0) for _ in range(2)]
    for measured, pace in enumerate(paces, start=1):
        pace.saved(10, seconds=float(measured), step_seconds=0.3 * measured)
    assert [[pace.due(step) for step in (16, 17)] for pace in paces] == [[False, True]] * 2
