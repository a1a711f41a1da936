"""What the benchmarks share."""

import time

from benchmarks.common import interleaved


def test_a_side_without_hope_is_run_once_and_the_others_in_every_round() -> None:
    calls = {"quick": 0, "hopeless": 0}

    def quick() -> None:
        calls["quick"] += 1

    def hopeless() -> None:
        calls["hopeless"] += 1
        time.sleep(0.05)

    seconds = interleaved({"quick": quick, "hopeless": hopeless}, rounds=3, patience=2)
    assert calls == {"quick": 4, "hopeless": 1}
    assert {name: len(values) for name, values in seconds.items()} == {"quick": 3, "hopeless": 1}
    assert seconds["hopeless"][0] >= 0.05
