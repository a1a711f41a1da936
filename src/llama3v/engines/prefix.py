"""Prompts as cells, and the KV caches that hold the beginnings of some.

A *cell* is what stands at one place of a KV cache: a token's id, or one visual token of an image, named by the image's
key. Two prompts that begin with the same cells have the same keys and values there, whatever images they are about.
No torch here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llama3v.engines.turns import FairLock
from llama3v.errors import CheckpointError
from llama3v.model.prompt import Rendered
from llama3v.model.slicing import Grid

PART_TOKENS = 512
"""Of a long prompt so many are read in one step: between two steps others get their turn, and it can be cancelled."""

Cell = int | tuple[str, int]


class SeenImage:
    """An image that was decoded: its grid, and its visual tokens once they are needed.

    Args:
        look: gives the visual tokens of all tiles, [tiles * tokens_per_tile, hidden] in the engine's kind of array.
        lock: held while it does; the engine's, since its tower takes one image at a time.
    """

    def __init__(self, key: str, grid: Grid, look: Callable[[], Any], lock: FairLock) -> None:
        self.key = key
        self.grid = grid
        self._look: Callable[[], Any] | None = look
        self._visual_tokens: Any = None
        self._lock = lock

    def visual_tokens(self) -> Any:
        with self._lock:
            if self._look is not None:
                self._visual_tokens = self._look()
                self._look = None  # with the pixels
            return self._visual_tokens


@dataclass(frozen=True)
class Span:
    """A part of a prompt: ids, and the visual tokens that stand where they are the image token's, in runs."""

    ids: list[int]
    visual: list[Any]


class Prompt:
    """What a model is to read: token ids and images. It grows as the answer is made."""

    def __init__(self, rendered: Rendered, images: Sequence[SeenImage]) -> None:
        self.ids = list(rendered.ids)
        self.cells: list[Cell] = list(rendered.ids)
        self._slots = rendered.slots
        self._images = images
        for slot in self._slots:
            key, first = images[slot.image].key, slot.tile * slot.length
            self.cells[slot.start : slot.start + slot.length] = [(key, first + n) for n in range(slot.length)]
        self.visual_count = sum(slot.length for slot in self._slots)

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.cells.append(token)

    def images_from(self, start: int) -> list[SeenImage]:
        """The images of which a part stands at `start` or after it."""
        wanted = {slot.image for slot in self._slots if slot.start + slot.length > start}
        return [self._images[image] for image in sorted(wanted)]

    def span(self, start: int, end: int) -> Span:
        visual = []
        for slot in self._slots:
            first, last = max(start, slot.start), min(end, slot.start + slot.length)
            if first < last:
                offset = slot.tile * slot.length - slot.start
                visual.append(self._images[slot.image].visual_tokens()[first + offset : last + offset])
        return Span(self.ids[start:end], visual)


class Reader(Protocol):
    """A model and one KV cache. Used by one thread at a time."""

    def read(self, start: int, span: Span) -> np.ndarray:
        """Read more from place `start` on; what the cache holds ends there. Logits float32 [vocabulary] of the next."""
        ...

    def forget(self, keep: int) -> None:
        """Drop all but the first `keep` places."""
        ...


@dataclass(eq=False)
class Cache:
    """A KV cache, what it holds, and who is making an answer in it."""

    reader: Any
    cells: list[Cell] = field(default_factory=list)
    owner: object = None
    used: float = 0.0

    def shorten(self, keep: int) -> None:
        """Drop all but the first `keep` cells."""
        del self.cells[keep:]  # first: if forgetting fails, they count as forgotten
        self.reader.forget(keep)


class Caches:
    """The KV caches of an engine. `lock` is held while the model runs."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.lock = FairLock()
        self._caches = [Cache(reader) for reader in readers]

    def __len__(self) -> int:
        return len(self._caches)

    def begin(self, owner: object, prompt: Prompt) -> int:
        """Give the owner a cache, and say how many of the prompt's cells it holds already."""
        with self.lock:
            return len(self._cache_of(owner, prompt).cells)

    def read_part(self, owner: object, prompt: Prompt) -> np.ndarray | None:
        """Read the next part of what the owner's cache lacks; logits when it was the last one.

        Where another took the cache away, the prompt is read from the beginning.
        """
        with self.lock:
            cache = self._cache_of(owner, prompt)
            start = len(cache.cells)
            end = min(start + PART_TOKENS, len(prompt.cells))
            try:
                logits = cache.reader.read(start, prompt.span(start, end))
            except BaseException:  # an interrupt among them: nobody knows how far it came
                cache.shorten(0)
                raise
            cache.cells += prompt.cells[start:end]
        return finite(logits) if end == len(prompt.cells) else None

    def end(self, owner: object) -> None:
        """The owner needs its cache no more; what it holds stays for others. Never waits: garbage collection calls it."""
        for cache in self._caches:
            if cache.owner is owner:
                cache.owner = None

    def _cache_of(self, owner: object, prompt: Prompt, not_of: Sequence[object] = ()) -> Cache:
        """The owner's cache; else one that is free; else one that is taken from another, though not from those of `not_of`."""
        for cache in self._caches:
            if cache.owner is owner:
                return cache
        wanted = prompt.cells[:-1]  # at least the last cell is read, for its logits
        free = [cache for cache in self._caches if cache.owner is None]
        free = free or [cache for cache in self._caches if all(cache.owner is not other for other in not_of)]
        cache = self._choose(free, wanted)
        cache.owner = owner
        self._keep(cache, prompt, common(cache.cells, wanted))
        cache.used = time.monotonic()
        return cache

    def _keep(self, cache: Cache, prompt: Prompt, keep: int) -> None:
        """Prepare a cache for a prompt that it shares its first `keep` cells with."""
        if keep < len(cache.cells):
            cache.shorten(keep)

    def _choose(self, free: Sequence[Cache], wanted: Sequence[Cell]) -> Cache:
        """The cache with most of these cells, among equals the one used longest ago; which it is where none has enough of
        them, too.
        """
        best = max(free, key=lambda cache: (common(cache.cells, wanted), -cache.used))
        if worth_keeping(common(best.cells, wanted), wanted):
            return best
        return min(free, key=lambda cache: (bool(cache.cells), cache.used))


def worth_keeping(shared: int, wanted: Sequence[Cell]) -> bool:
    """Whether the first cells that a cache has of those wanted are half of them, or have an image among them."""
    return 2 * shared >= len(wanted) or any(isinstance(cell, tuple) for cell in wanted[:shared])


def finite(logits: np.ndarray) -> np.ndarray:
    """The logits. Raises CheckpointError where they are NaN."""
    if np.isnan(logits.max()):  # which NaN passes through, in one pass over the vocabulary
        raise CheckpointError(
            "expected numbers from the model, found NaN; its weights are damaged, use another checkpoint"
        )
    return logits


def common(before: Sequence[Cell], now: Sequence[Cell]) -> int:
    """How many cells the two begin with together."""
    for place, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new:
            return place
    return min(len(before), len(now))
