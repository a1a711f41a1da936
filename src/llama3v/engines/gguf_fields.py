"""The metadata of a GGUF file, without the package gguf, whose import alone would be a fifth of a start.

Format: docs/gguf.md of ggml-org/ggml, versions 2 and 3, little-endian. No torch here.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from llama3v.engines.llama_api import require_gguf
from llama3v.errors import CheckpointError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ELEMENT_BYTES = {0: 4, 1: 2, 30: 2}  # F32, F16, BF16: what mmproj.gguf is made of
_MOST_DIMENSIONS = 4


def read_fields(path: Path) -> dict[str, Any]:
    """Metadata by name. Raises CheckpointError for another kind of file, and for one that is damaged or cut short."""
    require_gguf(path)
    try:
        with path.open("rb") as file:
            return _Header(file, path.stat().st_size).fields()
    except (EOFError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); export the model again") from error


class _Header:
    """What stands before the tensors' values."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def fields(self) -> dict[str, Any]:
        self._take(4)  # GGUF
        version, tensors, count = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise ValueError(f"expected GGUF version 2 or 3, found {version}")
        found = {}
        for _ in range(count):
            name = self._text()
            found[name] = self._value(self._number("I"))
        end = max((self._end_of_tensor() for _ in range(tensors)), default=0)
        alignment = int(found.get("general.alignment", 32))
        values = -(-self._file.tell() // alignment) * alignment
        if values + end > self._size:
            raise EOFError(f"{values + end - self._size} bytes are missing")
        return found

    def _end_of_tensor(self) -> int:
        """Where a tensor ends, counted from the first one; where it begins if its type is not known here."""
        self._text()
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("Q")
        kind, offset = self._number("I"), self._number("Q")
        return offset + elements * _ELEMENT_BYTES.get(kind, 0)

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            return [self._value(kind) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) < count:
            raise EOFError("the file ends too early")
        return data
