"""One answer in the making: prompt, tokens, pieces of text, and why and when it ended. No torch here."""

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, NoReturn, TypeAlias

import numpy as np

from llama3v.config import Sampling
from llama3v.engines.base import Counts, Finish, Piece, Token
from llama3v.engines.detokenizer import Detokenizer
from llama3v.engines.grammar import Grammar
from llama3v.engines.prefix import Caches, Prompt
from llama3v.engines.sampling import Sampler, logprobs
from llama3v.engines.stops import StopFinder

Steps: TypeAlias = Generator[Piece | None, np.ndarray | None, None]
"""Pieces; and None where the next part of the prompt is to be read, whose logits are sent if it is the last one."""


class _Closed(Exception):  # noqa: N818 - not an error
    """The answer was closed while its prompt was read."""


class Ended:
    """What `CachedGeneration.resume` returns at the end."""


ENDED = Ended()


class CachedGeneration:
    """See Generation (base.py). Whoever reads it does the work, unless an engine steps it with others (together.py).

    Args:
        vocabulary: ids from here on are never answered (the image token, and reserved ones).
        grammar: what the answer obeys.

    Attributes:
        owner: who it is for the caches; not this object, or they would keep it from being collected.
        prompt: grows with the answer.
        reading: held while somebody reads or steps it; `close` leaves the rest to them then.
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
        self.owner = object()
        self.prompt = prompt
        self.reading = threading.Lock()
        self._caches = caches
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocabulary = vocabulary
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._grammar = grammar
        self._closed = threading.Event()
        self._steps = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        with self.reading:
            step = self.resume()
            while step is None:
                try:
                    logits = self._caches.read_part(self.owner, self.prompt)
                except BaseException as error:
                    self.fail(error)
                step = self.resume(logits)
        if isinstance(step, Ended):
            raise StopIteration
        return step

    def resume(self, logits: np.ndarray | None = None) -> Piece | Ended | None:
        """Go on to the next piece, or to where the next part of `prompt` is to be read (None).

        Args:
            logits: of the token after `prompt`, where all of it was read.
        """
        try:
            return self._steps.send(logits)
        except StopIteration:
            return ENDED

    def fail(self, error: BaseException) -> NoReturn:
        """Give up because the prompt cannot be read; raises the error."""
        self._steps.throw(error)
        raise error

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """See Generation."""
        self._closed.set()
        if self.reading.acquire(blocking=False):  # else whoever is reading it sees the flag
            try:
                self._steps.close()
                self.finish = self.finish or "closed"
            finally:
                self.reading.release()

    def _run(self) -> Steps:
        try:
            logits = yield from self._read_prompt()
            yield from self._decode(logits)
        except _Closed:
            self.finish = "closed"
        finally:
            self._caches.end(self.owner)

    def _read_prompt(self) -> Generator[None, np.ndarray | None, np.ndarray]:
        started = time.perf_counter()
        self.counts.cached_tokens = self._caches.begin(self.owner, self.prompt)
        for image in self.prompt.images_from(self.counts.cached_tokens):
            self._go_on()
            image.visual_tokens()  # outside of the model's lock: others answer meanwhile
        seen = time.perf_counter()
        self.counts.vision_seconds = seen - started
        logits = yield from self._read()
        self.counts.prefill_seconds = time.perf_counter() - seen
        return logits

    def _read(self) -> Generator[None, np.ndarray | None, np.ndarray]:
        """Logits of the token after the prompt as it is now."""
        while True:
            self._go_on()
            logits = yield None
            if logits is not None:
                return logits[: self._vocabulary]

    def _go_on(self) -> None:
        if self._closed.is_set():
            raise _Closed

    def _decode(self, logits: np.ndarray) -> Steps:
        sampler = Sampler(self._sampling, self.prompt.ids, self._grammar)
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
                logits = yield from self._next(token)
        rest = "" if stops.found is not None else stops.push(detokenizer.rest()) + stops.rest()
        if rest or tokens:
            yield Piece(rest, tuple(tokens))
        self.finish = finish if stops.found is None else "stop"

    def _next(self, token: int) -> Generator[None, np.ndarray | None, np.ndarray]:
        started = time.perf_counter()
        self.prompt.push(token)
        logits = yield from self._read()
        self.counts.decode_seconds += time.perf_counter() - started
        return logits

    def _described(self, logits: np.ndarray, token: int, alternatives: int) -> Token:
        own, others = logprobs(logits, token, alternatives)
        return Token(token, self._text(token), own, tuple(Token(id, self._text(id), p) for id, p in others))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
