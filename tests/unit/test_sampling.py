"""The sampling that all engines share, against transformers' logits processors; stop texts; the fair lock."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama3v.config import Sampling
from llama3v.engines.sampling import Sampler, candidates, logprobs, penalised
from llama3v.engines.stops import StopFinder
from llama3v.engines.turns import FairLock
from llama3v.errors import ConfigError

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.5, top_k=40, top_p=0.9, min_p=0.05),
    Sampling(temperature=5.0, top_p=0.99),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [12, 3000])
def test_the_odds_are_those_of_transformers(sampling: Sampling, vocabulary: int) -> None:
    theirs = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(MinPLogitsWarper(sampling.min_p))
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 3, vocabulary)
        expected = theirs(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
        tokens, odds = candidates(logits, sampling)
        found = np.zeros(vocabulary)
        found[tokens] = odds
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    seen = torch.tensor([[3, 7, 7, 20]])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(seen, torch.from_numpy(logits.copy())[None])[0].numpy()
    found = penalised(logits, {3, 7, 20, 50_000}, 1.4)  # an image token, past the vocabulary, counts for nothing
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_draws_follow_the_odds_and_their_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    draws = [Sampler(Sampling(temperature=1.0, seed=seed)).choose(logits) for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    one, two = (Sampler(Sampling(temperature=1.0, seed=3)) for _ in range(2))
    assert [one.choose(logits) for _ in range(50)] == [two.choose(logits) for _ in range(50)]


def test_a_greedy_answer_with_a_penalty_repeats_nothing_while_something_else_is_near() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[0])
    logits = np.array([4.0, 3.9, 3.8, 1.0])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]


def test_log_probabilities_are_of_the_model_and_not_of_the_sampling() -> None:
    logits = np.random.default_rng(1).normal(0, 2, 300).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    own, others = logprobs(logits, 17, 4)
    assert own == pytest.approx(float(expected[17]))
    assert [token for token, _ in others] == expected.topk(4).indices.tolist()
    assert [value for _, value in others] == pytest.approx(expected.topk(4).values.tolist())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": float("inf")}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"min_p": 1.0}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"stop": ("",)}, "--stop"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_settings_are_refused_by_the_name_of_the_option(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**options)


@settings(deadline=None)
@given(st.text("ab#", max_size=40), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_text_is_found_wherever_pieces_part(text: str, stops: list[str], data: st.DataObject) -> None:
    finder, pieces, rest = StopFinder(stops), [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(finder.push(rest[:size]))
        rest = rest[size:]
        if finder.found:
            break
    found = "".join(pieces) + finder.rest()
    ends = [place for place in range(len(text)) if any(text.startswith(stop, place) for stop in stops)]
    assert finder.found in (stops if ends else [None])
    if finder.found is None:
        assert found == text
    else:  # no stop text is shown, and nothing before the first one is lost
        assert text.startswith(found + finder.found)
        assert not any(stop in found for stop in stops)


def test_nothing_is_held_back_that_cannot_become_a_stop_text() -> None:
    finder = StopFinder(["\n\n", "END"])
    assert [finder.push(piece) for piece in ("one", "\n", "two E", "N", "O")] == ["one", "", "\ntwo ", "", "ENO"]


def test_threads_get_the_lock_in_the_order_in_which_they_came() -> None:
    lock, order, threads = FairLock(), [], []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(lock._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with lock:
        pass  # free again
