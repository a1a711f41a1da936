"""The parts of a ring: what trainer and encoders tell one another, what is encoded next, and what goes to make room."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_process import key_number
from hypothesis import given, settings
from hypothesis import strategies as st
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

from llama3v.config import EncodeConfig
from llama3v.errors import CacheError, ConfigError
from llama3v.feature_cache import journal
from llama3v.feature_cache.codecs import CODECS
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.ring.claims import Claims
from llama3v.feature_cache.ring.files import Position, RingPaths, TrainerSide
from llama3v.feature_cache.ring.plan import Sizes, choose, in_words, smallest_bound
from llama3v.feature_cache.ring.stock import Room, file_bytes

# What they tell one another


def test_a_journal_is_followed_line_by_line_and_a_half_line_waits(tmp_path: Path) -> None:
    path, tail = tmp_path / "a.jsonl", journal.Tail(tmp_path / "a.jsonl")
    assert tail.read() == []
    journal.append(path, [{"n": 1}, {"n": 2}])
    assert tail.read() == [{"n": 1}, {"n": 2}]
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[0]
    for place in range(1, len(line)):
        path.write_bytes(whole + line[:place])
        assert tail.read() == []
    path.write_bytes(whole + line)
    assert tail.read() == [{"n": 1}]
    path.write_bytes(whole + line + b'{"n": 7, "check": "0"}\n')
    assert tail.read() == []


def test_encoders_see_where_the_trainer_stands(tmp_path: Path) -> None:
    paths = RingPaths(tmp_path, "ring")
    position = Position(paths)
    position.refresh()
    assert position.start is None
    trainer = Trainer(tmp_path, [[1], [2], [3]])
    position.refresh()
    assert (position.start, position.consumed, position.done) == (trainer.start, 0, False)
    trainer.side.consumed(2)
    trainer.side.done()
    position.refresh()
    assert (position.consumed, position.done) == (2, True)
    trainer.side.leave()
    again = Trainer(tmp_path, [[1]])
    assert again.start.number == 2
    position.refresh()
    assert (position.start, position.consumed, position.done) == (again.start, 0, False)
    assert [path.name for path in paths.directory.glob("wanted-*")] == ["wanted-2.jsonl"]


def test_one_ring_has_one_trainer(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[1]])
    with pytest.raises(CacheError, match="another training uses the ring"):
        TrainerSide(trainer.paths).enter()
    trainer.side.leave()
    TrainerSide(trainer.paths).enter()


def test_the_next_use_of_an_image_is_never_one_that_is_consumed(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[1, 2], [3], [1], [2, 4]], listed=3)
    wanted = trainer.wanted()
    assert [wanted.next_use(key_number(number)) for number in (1, 2, 3, 4)] == [0, 0, 1, inf]
    trainer.side.want(trainer.some(3, 4))
    wanted.refresh(1)
    assert [wanted.next_use(key_number(number)) for number in (1, 2, 3, 4)] == [2, 3, 1, 3]
    wanted.refresh(3)
    assert [wanted.next_use(key_number(number)) for number in (1, 2, 3, 4)] == [inf, 3, inf, 3]
    assert [(step, [image.name for image in images]) for step, images in wanted.steps(3)] == [(3, ["2.png", "4.png"])]


def test_a_damaged_line_of_the_list_is_an_error_and_not_a_gap(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[1], [2], [3]])
    path = trainer.paths.wanted(1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("2.png", "9.png") + lines[2])
    with pytest.raises(CacheError, match="step 1 is missing"):
        trainer.wanted()


# What is encoded next


def sizes_of(shard_bytes: int = 1 << 20) -> Sizes:
    return Sizes(CODECS["bf16"], TOKENS, WIDTH, shard_bytes)


def test_the_nearest_missing_images_come_first_as_far_as_they_fit(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2, 4], [0, 6], [8]])
    writer, wanted, position = writer_of(trainer), trainer.wanted(), Position(trainer.paths)
    position.refresh()
    sizes, claims = sizes_of(), Claims(trainer.paths.claims)

    def chosen(free: int, **options: Any) -> tuple[list[str], int | None]:
        arguments = {"present": writer.stock.keys, "failed": set(), "most": PLENTY, **options}
        found = choose(wanted, position.consumed, room=Room(free, []), sizes=sizes, claims=claims, **arguments)
        return [image.name for image in found.images], found.blocked_at

    enough = sizes.with_shards(3 * sizes.of(image_of(0)))
    assert chosen(PLENTY) == (["0.png", "2.png", "4.png", "6.png", "8.png"], None)
    assert chosen(enough) == (["0.png", "2.png", "4.png"], 2)
    assert chosen(enough - 1) == (["0.png", "2.png"], 1)
    assert chosen(0) == ([], 0)
    assert chosen(PLENTY, failed={key_number(2)}) == (["0.png", "4.png", "6.png", "8.png"], None)
    assert chosen(PLENTY, most=1) == (["0.png"], None)
    commit(writer, wanted, 0, 4)
    assert chosen(PLENTY, present=writer.stock.keys) == (["2.png", "6.png", "8.png"], None)
    trainer.side.consumed(3)
    position.refresh()
    wanted.refresh(3)
    assert chosen(PLENTY) == (["8.png"], None)


def test_what_another_encoder_works_on_is_left_to_it_and_its_room_is_kept(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2], [4]])
    wanted, position, sizes = trainer.wanted(), Position(trainer.paths), sizes_of()
    position.refresh()
    to_child, to_parent = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        Claims(trainer.paths.claims).take(0)
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)
        os._exit(0)
    os.read(to_parent[0], 1)
    claims = Claims(trainer.paths.claims)

    def chosen(free: int) -> tuple[list[str], bool]:
        found = choose(wanted, position.consumed, set(), set(), Room(free, []), sizes, claims, PLENTY)
        claims.release_all()
        return [image.name for image in found.images], found.shared

    one = sizes.of(image_of(0))
    assert chosen(PLENTY) == (["2.png", "4.png"], True)
    assert chosen(sizes.with_shards(2 * one)) == (["2.png"], True)
    os.write(to_child[1], b"x")
    os.waitpid(child, 0)
    assert chosen(PLENTY) == (["0.png", "2.png", "4.png"], False)


def test_the_smallest_bound_holds_what_lies_between_two_checkpoints(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2], [4, 6, 0], [4], [8]], checkpoint_every=2)
    sizes = sizes_of()
    one = sizes.of(image_of(0))
    assert smallest_bound(trainer.wanted(), trainer.start, 0, sizes) == (sizes.with_shards(3 * one), 2, 4)
    assert smallest_bound(trainer.wanted(), trainer.start, 4, sizes) == (sizes.with_shards(one), 4, 5)
    assert [trainer.start.next_checkpoint(step) for step in (0, 1, 2, 4, 5)] == [2, 2, 4, 5, 5]


# What goes


def test_room_is_made_by_removing_what_is_needed_last(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2], [4], [6], [8]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    for number in (6, 2, 4, 0):
        commit(writer, wanted, number)
    stock = writer.stock
    stock.bound = used = stock.used()
    one = used // 4
    assert stock.make_room(0, step=0, wanted=wanted, presence=ALONE)
    assert present(writer) == {0, 2, 4, 6}
    assert stock.make_room(one, step=1, wanted=wanted, presence=ALONE)
    assert present(writer) == {0, 2, 4}
    assert not stock.make_room(4 * one, step=1, wanted=wanted, presence=ALONE)
    assert present(writer) == {0, 2}
    wanted.refresh(1)
    assert stock.make_room(3 * one, step=1, wanted=wanted, presence=ALONE)  # 0 is consumed
    assert present(writer) == {2}
    assert stock.room(wanted).for_step(0) == stock.bound
    assert stock.room(wanted).for_step(1) == stock.bound - stock.used()


def test_the_estimate_of_a_shard_is_its_size(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    writer.begin_round(wanted, lambda: True)
    for number in range(30):
        writer.add_bytes(key_number(number), features_of(number), GRIDS[number % 2])
    expected = file_bytes(list(writer._pending.values()))
    writer.commit()
    writer.stock.refresh()
    assert writer.stock.used() == expected
    sizes = sizes_of()
    assert expected <= sizes.with_shards(sum(sizes.of(image_of(number)) for number in range(30)))


def test_compaction_keeps_what_is_needed_soon_bit_for_bit_and_frees_the_rest(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0, 3], [2], [4, 7], *([[]] * 20), [1, 5, 6, 8]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    for numbers in ((0, 1), (2, 5), (3, 6), (4, 8)):
        commit(writer, wanted, *numbers)
    before = writer.stock.used()
    assert not writer.stock.compact(30, wanted, PLENTY, least_gain=0.3)  # all is needed by then: little to win
    assert writer.stock.compact(2, wanted, PLENTY, least_gain=0.3)
    assert present(writer) == {0, 2, 3, 4}
    assert writer.stock.used() < 0.6 * before
    reader = CacheReader(trainer.paths.directory)
    for number in (0, 2, 3, 4):
        assert np.array_equal(reader.read(key_number(number)).view(torch.uint16).numpy(), features_of(number))
    assert not writer.stock.compact(2, wanted, PLENTY, least_gain=0.0)


def test_a_damaged_record_is_not_carried_along(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0, 3], [1, 2]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    commit(writer, wanted, 0, 3, 1, 2)
    record = CacheReader(trainer.paths.directory).record(key_number(3))
    path = writer.paths.shard(record.shard)
    data = bytearray(path.read_bytes())
    data[record.offset] ^= 1
    path.write_bytes(data)
    assert writer.stock.compact(0, wanted, PLENTY, least_gain=0.0)
    assert present(writer) == {0}


def test_a_broken_shard_and_an_orphan_take_no_room(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2]])
    wanted, writer = trainer.wanted(), writer_of(trainer)
    commit(writer, wanted, 0)
    [path] = writer.paths.shards.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    from llama3v.feature_cache.commit import host_tag

    (writer.paths.shards / f"x.safetensors.{host_tag()}-0{'.tmp'}").write_bytes(bytes(5000))
    again = writer_of(trainer, bound=20_000)
    assert present(again) == set()
    assert again.stock.make_room(20_000, step=0, wanted=wanted, presence=ALONE)
    assert again.stock.used() == 0


def test_what_does_not_fit_is_given_up_the_farthest_first(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0], [2], [4], [6]])
    wanted = trainer.wanted()
    measure = writer_of(trainer)
    commit(measure, wanted, 0)
    one = measure.stock.used()
    measure.stock.clear(ALONE)
    writer = writer_of(trainer, bound=2 * one)
    commit(writer, wanted, 2, 4)
    commit(writer, wanted, 6, 0)
    assert 0 in present(writer)
    assert 6 not in present(writer)
    assert writer.given_up == 1
    assert writer.stock.used() <= 2 * one


def test_nothing_is_committed_for_a_training_that_is_over(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[0]])
    writer = writer_of(trainer)
    writer.begin_round(trainer.wanted(), lambda: False)
    writer.add_bytes(key_number(0), features_of(0), GRIDS[0])
    assert writer.commit() == 0
    assert writer.stock.used() == 0


# All of it, with an encoder that only copies


def train(trainer: Trainer, encoder: Encoder, watch: Callable[[], None]) -> None:
    """What a trainer does, as far as a ring sees it."""
    reader = CacheReader(trainer.paths.directory, manifest=MANIFEST)
    for step, numbers in enumerate(trainer.steps):
        for _ in range(50):
            reader.refresh()
            if all(key_number(number) in reader for number in numbers):
                break
            encoder.work()
            watch()
        for number in numbers:
            reader.read(key_number(number))
        if step + 1 == trainer.start.next_checkpoint(step):
            trainer.side.consumed(step + 1)


steps_of_images = st.lists(st.lists(st.integers(0, 25), max_size=6, unique=True), min_size=1, max_size=14)


@settings(max_examples=30, deadline=None)
@given(steps_of_images, st.integers(1, 5), st.integers(0, 30_000))
def test_the_smallest_bound_is_enough_for_any_order_and_is_kept(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[int]], checkpoint_every: int, more: int
) -> None:
    trainer = Trainer(tmp_path_factory.mktemp("ring"), steps, checkpoint_every)
    bound = SMALL
    while (need := smallest_bound(trainer.wanted(), trainer.start, 0, sizes_of(bound // 16))[0]) > bound:
        bound = need
    encoder, largest = Encoder(trainer, bound + more), 0

    def watch() -> None:
        nonlocal largest
        largest = max(largest, encoder.writer.stock.used())

    train(trainer, encoder, watch)
    assert largest <= bound + more
    trainer.side.leave()


SMALL = 40_000


def test_a_bound_that_is_too_small_says_which_would_do(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [list(range(0, 20, 2)), [1]], checkpoint_every=1)
    with pytest.raises(
        CacheError, match=r"between two checkpoints \(steps 1 to 1\) the training needs .* --max-disk (\d+)MB"
    ) as error:
        Encoder(trainer, 30_000).work()
    enough = int(str(error.value).partition("give --max-disk ")[2].partition("MB")[0]) * 10**6
    train(trainer, Encoder(trainer, enough), lambda: None)


# Options


@pytest.mark.parametrize(
    ("text", "count"),
    [("200GB", 200 * 10**9), ("1.5TB", 15 * 10**11), ("512MiB", 2**29), ("7000B", 7000), ("3k", 3000), ("42", 42)],
)
def test_bytes_are_understood_in_words(text: str, count: int) -> None:
    assert EncodeConfig(cache=Path("c"), follow="a", max_disk=text).max_disk_bytes == count


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "many", "0", "3 XB"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max-disk"):
        EncodeConfig(cache=Path("c"), follow="a", max_disk=text)


def test_bytes_in_words() -> None:
    assert [in_words(size) for size in (7, 1500, 46_000_000, 2e11)] == ["7 bytes", "1.5 kB", "46.0 MB", "200.0 GB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "a", "vision": "b", "max_disk": "1GB"}, "need each other"),
        ({"follow": "a"}, "need each other"),
        ({"follow": "../a", "max_disk": "1GB"}, "give the NAME"),
        ({"follow": "a", "max_disk": "1GB", "data": "b"}, "leave --data away"),
        ({"follow": "a", "max_disk": "1GB", "part": "1/2"}, "shares the work by itself"),
        ({"follow": "a", "max_disk": "1GB", "codec": "int8", "max_tiles": 0}, "leave --max-tiles, --codec away"),
        ({"data": "a"}, "give --data and --vision"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncodeConfig(cache=Path("c"), **options)  # type: ignore[arg-type]


def test_the_lists_of_a_ring_are_plain_json(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [[1]])
    line = json.loads(trainer.paths.wanted(1).read_text())
    assert line["images"] == [[key_number(1), 0, "1.png", 2, 1]]
