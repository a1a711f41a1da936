"""What every data source gives: samples in a fixed order, in flat memory, and a reason for each row that is
none.
"""

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from llama3v.errors import DataError, ImageError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import read_image_file


@dataclass(frozen=True)
class ImageRef(ABC):
    """An image that is read when it is needed. `name` is the same on every machine that holds the data set."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """The bytes of the image file. Raises ImageError."""


@dataclass(frozen=True)
class FileImage(ImageRef):
    """An image file: `name` relative to `directory` (or absolute)."""

    directory: Path

    def read(self) -> bytes:
        """The file's bytes; where `name` is not there, `images/name` is tried, LLaVA's own layout."""
        beside, within = self.directory / self.name, self.directory / "images" / self.name
        return read_image_file(within if not beside.exists() and within.exists() else beside)


@dataclass(frozen=True)
class BytesImage(ImageRef):
    """An image whose bytes stand in the data file itself."""

    data: bytes

    def read(self) -> bytes:
        if not self.data:
            raise ImageError(f"{self.name}: the image has no bytes")
        return self.data


@dataclass(frozen=True)
class Sample:
    """Images and the conversation about them. Without turns, there is something to encode but nothing to
    learn.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why, in one line."""

    id: str
    reason: str


class Source(Protocol):
    """A data set: iterate it for its samples, as often as needed and in the same order each time."""

    @property
    def name(self) -> str:
        """A short name, fit for a directory."""

    @property
    def digest(self) -> str:
        """A digest of the data file(s), 32 hex digits, equal on every machine that holds the same files."""

    def __iter__(self) -> Iterator[Sample | Rejected]: ...


class AddressableSource(Source, Protocol):
    """A data set whose images can also be had in any order: what `open_source` gives."""

    def image(self, name: str) -> ImageRef:
        """The image that a sample had under this name, without looking through the samples for it.

        Raises DataError where that is impossible.
        """


def open_source(spec: str, limit: int | None = None, part: str | None = None) -> AddressableSource:
    """The data set that `spec` names: a LLaVA JSON or JSONL file, a parquet file or a directory of them, or
    a folder of images. `limit` keeps the first N rows, `part` ("2/8") every eighth of these from the second on.
    Raises DataError where there is no such thing.
    """
    # Here, because each source imports this module, and only the one that is asked for need be imported.
    from llama3v.data.sources.cauldron import ParquetSource
    from llama3v.data.sources.folder import FolderSource
    from llama3v.data.sources.llava_json import JsonSource

    if limit is not None and limit < 1:
        raise DataError(f"expected a limit of at least 1 row, found {limit}")
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"{spec}: no such file or folder")
    source: AddressableSource
    if path.is_dir():
        source = ParquetSource(path) if next(path.rglob("*.parquet"), None) else FolderSource(path)
    elif path.suffix.lower() == ".parquet":
        source = ParquetSource(path)
    elif path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        source = JsonSource(path)
    else:
        raise DataError(
            f"{spec}: expected a .json, .jsonl or .parquet file or a folder of images, found {path.suffix or 'a file'}"
        )
    if limit is not None:
        source = _FirstRows(source, limit)
    if part is None:
        return source
    number, of = map(int, part.split("/"))
    return _Part(source, number, of)


@dataclass(frozen=True)
class _FirstRows:
    """The first rows of a source. The digest stays that of the whole: names and images are the same."""

    source: AddressableSource
    limit: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def digest(self) -> str:
        return self.source.digest

    def __iter__(self) -> Iterator[Sample | Rejected]:
        return islice(self.source, self.limit)

    def image(self, name: str) -> ImageRef:
        return self.source.image(name)


@dataclass(frozen=True)
class _Part:
    """Every `of`-th row of a source, from row `number` (1...of) on. The digest stays that of the whole."""

    source: AddressableSource
    number: int
    of: int

    @property
    def name(self) -> str:
        return f"{self.source.name}-part-{self.number}-of-{self.of}"

    @property
    def digest(self) -> str:
        return self.source.digest

    def __iter__(self) -> Iterator[Sample | Rejected]:
        return islice(self.source, self.number - 1, None, self.of)

    def image(self, name: str) -> ImageRef:
        return self.source.image(name)

    def __length_hint__(self) -> int:
        return max(0, -(-(operator.length_hint(self.source) - self.number + 1) // self.of))


def name_of(path: Path) -> str:
    """flickr8k/train.json -> "flickr8k-train": two data sets often share a file name, seldom a folder too."""
    path = path.resolve()
    return path.name if path.is_dir() else f"{path.parent.name}-{path.stem}".strip("-")


def digest_of(*parts: bytes) -> str:
    """BLAKE2b-128 of the parts, each with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
