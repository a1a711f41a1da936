"""KV caches of a runtime that reads for several conversations in one pass (continuous batching). No torch here."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama3v.engines.prefix import Cache, Caches, Cell, Prompt, common, finite
from llama3v.errors import Llama3VError

Found = np.ndarray | None | Exception
"""Of a conversation after a step: the logits of its next token, or that its prompt goes on, or why it cannot."""


class Group(Protocol):
    """A model with the KV caches of several conversations, numbered from 0. Used by one thread at a time."""

    piece_tokens: int
    """Most tokens of a prompt in one pass."""
    worth_copying: int
    """Fewest places for which `copy` is cheaper than to read them again."""

    def read_singles(self, members: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """One more token of each of these conversations, in rising order.

        Returns logits [conversations, vocabulary] that the next pass writes over.
        """
        ...

    def read_piece(self, member: int, new: Sequence[int] | np.ndarray) -> np.ndarray:
        """Several tokens, or any number of embeddings, of one conversation. Logits [vocabulary] after the last one."""
        ...

    def forget(self, member: int, keep: int) -> None:
        """Drop all but the first `keep` places of a conversation."""
        ...

    def copy(self, source: int, target: int, keep: int) -> None:
        """Let a conversation begin with the first `keep` places of another."""
        ...


class _Member:
    """One conversation of a group, as Caches sees it."""

    def __init__(self, group: Group, number: int) -> None:
        self.number = number
        self._group = group

    def forget(self, keep: int) -> None:
        self._group.forget(self.number, keep)


class BatchedCaches(Caches):
    """See Caches; `read_together` is a step of several conversations.

    A prompt is read in pieces. None spans text and visual tokens, and none is a single token unless it stands alone between
    visual ones, so that a prompt gives the same numbers wherever it is cut (engines/llama_group.py).
    """

    def __init__(self, group: Group, conversations: int) -> None:
        super().__init__([_Member(group, number) for number in range(conversations)])  # type: ignore[misc]
        self._group = group

    def read_part(self, owner: object, prompt: Prompt) -> np.ndarray | None:
        """See Caches."""
        [found] = self.read_together([(owner, prompt)])
        if isinstance(found, Exception):
            raise found
        return None if found is None else found.copy()

    def read_together(self, asked: Sequence[tuple[object, Prompt]]) -> list[Found]:
        """One step: the next piece of each prompt. The logits are to be used before the next step.

        What goes wrong with one conversation harms no other; what fails as a whole is tried again one by one.
        """
        with self.lock:
            caches = [self._cache_of(owner, prompt) for owner, prompt in asked]
            try:
                return self._step(caches, [prompt for _, prompt in asked])
            except BaseException:  # an interrupt: nobody knows how far it came
                for cache in caches:
                    cache.shorten(0)
                raise

    def _step(self, caches: Sequence[Cache], prompts: Sequence[Prompt]) -> list[Found]:
        found: list[Found] = [None] * len(caches)
        singles = []
        for place, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
            if len(cache.cells) == len(prompt.cells):  # an interrupt lost the logits
                cache.shorten(len(cache.cells) - 1)
            start = len(cache.cells)
            end = self._end_of_piece(prompt.cells, start)
            if end == start + 1 and not isinstance(prompt.cells[start], tuple):
                singles.append(place)
            else:
                found[place] = self._read_piece(cache, prompt, start, end)
        singles.sort(key=lambda place: caches[place].reader.number)
        # the last pass of the step, so that its logits stay
        for place, logits in zip(singles, self._read_singles([(caches[n], prompts[n]) for n in singles]), strict=True):
            found[place] = logits
        return found

    def _end_of_piece(self, cells: Sequence[Cell], start: int) -> int:
        """Where the piece that begins at `start` ends: with the run of text or of visual tokens, or where it is long."""
        visual = isinstance(cells[start], tuple)
        most = start + self._group.piece_tokens
        end = start + 1
        while end < len(cells) and end <= most and isinstance(cells[end], tuple) == visual:
            end += 1
        if end <= most:
            return end
        # the run goes on; it must not leave a single token
        alone = end == len(cells) or isinstance(cells[end], tuple) != visual
        return most - alone

    def _read_piece(self, cache: Cache, prompt: Prompt, start: int, end: int) -> Found:
        try:
            span = prompt.span(start, end)
            new = np.concatenate(span.visual) if span.visual else span.ids
            logits = self._group.read_piece(cache.reader.number, new)
        except Exception as error:
            cache.shorten(0)  # nobody knows how far it came
            return error
        cache.cells += prompt.cells[start:end]
        return _checked(logits) if end == len(prompt.cells) else None

    def _read_singles(self, singles: Sequence[tuple[Cache, Prompt]]) -> Sequence[Found]:
        if not singles:
            return []
        members = [cache.reader.number for cache, _ in singles]
        tokens = [prompt.ids[len(cache.cells)] for cache, prompt in singles]
        try:
            logits = self._group.read_singles(members, tokens)
        except Llama3VError as error:
            for cache, _ in singles:
                cache.shorten(len(cache.cells))
            if len(singles) == 1:
                singles[0][0].shorten(0)
                return [error]
            alone = [self._read_singles([single])[0] for single in singles]
            return [found.copy() if isinstance(found, np.ndarray) else found for found in alone]
        for cache, prompt in singles:
            cache.cells.append(prompt.cells[len(cache.cells)])
        return [
            _checked(row) if len(cache.cells) == len(prompt.cells) else None
            for row, (cache, prompt) in zip(logits, singles, strict=True)
        ]

    def _keep(self, cache: Cache, prompt: Prompt, keep: int) -> None:
        """As in Caches; but a prompt may begin with more of what another conversation has, which is then copied."""
        wanted = prompt.cells[:-1]
        donor = max(self._caches, key=lambda other: common(other.cells, wanted))
        shared = common(donor.cells, wanted)
        if shared - keep >= self._group.worth_copying:
            keep = _before_a_single(prompt.cells, shared)
            cache.cells.clear()
            self._group.copy(donor.reader.number, cache.reader.number, keep)
            cache.cells += prompt.cells[:keep]
            return
        super()._keep(cache, prompt, _before_a_single(prompt.cells, keep))


def _before_a_single(cells: Sequence[Cell], keep: int) -> int:
    """`keep`, or one less where a single token would be left of a run."""
    kinds = [isinstance(cell, tuple) for cell in cells[max(keep - 1, 0) : keep + 2]]
    if 0 < keep < len(cells) and kinds[0] == kinds[1] and (len(kinds) == 2 or kinds[2] != kinds[1]):
        return keep - 1
    return keep


def _checked(logits: np.ndarray) -> Found:
    try:
        return finite(logits)
    except Llama3VError as error:
        return error
