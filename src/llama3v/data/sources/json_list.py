"""A JSON list of any size, element by element, in flat memory.

Data sets of a million rows come as one JSON list of gigabytes. (The ijson library streams too, but its
memory grows with the square of the nesting, so that one broken file kills the process, and it turns a lone
surrogate silently into "?".)
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llama3v.errors import DataError

CHUNK = 2**20
"""Characters that are read at a time."""
MAX_ROW = 2**26
"""An element of more than 64 M characters is taken for a broken file, rather than read into memory to its
end.
"""

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_list(path: Path) -> Iterator[Any]:
    """The elements of the list. Raises DataError, naming the place, where the file is broken."""
    with path.open(encoding="utf-8-sig") as file:
        yield from _ListReader(file, path)


class _ListReader:
    """A window of text that slides over the file: at any time, a chunk and one element are in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place, self._ended = "", 0, False
        self._count = 0
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        while self._next_character() != "]":
            if self._count:
                self._expect(",")
            row = self._element()
            self._count += 1
            yield row
        self._expect("]")
        if self._next_character():
            raise self._broken("expected the end of the file")

    def _element(self) -> Any:
        """The standard decoder cannot tell an element that the end of the window cuts off from one that is
        broken. So more is read until it succeeds, the file ends, or the element is longer than any row can
        be.
        """
        self._next_character()
        while True:
            try:
                element, end = self._decoder.raw_decode(self._text, self._place)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._ended or len(self._text) - self._place > MAX_ROW:
                    raise self._broken(getattr(error, "msg", "nested too deeply")) from error
            else:
                if end < len(self._text) or self._ended:  # otherwise a number may go on in the next chunk
                    self._place = end
                    return element
            self._read_more()

    def _next_character(self) -> str:
        """The first character that is no space, left in place; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None, "the pattern matches the empty string too"
            self._place = space.end()
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read_more()

    def _expect(self, character: str) -> None:
        found = self._next_character()
        if found != character:
            raise self._broken(f"expected {character}" if found else "the file ends within the list")
        self._place += 1

    def _read_more(self) -> None:
        # At least what is pending, so that a long element is parsed a few times only.
        try:
            more = self._file.read(max(CHUNK, len(self._text) - self._place))
        except UnicodeDecodeError as error:
            raise self._broken(f"not UTF-8 ({error.reason})") from error
        self._text, self._place, self._ended = self._text[self._place :] + more, 0, not more

    def _broken(self, reason: str) -> DataError:
        near = self._text[self._place : self._place + 60]
        return DataError(f"{self._path}: broken JSON after row {self._count}, at {near!r}: {reason}")
