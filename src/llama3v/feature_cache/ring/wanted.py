"""The list of what a trainer wants, as an encoder reads it."""

from bisect import bisect_left
from collections.abc import Iterator
from math import inf

from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.ring.files import RingPaths, WantedImage
from llama3v.model.slicing import Grid


class Wanted:
    """The images of every step, and the steps of every image.

    Attributes:
        end: steps before this one are listed.
    """

    def __init__(self, paths: RingPaths, start: int, first_step: int) -> None:
        self._tail = journal.Tail(paths.wanted(start))
        self._first = self.end = first_step
        self._steps: dict[int, list[WantedImage]] = {}
        self._images: dict[str, WantedImage] = {}
        self._uses: dict[str, list[int]] = {}  # key -> steps, ascending

    def refresh(self, consumed: int) -> None:
        """Read on, and forget the steps before `consumed`.

        Raises:
            CacheError: a line is damaged.
        """
        for entry in self._tail.read():
            step = entry["step"]
            if step != self.end:
                raise CacheError(
                    f"{self._tail.path}: step {self.end} is missing, damaged it seems; stop the training and resume it"
                )
            self._steps[step] = [self._image(*image) for image in entry["images"]]
            for image in self._steps[step]:
                self._uses.setdefault(image.key, []).append(step)
            self.end += 1
        while self._first < min(consumed, self.end):
            for image in self._steps.pop(self._first):
                uses = self._uses[image.key]
                del uses[: bisect_left(uses, consumed)]
            self._first += 1

    def steps(self, first: int, end: int | None = None) -> Iterator[tuple[int, list[WantedImage]]]:
        """(step, its images) from `first` on, as far as they are listed, before `end`."""
        for step in range(first, self.end if end is None else min(end, self.end)):
            yield step, self._steps[step]

    def next_use(self, key: str) -> float:
        """The next step that needs an image; infinity where none is listed."""
        uses = self._uses.get(key)
        return uses[0] if uses else inf

    def _image(self, key: str, source: int, name: str, columns: int, rows: int) -> WantedImage:
        if key not in self._images:
            self._images[key] = WantedImage(key, source, name, Grid(columns, rows))
        return self._images[key]
