"""Answers that are made at the same time, in the same passes of the model: continuous batching.

There is no thread of its own. Of those who wait for their answers one steps all of them, until its own has ended; then
another goes on.
"""

import threading
from collections.abc import Callable

from llama3v.engines.base import Piece
from llama3v.engines.batched import BatchedCaches, Found
from llama3v.engines.generation import CachedGeneration, Ended
from llama3v.engines.turns import FairLock

Hear = Callable[[Piece], None]


class _Answer:
    """An answer in the making."""

    def __init__(self, generation: CachedGeneration, hear: Hear) -> None:
        self.generation = generation
        self.error: BaseException | None = None
        self.ended = False
        self.turn = threading.Event()  # it has ended, or whoever waits for it is to step all
        self._hear = hear

    def go_on(self, found: Found) -> None:
        """Take what a step found, and pass on what is said, up to where more is to be read. Never raises."""
        try:
            if isinstance(found, Exception):
                self.generation.fail(found)
            step = self.generation.resume(found)
            while isinstance(step, Piece):
                self._hear(step)
                step = self.generation.resume()
            self.ended = isinstance(step, Ended)
        except Exception as error:
            self.error, self.ended = error, True


class Together:
    """The answers of one engine that are in work.

    Args:
        caches: the engine's.
    """

    def __init__(self, caches: BatchedCaches) -> None:
        self._caches = caches
        self._lock = FairLock()  # held for a step; who comes or goes waits for its end
        self._answers: list[_Answer] = []
        self._leader: _Answer | None = None

    def run(self, generation: CachedGeneration, hear: Hear) -> None:
        """Make an answer. `hear` gets its pieces, maybe in another thread; it must not wait.

        Images are looked at in the caller's thread, beforehand. Raises what reading the generation would raise.
        """
        with generation.reading:
            answer = _Answer(generation, hear)
            answer.go_on(None)  # up to its first part: the tower
            if not answer.ended:
                self._make(answer)
        if answer.error is not None:
            raise answer.error

    def _make(self, answer: _Answer) -> None:
        with self._lock:
            self._answers.append(answer)
            if self._leader is None:
                self._lead(answer)
        try:
            answer.turn.wait()
            while not answer.ended:
                with self._lock:
                    self._step()
        finally:
            with self._lock:
                if answer in self._answers:  # interrupted
                    self._answers.remove(answer)
                if self._leader is answer:
                    self._lead(self._answers[0] if self._answers else None)

    def _lead(self, answer: _Answer | None) -> None:
        self._leader = answer
        if answer is not None:
            answer.turn.set()

    def _step(self) -> None:
        for answer in self._answers:
            if answer.generation.closed:
                answer.go_on(None)
        self._take_out_the_ended()
        reading = list(self._answers)
        asked = [(answer.generation.owner, answer.generation.prompt) for answer in reading]
        for answer, found in zip(reading, self._caches.read_together(asked), strict=True):
            answer.go_on(found)
        self._take_out_the_ended()

    def _take_out_the_ended(self) -> None:
        ended = [answer for answer in self._answers if answer.ended]
        for answer in ended:
            self._answers.remove(answer)
            answer.turn.set()
