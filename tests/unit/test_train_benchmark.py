"""benchmarks/train.py runs; and what it watches is so: no tensor of [tokens, vocabulary] ever exists in a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
VOCABULARY, CHUNK_ROWS = 3000, 32


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def samples_and_shape():  # type: ignore[no-untyped-def]
    from benchmarks.train_shapes import TINY, LlmShape, ModelShape, random_samples

    shape = ModelShape(TINY.tower, LlmShape(32, 2, 4, 2, 64, VOCABULARY))
    return random_samples(4, [1, 3], (40, 120), 0.8), shape


def step_of_ours(samples, shape, trains):  # type: ignore[no-untyped-def]
    """(model, its step as the trainer takes it, tokens, supervised tokens)"""
    from benchmarks.train_shapes import RandomFeatures, prepared, random_model
    from benchmarks.train_step import adamw, optimizer_step, set_modes, trained
    from llama3v.train.batches import assemble

    data = prepared(samples, shape)
    model = random_model(shape)
    model.projector.requires_grad_("projector" in trains)
    model.llm.requires_grad_("llm" in trains)
    set_modes(model)
    batch = assemble(data, [[0, 1], [2, 3]], RandomFeatures(shape.tower), shape.llm.vocabulary)
    optimizer = adamw(trained(model))
    return model, lambda: optimizer_step(model, optimizer, [(batch, batch.supervised_tokens)]), batch


@pytest.mark.parametrize("trains", [("projector",), ("llm",), ("projector", "llm")])
def test_no_tensor_of_tokens_times_vocabulary_ever_exists(  # type: ignore[no-untyped-def]
    samples_and_shape, trains, monkeypatch
) -> None:
    from benchmarks.train_logits import LogitsSeen
    from llama3v.train import loss

    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * VOCABULARY * CHUNK_ROWS)
    model, step, batch = step_of_ours(*samples_and_shape, trains)
    assert batch.supervised_tokens > 4 * CHUNK_ROWS
    with LogitsSeen(VOCABULARY, model) as seen:
        step()
    assert seen.most_rows == CHUNK_ROWS  # and not one row more, on the way there or back


def test_the_watch_sees_full_logits_where_there_are_some(samples_and_shape) -> None:  # type: ignore[no-untyped-def]
    from benchmarks.train_logits import LogitsSeen
    from benchmarks.train_shapes import prepared
    from benchmarks.train_step import adamw, trained
    from benchmarks.train_usual import UsualModel, padded, usual_step

    samples, shape = samples_and_shape
    model = UsualModel(shape, 2, trains=("projector", "llm"))
    batch = padded(prepared(samples, shape), range(4), sum(sample.tiles for sample in samples), shape.tower.tile_size)
    optimizer = adamw(trained(model))
    with LogitsSeen(VOCABULARY, model) as seen:
        usual_step(model, optimizer, batch)
    assert seen.most_rows >= batch.ids.numel()


def test_both_ways_have_the_same_loss_on_the_same_samples(samples_and_shape) -> None:  # type: ignore[no-untyped-def]
    """So what the benchmark compares is one computation done in two ways."""
    from benchmarks.train_shapes import prepared, random_model
    from benchmarks.train_step import pass_loss
    from benchmarks.train_usual import UsualModel, padded
    from llama3v.train.batches import assemble
    from llama3v.train.features.base import FeatureSource

    samples, shape = samples_and_shape
    data, ours = prepared(samples, shape), random_model(shape)
    usual = UsualModel(shape, 2, trains=())
    usual.projector.load_state_dict(ours.projector.state_dict())
    usual.llm.load_state_dict(ours.llm.state_dict())
    batch = padded(data, range(4), sum(sample.tiles for sample in samples), shape.tower.tile_size)
    with torch.no_grad():
        features = usual.vision(pixel_values=batch.pixels).last_hidden_state
    starts = [sum(sample.tiles for sample in samples[:number]) for number in range(4)]

    class Live(FeatureSource):
        def features(self, keys):  # type: ignore[no-untyped-def]
            numbers = [int(key[:30]) for key in keys]
            return torch.cat([features[starts[n] : starts[n] + samples[n].tiles] for n in numbers])

    rows = assemble(data, [[2, 0], [3, 1]], Live(), shape.llm.vocabulary)
    with torch.no_grad():
        assert float(pass_loss(ours, rows, rows.supervised_tokens)) == pytest.approx(float(usual(batch)), rel=1e-4)


@pytest.mark.slow  # a benchmark in small, half a minute of both cores
@pytest.mark.timeout(900)
def test_the_quick_benchmark_writes_every_row(tmp_path: Path) -> None:
    from benchmarks.train import Options, main

    path = tmp_path / "train.json"
    main(Options(json=path, quick=True, rounds=1))
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert (
        rows["the most rows of logits that exist at once"]["ours"]
        < rows["the most rows of logits that exist at once"]["limit"]
    )
    assert sum("beside the usual way" in name for name in rows) == 5
    assert sum("beside ours without" in name for name in rows) == 3
    assert sum("where the time of ours goes" in name for name in rows) == 4
