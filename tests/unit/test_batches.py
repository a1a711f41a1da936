"""Rows, steps and batches: what each step sees is a pure function, and every token lands where it belongs."""

import threading
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3v.model.slicing import Grid
from llama3v.train.batches import Ahead, RowPlan, assemble, make_pass
from llama3v.train.features.base import FeatureSource
from llama3v.train.names import MOST_SHOWN, ShownSample, names_of, shown_samples
from llama3v.train.prepared import PreparedWriter, load_prepared
from llama3v.train.validation import shuffle_images

IMAGE = 999  # image_token_id
TOKENS_PER_TILE = 2


def key(number):
    return f"{number:032x}"


def write(directory, samples):
    """samples: (length, keys, grids); ids count up from the sample's number times 20, the last third has loss."""
    with PreparedWriter(directory) as writer:
        for number, (length, keys, grids) in enumerate(samples):
            ids = np.arange(length, dtype=np.int32) + 20 * number
            visual = sum(grid.tiles for grid in grids) * TOKENS_PER_TILE
            ids[1 : 1 + visual] = IMAGE
            supervised = np.zeros(length, np.uint8)
            supervised[-(length // 3) :] = 1
            writer.add(ids, supervised, keys, grids, ShownSample(number, f"sample-{number}", 0, tuple(keys), "q", "a"))
        return writer.commit({"test": 1}, left_out=0, not_in_cache=0)


@pytest.fixture
def data(tmp_path):
    one, wide = Grid(1, 1), Grid(2, 1)
    return write(
        tmp_path / "prepared",
        [(9, [key(1)], [one]), (12, [key(2)], [wide]), (6, [], []), (18, [key(3), key(1)], [one, wide])],
    )


class Features(FeatureSource):
    """Features that carry their image's key: [tiles, 1, 1]."""

    def features(self, keys):
        tiles = {1: 1, 2: 3, 3: 1}
        numbers = [int(key, 16) for key in keys]
        return torch.cat([torch.full((tiles[number], 1, 1), float(number)) for number in numbers])


SOURCE = Features()


def test_assembled_rows_hold_every_token_at_its_place(data):
    batch = assemble(data, [[2, 0], [1]], SOURCE, IMAGE)
    assert batch.ids.shape == (2, 16)  # 15 tokens, rounded up to 8s
    first = data.tokens[data.starts[2] : data.starts[3]]
    assert batch.ids[0, :6].tolist() == first.tolist()
    assert batch.ids[0, 6:15].tolist() == data.tokens[: data.starts[1]].tolist()
    assert batch.positions[0, :15].tolist() == [*range(6), *range(9)]
    assert batch.segments[0].tolist() == [1] * 6 + [2] * 9 + [0]
    assert batch.segments[1].tolist() == [1] * 12 + [0] * 4
    assert batch.features.flatten().tolist() == [1, 2, 2, 2]
    assert (batch.visual_tokens, batch.text_tokens, batch.tiles) == (8, 19, 4)


def test_each_position_predicts_the_next_token_of_its_own_sample(data):
    batch = assemble(data, [[2, 0], [1]], SOURCE, IMAGE)
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.predict_at + 1], batch.targets)
    assert batch.owners.tolist() == [2] * 2 + [0] * 3 + [1] * 4
    segments = batch.segments.flatten()
    assert torch.equal(segments[batch.predict_at], segments[batch.predict_at + 1])


def test_text_only_rows_have_no_features(data):
    assert assemble(data, [[2]], SOURCE, IMAGE).features is None


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    rows_per_step=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_the_steps_show_every_sample_once_an_epoch(lengths, rows_per_step, seed):
    plan = RowPlan(lengths, 50, rows_per_step, rows_per_step, seed)
    steps = plan.steps_for(3)
    seen = list(chain.from_iterable(row for step in range(steps) for row in plan.rows(step)))
    n = len(lengths)
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    rows_per_step=st.integers(1, 7),
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=8),
)
def test_what_a_step_takes_does_not_depend_on_the_steps_before(lengths, rows_per_step, steps):
    plan = RowPlan(lengths, 50, rows_per_step, 1, seed=5)
    for step in steps:
        assert plan.rows(step) == RowPlan(lengths, 50, rows_per_step, 1, seed=5).rows(step)
        assert len(plan.rows(step)) == rows_per_step


@pytest.mark.parametrize(("rows_per_pass", "passes"), [(1, 5), (2, 3), (5, 1), (9, 1)])
def test_passes_split_a_step_and_know_its_supervised_tokens(data, rows_per_pass, passes):
    plan = RowPlan(data.lengths.tolist(), 18, 5, rows_per_pass, seed=0)
    assert plan.passes_per_step == passes
    parts = [make_pass(passes + number, plan, data, SOURCE, IMAGE) for number in range(passes)]
    totals = {part.supervised_of_step for part in parts}
    assert totals == {sum(part.batch.supervised_tokens for part in parts)}
    owners = {int(owner) for part in parts for owner in part.batch.owners}
    assert owners == {sample for row in plan.rows(1) for sample in row}


def test_made_ahead_in_order_and_failures_arrive_in_place():
    def make(number):
        if number == 3:
            raise ValueError("three")
        return number, threading.current_thread() is threading.main_thread()

    ahead = Ahead(make, range(6))
    assert [ahead.next() for _ in range(3)] == [(0, False), (1, False), (2, False)]
    with pytest.raises(ValueError, match="three"):
        ahead.next()
    ahead.close()


def test_prepared_data_is_loaded_only_if_it_is_the_same_and_whole(tmp_path, data):
    directory = tmp_path / "prepared"
    assert load_prepared(directory, {"test": 1}).digest == data.digest
    assert load_prepared(directory, {"test": 2}) is None
    for name in ("tokens.bin", "supervised.bin", "index.safetensors", "prepared.json"):
        whole = (directory / name).read_bytes()
        for damaged in (whole[:-1], b""):
            (directory / name).write_bytes(damaged)
            assert load_prepared(directory, {"test": 1}) is None
        (directory / name).write_bytes(whole)
    assert load_prepared(directory, {"test": 1}) is not None


def test_the_digest_of_prepared_data_is_that_of_its_content(tmp_path):
    samples = [(9, [key(1)], [Grid(1, 1)]), (6, [], [])]
    one, other = write(tmp_path / "a", samples), write(tmp_path / "b", samples)
    changed = write(tmp_path / "c", [(9, [key(2)], [Grid(1, 1)]), (6, [], [])])
    assert one.digest == other.digest != changed.digest


def test_shuffled_images_are_other_images_of_the_same_grids(tmp_path):
    one, wide = Grid(1, 1), Grid(2, 1)
    # five questions about picture 1, three about 2, two about 3; two wide ones; a lonely grid; text only
    pictures = [(1, one)] * 5 + [(2, one)] * 3 + [(3, one)] * 2 + [(4, wide), (5, wide), (6, Grid(1, 2))]
    samples = [(30, [key(number)], [grid]) for number, grid in pictures] + [(9, [], [])]
    data = write(tmp_path / "prepared", samples)
    exchanged = shuffle_images(data)
    assert set(exchanged) == set(range(12))
    for sample, other in exchanged.items():
        assert data.grids_of(sample) == data.grids_of(other)
        assert data.images(sample) != data.images(other)
    assert exchanged == shuffle_images(data)


def test_shuffling_finds_no_image_for_those_that_have_no_other(tmp_path):
    samples = [(30, [key(1)], [Grid(1, 1)])] * 3 + [(30, [key(2)], [Grid(2, 1)])]
    assert shuffle_images(write(tmp_path / "prepared", samples)) == {}


def test_samples_are_found_by_name_and_a_few_with_images_are_shown(tmp_path):
    samples = [(30, [key(1)], [Grid(1, 1)]) if number % 2 else (9, [], []) for number in range(60)]
    data = write(tmp_path / "prepared", samples)
    assert names_of(data.directory, [7, 0, 59]) == ["sample-7", "sample-0", "sample-59"]
    shown = shown_samples(data.directory)
    assert len(shown) == MOST_SHOWN
    assert all(sample.images for sample in shown)
    assert max(sample.sample for sample in shown) > 20  # not just the first ones
    assert shown == shown_samples(write(tmp_path / "again", samples).directory)
    text_only = write(tmp_path / "text", [(9, [], [])] * 3)
    assert [sample.sample for sample in shown_samples(text_only.directory)] == [0, 1, 2]
    (data.directory / "shown.json").unlink()
    assert load_prepared(data.directory, {"test": 1}) is None  # made again
