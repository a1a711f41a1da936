"""One answer in the making: prompt, tokens, pieces of text, and why and when it ended. No torch here."""

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from llama3v.config import Sampling
from llama3v.engines.base import Counts, Finish, Piece, Token
from llama3v.engines.detokenizer import Detokenizer
from llama3v.engines.grammar import Grammar
from llama3v.engines.prefix import Caches, Prompt
from llama3v.engines.sampling import Sampler, logprobs
from llama3v.engines.stops import StopFinder


class _Closed(Exception):  # noqa: N818 - not an error
    """The answer was closed while its prompt was read."""


class CachedGeneration:
    """See Generation (base.py). The work is done by whoever reads it.

    Args:
        vocabulary: ids from here on are never answered (the image token, and reserved ones).
        grammar: what the answer obeys.
    """

    def __init__(
        self,
        caches: Caches,
        prompt: Prompt,
        tokenizer: Any,
        stop_ids: tuple[int, ...],
        vocabulary: int,
        max_new_tokens: int,
        sampling: Sampling,
        grammar: Grammar | None = None,
    ) -> None:
        self.counts = Counts(prompt_tokens=len(prompt.ids), visual_tokens=prompt.visual_count)
        self.finish: Finish | None = None
        self._caches = caches
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocabulary = vocabulary
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._grammar = grammar
        self._closed = threading.Event()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """See Generation."""
        self._closed.set()
        try:
            self._pieces.close()
        except ValueError:  # another thread is reading it: it sees the flag
            return
        self.finish = self.finish or "closed"

    def _run(self) -> Generator[Piece, None, None]:
        owner = object()  # not this object, or the caches would keep it from being collected
        try:
            logits = self._read_prompt(owner)
            yield from self._decode(owner, logits)
        except _Closed:
            self.finish = "closed"
        finally:
            self._caches.end(owner)

    def _read_prompt(self, owner: object) -> np.ndarray:
        started = time.perf_counter()
        self.counts.cached_tokens = self._caches.begin(owner, self._prompt)
        for image in self._prompt.images_from(self.counts.cached_tokens):
            self._go_on()
            image.visual_tokens()  # outside of the model's lock: others answer meanwhile
        seen = time.perf_counter()
        self.counts.vision_seconds = seen - started
        logits = self._read(owner)
        self.counts.prefill_seconds = time.perf_counter() - seen
        return logits

    def _read(self, owner: object) -> np.ndarray:
        """Logits of the token after the prompt as it is now."""
        while True:
            self._go_on()
            logits = self._caches.read_part(owner, self._prompt)
            if logits is not None:
                return logits[: self._vocabulary]

    def _go_on(self) -> None:
        if self._closed.is_set():
            raise _Closed

    def _decode(self, owner: object, logits: np.ndarray) -> Iterator[Piece]:
        sampler = Sampler(self._sampling, self._prompt.ids, self._grammar)
        detokenizer, stops = Detokenizer(self._tokenizer), StopFinder(self._sampling.stop)
        tokens: list[Token] = []  # since the last piece
        finish: Finish = "length"
        for made in range(1, self._max_new_tokens + 1):
            token = sampler.choose(logits)
            if token in self._stop_ids:
                finish = "stop"
                break
            self.counts.new_tokens = made
            if self._sampling.logprobs is not None:
                tokens.append(self._described(logits, token, self._sampling.logprobs))
            text = stops.push(detokenizer.push(token))
            if text:
                yield Piece(text, tuple(tokens))
                tokens.clear()
            if stops.found is not None:
                finish = "stop"
                break
            if made < self._max_new_tokens:
                logits = self._next(owner, token)
        rest = "" if stops.found is not None else stops.push(detokenizer.rest()) + stops.rest()
        if rest or tokens:
            yield Piece(rest, tuple(tokens))
        self.finish = finish if stops.found is None else "stop"

    def _next(self, owner: object, token: int) -> np.ndarray:
        started = time.perf_counter()
        self._prompt.push(token)
        logits = self._read(owner)
        self.counts.decode_seconds += time.perf_counter() - started
        return logits

    def _described(self, logits: np.ndarray, token: int, alternatives: int) -> Token:
        own, others = logprobs(logits, token, alternatives)
        return Token(token, self._text(token), own, tuple(Token(id, self._text(id), p) for id, p in others))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
