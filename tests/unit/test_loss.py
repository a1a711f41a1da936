"""The loss is that of the textbook: whatever is packed, accumulated, chunked or left out of the head."""

import pytest
import torch
from torch.nn import functional as F

from llama3v.train import loss as loss_module
from llama3v.train.batches import Batch, attention_mask
from llama3v.train.loop import learning_rate_factor
from llama3v.train.loss import losses_of, supervised_loss
from llama3v.train.parallel.placement import Placement
from llama3v.train.step import head_of, hidden_states, train_step

SAMPLES = ((7, 1), (12, 2), (5, 0))  # tokens, tiles


@pytest.fixture
def model(tiny_model_dir):
    from llama3v.model.llama3v import load_model

    model, _ = load_model(tiny_model_dir)
    return model


def make_samples(model, seed=0):
    """Random samples: ids with image tokens near the start, a mask of supervised tokens, features."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length, tiles in SAMPLES:
        ids = torch.randint(10, 300, (length,), generator=generator)
        ids[1 : 1 + tiles * model.tokens_per_tile] = model.config.image_token_id
        supervised = torch.zeros(length, dtype=torch.bool)
        supervised[length // 2 :] = True
        shape = (tiles, model.vision.grid_side**2, model.vision.width)
        samples.append((ids, supervised, torch.randn(shape, generator=generator)))
    return samples


def make_batch(rows, length):
    """Lay rows of samples into one batch by hand, independently of batches.assemble."""
    ids, positions, segments = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    predict_at, targets, owners, features = [], [], [], []
    for number, row in enumerate(rows):
        begin = 0
        for segment, (sample_ids, supervised, sample_features) in enumerate(row, start=1):
            end = begin + len(sample_ids)
            ids[number, begin:end] = sample_ids
            positions[number, begin:end] = torch.arange(len(sample_ids))
            segments[number, begin:end] = segment
            labelled = supervised.nonzero().flatten()
            predict_at.append(number * length + begin + labelled - 1)
            targets.append(sample_ids[labelled])
            owners.append(torch.full_like(labelled, segment))
            features.append(sample_features)
            begin = end
    return Batch(
        ids=ids,
        positions=positions,
        segments=segments,
        predict_at=torch.cat(predict_at),
        targets=torch.cat(targets),
        owners=torch.cat(owners),
        features=torch.cat(features),
        visual_tokens=0,
        text_tokens=0,
    )


def logits_of(model, batch):
    return hidden_states(model, batch) @ head_of(model).T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_unpacked_logits(model, attention):
    model.llm.set_attn_implementation(attention)
    samples = make_samples(model)
    packed = logits_of(model, make_batch([samples[:2], samples[2:]], length=24))
    alone = [logits_of(model, make_batch([[sample]], length=len(sample[0]))) for sample in samples]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_logits_equal_those_of_the_model_itself(model):
    ids, supervised, features = make_samples(model)[1]
    ours = logits_of(model, make_batch([[(ids, supervised, features)]], length=16))
    theirs = model(input_ids=ids[None], features=features).logits[0, supervised.nonzero().flatten() - 1]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_padding_influences_nothing_and_is_not_nan(model):
    samples = make_samples(model)
    short = logits_of(model, make_batch([samples[:2], samples[2:]], length=19))
    long = logits_of(model, make_batch([samples[:2], samples[2:]], length=64))
    assert torch.isfinite(long).all()
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_a_neighbour_in_the_row_gets_no_gradient(model):
    samples = make_samples(model)
    batch = make_batch([samples[:2]], length=24)
    batch.features.requires_grad_(True)
    first = batch.predict_at < len(samples[0][0])
    logits_of(model, batch)[first].square().sum().backward()
    tiles = SAMPLES[0][1]
    assert batch.features.grad[:tiles].abs().sum() > 0
    assert batch.features.grad[tiles:].abs().sum() == 0


def test_attention_mask_is_causal_within_samples_and_never_empty():
    mask = attention_mask(torch.tensor([[1, 1, 2, 2, 0, 0]]))[0, 0]
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 3, 2**26])
def test_loss_and_gradients_equal_full_logits_whatever_the_chunk(monkeypatch, chunk_bytes):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(0, 11, (10,))
    ours = supervised_loss(hidden, targets, head, 25)
    gradients = torch.autograd.grad(ours * 3, (hidden, head))
    full = F.cross_entropy(hidden @ head.T, targets, reduction="sum") / 25
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(gradients, torch.autograd.grad(full * 3, (hidden, head)))
    torch.testing.assert_close(losses_of(hidden, targets, head).sum() / 25, full.detach())


def test_loss_of_no_position_is_zero():
    empty = torch.zeros(0, 6, requires_grad=True)
    loss = supervised_loss(empty, torch.zeros(0, dtype=torch.long), torch.randn(11, 6), 5)
    loss.backward()
    assert loss == 0
    assert len(losses_of(empty, torch.zeros(0, dtype=torch.long), torch.randn(11, 6))) == 0


def test_head_on_supervised_positions_equals_the_loss_of_full_logits(model):
    ids, supervised, features = make_samples(model)[1]
    batch = make_batch([[(ids, supervised, features)]], length=len(ids))
    ours = supervised_loss(hidden_states(model, batch), batch.targets, head_of(model), batch.supervised_tokens)
    labels = ids.masked_fill(~supervised, -100)
    theirs = model(input_ids=ids[None], features=features, labels=labels[None]).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def with_total(*batches):
    total = sum(batch.supervised_tokens for batch in batches)
    return [(batch, total) for batch in batches]


class _KeepGradients(torch.optim.Optimizer):
    """Instead of a step, remember the gradients."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.gradients = []

    def step(self):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulation_gives_equal_gradients(model, passes):
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.llm.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [[make_samples(model, seed)[which % 3]] for seed, which in enumerate((0, 1, 2, 1))]

    def gradients(passes):
        size = len(rows) // passes
        batches = [make_batch(rows[first : first + size], length=16) for first in range(0, len(rows), size)]
        optimizer = _KeepGradients(trained)
        loss, norm = train_step(Placement(model), optimizer, with_total(*batches), trained, clip_norm=1e9)
        return loss, norm, optimizer.gradients

    once, split = gradients(1), gradients(passes)
    assert once[0] == pytest.approx(split[0], rel=1e-5)
    assert once[1] == pytest.approx(split[1], rel=1e-4)
    for one, other in zip(once[2], split[2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_pass_without_images_trains_nothing_where_only_the_projector_trains(model):
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    trained = list(model.projector.parameters())
    before = [p.clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    passes = with_total(make_batch([[make_samples(model)[2]]], 8))
    loss, norm = train_step(Placement(model), optimizer, passes, trained, clip_norm=1)
    assert loss > 0
    assert norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_a_step_that_is_not_finite_changes_nothing(model):
    trained = list(model.projector.parameters())
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    before = [p.clone() for p in trained]

    trained[0].register_hook(lambda gradient: gradient * float("nan"))
    passes = with_total(make_batch([make_samples(model)], 24))
    _, norm = train_step(Placement(model), optimizer, passes, trained, clip_norm=1)
    assert norm != norm
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert all(p.grad is None for p in trained)


def test_learning_rate_rises_then_falls_to_nearly_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert learning_rate_factor(0, 1, 0.0) == 1.0
