"""The next token out of logits: one page of numpy that every engine shares, so a seed draws alike in each.

The order and the meaning of the steps are those of transformers' logits processors. No torch here.
"""

from collections.abc import Iterable

import numpy as np

from llama3v.config import Sampling
from llama3v.engines.grammar import Grammar

_FEW = 1024  # sorting 128k tokens takes 10 ms, finding the largest ones 1 ms; top-p rarely needs more of them


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        prompt: ids of the prompt's tokens; with those chosen here, what the repetition penalty counts as repeated.
        grammar: says which tokens may be chosen; default: all.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = (), grammar: Grammar | None = None) -> None:
        self.sampling = sampling
        self._grammar = grammar
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def choose(self, logits: np.ndarray) -> int:
        """The next token out of logits float [vocabulary]. Raises PromptError as Grammar.allowed does."""
        sampling = self.sampling
        if self._grammar is not None:
            logits = self._grammar.allowed(logits)
        if sampling.repetition_penalty != 1:
            logits = penalised(logits, self._seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            tokens, odds = candidates(logits, sampling)
            token = int(self._random.choice(tokens, p=odds))
        if sampling.repetition_penalty != 1:
            self._seen.add(token)
        if self._grammar is not None:
            self._grammar.push(token)
        return token


def penalised(logits: np.ndarray, seen: Iterable[int], penalty: float) -> np.ndarray:
    """A copy in which tokens that were seen lose: positive logits are divided, negative ones multiplied."""
    logits = logits.copy()
    places = np.fromiter((token for token in seen if token < len(logits)), dtype=np.int64)
    values = logits[places]
    logits[places] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, the likeliest first, and their probabilities, which sum to 1."""
    logits = logits.astype(np.float64)
    odds = np.exp((logits - logits.max()) / sampling.temperature)
    odds /= odds.sum()
    tokens = _likeliest(odds, sampling)
    odds = odds[tokens]
    if sampling.top_k:
        odds = odds / odds.sum()  # top-p counts within what top-k left
    if sampling.top_p < 1:
        before = np.cumsum(odds) - odds  # what stands before a token: the one that crosses the border is kept
        odds = odds[before < sampling.top_p]
    odds = odds[odds >= sampling.min_p * odds[0]]
    return tokens[: len(odds)], odds / odds.sum()


def _likeliest(odds: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Ids in falling order of odds: `top_k` of them, or as many as top-p can need, or all."""
    if sampling.top_k and sampling.top_k < len(odds):
        return _largest(odds, sampling.top_k)
    if sampling.top_p < 1 and len(odds) > _FEW:
        few = _largest(odds, _FEW)
        if odds[few].sum() >= sampling.top_p:
            return few
    return np.argsort(-odds, kind="stable")


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, the largest first."""
    found = np.sort(np.argpartition(-values, count - 1)[:count])  # ties in the order of their ids
    return found[np.argsort(-values[found], kind="stable")]


def logprobs(logits: np.ndarray, token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probability of `token`, and the `alternatives` likeliest (id, log-probability), before any sampling."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max()
    logits -= np.log(np.exp(logits).sum())
    best = _largest(logits, min(alternatives, len(logits))) if alternatives else np.zeros(0, np.int64)
    return float(logits[token]), [(int(place), float(logits[place])) for place in best]
