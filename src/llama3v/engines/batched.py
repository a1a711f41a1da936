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
    """Most tokens of a prompt in one pass; a multiple of `block`."""
    block: int
    """Tokens that a kernel takes at a time: those that are left over, at the end of a run, go through another one."""
    worth_copying: int
    """Fewest places for which `copy` is cheaper than to read them again."""

    def read_singles(self, members: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """One more token of each of these conversations, in rising order. Returns logits [conversations, vocabulary]."""
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

    A prompt is read in pieces. None spans text and visual tokens, none is a single token unless it stands alone between
    visual ones, and all but the last of a run are whole blocks. What a cache has of a prompt is used up to where the prompt
    alone would be read by other kernels. So a prompt gives the same numbers wherever it is cut (engines/llama_group.py).
    """

    def __init__(self, group: Group, conversations: int) -> None:
        super().__init__([_Member(group, number) for number in range(conversations)])  # type: ignore[misc]
        self._group = group

    def read_part(self, owner: object, prompt: Prompt) -> np.ndarray | None:
        """See Caches."""
        [found] = self.read_together([(owner, prompt)])
        if isinstance(found, Exception):
            raise found
        return found

    def read_together(self, asked: Sequence[tuple[object, Prompt]]) -> list[Found]:
        """One step: the next piece of each prompt. Where there are more of them than caches, some wait: None.

        What goes wrong with one conversation harms no other; what fails as a whole is tried again one by one.
        """
        with self.lock:
            served = self._with_their_caches(asked)
            try:
                found = self._step([cache for cache, _ in served.values()], [prompt for _, prompt in served.values()])
            except BaseException:  # an interrupt: nobody knows how far it came
                for cache, _ in served.values():
                    cache.shorten(0)
                raise
        by_place = dict(zip(served, found, strict=True))
        return [by_place.get(place) for place in range(len(asked))]

    def _with_their_caches(self, asked: Sequence[tuple[object, Prompt]]) -> dict[int, tuple[Cache, Prompt]]:
        """Place in `asked` -> cache and prompt, for as many as there are caches: no two of a step share one."""
        served: dict[int, tuple[Cache, Prompt]] = {}
        holders = {id(cache.owner) for cache in self._caches}
        # those that have one first, so that nobody takes it from them
        for place in sorted(range(len(asked)), key=lambda place: id(asked[place][0]) not in holders):
            if len(served) < len(self._caches):
                owner, prompt = asked[place]
                served[place] = (self._cache_of(owner, prompt, not_of=[asked[other][0] for other in served]), prompt)
        return served

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
        return most - self._group.block * alone

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
            return [self._read_singles([single])[0] for single in singles]
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
        copied = _read_alike(prompt.cells, donor.cells, common(donor.cells, wanted), self._group.block)
        keep = _read_alike(prompt.cells, cache.cells, keep, self._group.block)
        if copied - keep < self._group.worth_copying:
            super()._keep(cache, prompt, keep)
            return
        cache.cells.clear()
        self._group.copy(donor.reader.number, cache.reader.number, copied)
        cache.cells += prompt.cells[:copied]


def _read_alike(now: Sequence[Cell], before: Sequence[Cell], keep: int, block: int) -> int:
    """How many of the first `keep` cells, which are the same in a prompt and in a cache, the prompt alone would be read alike.

    In a run of text or of visual tokens these are the whole blocks; to its end only where it ended there before, too. What is
    left of the run is then more than a single token.
    """
    if not keep:
        return 0
    visual = isinstance(now[keep - 1], tuple)
    if isinstance(now[keep], tuple) != visual and (len(before) == keep or isinstance(before[keep], tuple) != visual):
        return keep
    start, end = keep - 1, keep
    while start > 0 and isinstance(now[start - 1], tuple) == visual:
        start -= 1
    while end < len(now) and isinstance(now[end], tuple) == visual:
        end += 1
    blocks = (keep - start) // block
    if blocks and end - start - blocks * block == 1:
        blocks -= 1
    return start + blocks * block


def _checked(logits: np.ndarray) -> Found:
    try:
        return finite(logits)
    except Llama3VError as error:
        return error
