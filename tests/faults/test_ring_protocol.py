"""What the protocol of a ring survives: processes and machines that die, clocks that jump, locks that are missing, and
trainings that begin again with other options."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cache_process import key_number
from ring_parts import (
    ALONE,
    GRIDS,
    MANIFEST,
    PLENTY,
    TOKENS,
    WIDTH,
    Encoder,
    Trainer,
    commit,
    features_of,
    image_of,
    present,
    writer_of,
)

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import CRASH_EXIT_CODE
from llama3v.feature_cache.layout import fingerprint_of, new_shard_name
from llama3v.feature_cache.presence import Presence
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.ring import files, stock, work
from llama3v.feature_cache.ring.files import Position, TrainerSide
from llama3v.feature_cache.ring.follow import free_ring
from llama3v.feature_cache.ring.writer import RingWriter
from llama3v.train.features.base import Demand
from llama3v.train.features.ring import RingFeatures, RingTask

OTHER_MANIFEST = {**MANIFEST, "vision.cut": "1"}


# Encoders and their machines die


@pytest.mark.parametrize("age", [-3 * 86400.0, 0.0, 3 * 86400.0])
def test_what_a_crashed_machine_left_takes_no_room_whatever_the_clocks_say(tmp_path: Path, age: float) -> None:
    trainer = Trainer(tmp_path, [[0]])
    writer = writer_of(trainer, bound=20_000)
    foreign = "0badcafe" + new_shard_name()[8:]
    for name in (f"{foreign}.safetensors", f"{foreign}.idx.0badcafe-1.tmp", f"{foreign}.safetensors.0badcafe-2.tmp"):
        path = writer.paths.shards / name
        path.write_bytes(bytes(6000))
        os.utime(path, (time.time() - age,) * 2)
    uncertain = Presence(-1)
    uncertain.certain = False
    if age < 86400:  # without locks their owner may be alive
        assert not writer.stock.make_room(20_000, 0, trainer.wanted(), uncertain)
    assert writer.stock.make_room(20_000, 0, trainer.wanted(), ALONE)
    assert writer.stock.used() == 0


def test_a_kill_inside_a_compaction_loses_nothing_and_its_room_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, [[0, 3], [2], *([[]] * 20), [1, 5]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    for numbers in ((0, 1), (2, 5), (3,)):
        commit(writer, wanted, *numbers)
    writer.stock.bound = before = writer.stock.used()
    child = os.fork()
    if child == 0:
        monkeypatch.setenv("LLAMA3V_CRASH_AT", "ring-compacted")
        writer.stock.compact(1, wanted, PLENTY, least_gain=0.0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CRASH_EXIT_CODE
    again = writer_of(trainer, bound=before)
    assert again.stock.used() > before  # by the shard that was being made
    assert again.stock.make_room(0, 1, wanted, ALONE)
    assert again.stock.used() <= before
    reader = CacheReader(trainer.paths.directory)
    for number in (0, 2, 3):
        assert np.array_equal(reader.read(key_number(number)).view(torch.uint16).numpy(), features_of(number))


def test_a_record_that_cannot_be_read_is_not_carried_along_and_ends_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, [[0, 3], [1, 2]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    commit(writer, wanted, 0, 3, 1, 2)
    real, calls = stock.checksum_of, [0]

    def fail_once(data: Any) -> bytes:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.EIO, "Input/output error")
        return real(data)

    monkeypatch.setattr(stock, "checksum_of", fail_once)
    assert writer.stock.compact(0, wanted, PLENTY, least_gain=0.0)
    assert present(writer) == {3}
    assert "Input/output error" in writer.paths.damaged.read_text()


def test_an_encoder_with_a_smaller_bound_than_the_one_before_shrinks_the_ring_first(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[number] for number in range(0, 40, 2)])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    for number in range(0, 40, 2):
        commit(writer, wanted, number)
    used = writer.stock.used()
    encoder = Encoder(trainer, used // 2)
    trainer.side.done()
    encoder.run()  # which begins with that
    assert 0.3 * used < writer.stock.used() <= used // 2
    writer.stock.refresh()
    assert {0, 2, 4, 6} <= present(writer)  # what is needed last went first


# The trainer dies, or is another one


def test_an_encoder_ends_when_the_training_is_gone_for_long_but_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, [[0]])
    encoder = Encoder(trainer, PLENTY)
    monkeypatch.setattr(files, "LOOK_FOR_TRAINER_SECONDS", 0.0)
    monkeypatch.setattr(work, "ABSENCE_SECONDS", 0.3)
    monkeypatch.setattr(work, "LOOK_SECONDS", 0.01)
    began = time.monotonic()
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(time.monotonic())
        if len(looks) == 100:
            trainer.side.leave()
        real(seconds)

    real = time.sleep
    monkeypatch.setattr(work.time, "sleep", look)
    with pytest.raises(CacheError, match=r"the training of the ring ring .* is not running.*resume it"):
        encoder.run()
    assert (
        looks[99] - began > 0.9
    )  # long after `ABSENCE_SECONDS`: the trainer had the ring, and only had nothing to say
    assert time.monotonic() - looks[99] > 0.25
    assert present(encoder.writer) == {0}


def test_what_a_trainer_says_that_lost_the_ring_counts_no_more(tmp_path: Path) -> None:
    first = Trainer(tmp_path, [[0], [2], [4]])
    first.side.leave()
    second = Trainer(tmp_path, [[0], [2], [4]])
    position = Position(second.paths)
    first.side.consumed(3)
    first.side.done()
    position.refresh()
    assert (position.start, position.consumed, position.done) == (second.start, 0, False)
    second.side.consumed(1)
    position.refresh()
    assert position.consumed == 1


def test_the_end_of_a_training_does_not_empty_the_ring_of_the_next(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0]])
    writer = writer_of(trainer)
    commit(writer, trainer.wanted(), 0)
    free_ring(trainer.paths, trainer.start.fingerprint, lambda: False)
    assert writer.stock.used() > 0
    free_ring(trainer.paths, trainer.start.fingerprint, lambda: True)
    assert writer.stock.used() == 0


def features_source(side: TrainerSide, out: Path) -> RingFeatures:
    task = RingTask(("data",), "tower", None, 42, 4, "bf16", TOKENS, WIDTH)
    source = RingFeatures(side, task, MANIFEST, out / "broken.jsonl")
    source.open_files(lambda key: PLACES[key])  # type: ignore[arg-type, return-value]
    return source


PLACES = {
    key_number(number): SimpleNamespace(
        source=0, data="data", image=SimpleNamespace(name=f"{number}.png"), grid=image_of(number).grid
    )
    for number in range(20)
}


def demand_for(keys_of: Any) -> Demand:
    return Demand(keys_of=keys_of, step=0, steps=3, epoch_steps=3, checkpoint_every=1)


def test_features_of_an_earlier_training_never_stay_beside_those_of_this_one(tmp_path: Path) -> None:
    side = TrainerSide(Trainer(tmp_path, [[0]]).paths)
    before = RingWriter(side.paths, OTHER_MANIFEST, 1 << 20, PLENTY)

    def keys_of(step: int) -> list[str]:
        """While this training lists what it wants, an encoder still works for the one before."""
        before.begin_round(Trainer.wanted(earlier), lambda: True)
        before.add_bytes(key_number(step), features_of(step), GRIDS[step % 2])
        before.commit()
        return [key_number(step)]

    earlier = Trainer.__new__(Trainer)
    earlier.paths, earlier.start = side.paths, SimpleNamespace(number=1, step=0)  # type: ignore[assignment]
    source = features_source(side, tmp_path)
    source.expect(demand_for(keys_of))
    assert source.fingerprint != fingerprint_of(OTHER_MANIFEST)
    assert before.stock.used() == 0
    source.finished()


def test_a_trainer_that_lost_the_ring_where_there_are_no_locks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = Trainer(tmp_path, [[0]]).side
    source = features_source(first, tmp_path)
    source.expect(demand_for(lambda step: [key_number(step)]))
    second = Trainer(tmp_path, [[0]])
    assert second.start.number == 2
    with pytest.raises(
        CacheError, match=r"another training has begun the ring ring .* give each training its own --ring"
    ):
        source.features([key_number(0)])


def test_a_trainer_reads_on_when_many_records_are_damaged_or_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder makes them anew as soon as the trainer looks for them."""
    monkeypatch.setattr("llama3v.feature_cache.copies.RETRY_SECONDS", 0)
    side = TrainerSide(Trainer(tmp_path, [[0]]).paths)
    source = features_source(side, tmp_path)
    numbers = list(range(12))
    keys = list(map(key_number, numbers))
    source.expect(demand_for(lambda step: keys))
    writer = RingWriter(side.paths, MANIFEST, 5000, PLENTY)

    class All:
        next_use = staticmethod(lambda key: 0)

    def encode() -> None:
        writer.begin_round(All, lambda: True)  # type: ignore[arg-type]
        for number in numbers:
            writer.add_bytes(key_number(number), features_of(number), GRIDS[number % 2])
        writer.commit()

    encode()
    source._refresh()
    for path in list(writer.paths.shards.glob("*.safetensors")):
        if int(path.stem[-1], 16) % 2:
            writer.paths.index(path.stem).unlink()
            path.unlink()
            continue
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr("llama3v.train.features.ring.time.sleep", lambda seconds: encode())
    found = source.features(keys).view(torch.uint16).numpy()
    assert np.array_equal(found, np.concatenate([features_of(number) for number in numbers]))
    assert len(list(journal.read(writer.paths.damaged))) >= 1
