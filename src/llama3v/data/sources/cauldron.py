"""Parquet with the images inside: the_cauldron, FineVision, LLaVA-OneVision-Data.

A row has `images` (a list, one or null) or `image`, and `texts` (a list of {user, assistant}), or LLaVA's
`conversations`, or `messages`. Iterating reads no image bytes; an image is read when it is asked for, a few
rows at a time, so that training over the cache never touches pixels, and memory is bounded by the file's pages (of
a megabyte or more, as their writer chose), not by its size.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.data.sources.base import ImageRef, Rejected, Sample, digest_of, name_of
from llama3v.data.sources.conversation import read_conversation, without_marks
from llama3v.errors import DataError, ImageError
from llama3v.model.tiles import read_image_file

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

TEXT_ROWS = 512
"""Rows of text in memory at a time."""
IMAGE_ROWS = 16
"""Rows of images in memory at a time."""
BUFFER_BYTES = 2**20


class ParquetSource:
    """A parquet file, or every parquet file under a directory in the order of their names."""

    def __init__(self, path: Path) -> None:
        self.name = name_of(path)
        self._root = path if path.is_dir() else path.parent
        self._files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        self._columns: dict[str, ImageColumn] = {}  # of the files that `image` was asked about

    @cached_property
    def digest(self) -> str:
        """Of each file's name, size and footer: sets of hundreds of gigabytes cannot be hashed at each
        start, and the footer holds the place, size and statistics of every column chunk.
        """
        parts = []
        for path in self._files:
            parts += [self._name(path).encode(), str(path.stat().st_size).encode(), _footer(path)]
        return digest_of(*parts)

    def __iter__(self) -> Iterator[Sample | Rejected]:
        for path in self._files:
            yield from self._read(path)

    def image(self, name: str) -> ImageRef:
        """The image of a name such as "train/0.parquet#17/0": file, row, place in the row."""
        file_and_row, _, place = name.rpartition("/")
        file, _, row = file_and_row.rpartition("#")
        if file not in self._columns:
            path = self._root / file
            column = _image_column(open_parquet(path))
            if column is None:
                raise DataError(f"{path}: expected a column images or image, found none")
            self._columns[file] = ImageColumn(path, column)
        return ParquetImage(name, self._columns[file], int(row), int(place))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _read(self, path: Path) -> Iterator[Sample | Rejected]:
        file = open_parquet(path)
        columns = file.schema_arrow.names
        image = _image_column(file)
        text = next((name for name in ("texts", "conversations", "messages") if name in columns), None)
        if text is None:
            found = ", ".join(columns)
            raise DataError(f"{path}: expected a column texts, conversations or messages, found {found}")
        wanted = [name for name in (text, "id", "idx") if name in columns] + _without_bytes(file, image)
        pictures = ImageColumn(path, image or "")
        for number, row in enumerate(text_rows(file, path, wanted)):
            id = name = f"{self._name(path)}#{number}"
            try:
                if isinstance(row, DataError):
                    raise row
                id = next((str(row[key]) for key in ("id", "idx") if row.get(key) is not None), id)
                places = _image_places(row[image]) if image else []
                turns, owned = read_conversation(_messages(text, row[text]), places)
                images = [ParquetImage(f"{name}/{place}", pictures, number, place) for place in owned]
                yield Sample(id, tuple(images), turns)
            except DataError as error:
                yield Rejected(id, str(error))


@dataclass(frozen=True)
class ParquetImage(ImageRef):
    """Image `place` of row `row`. Reading in the order of the rows is quick; at random it is slow."""

    column: "ImageColumn"
    row: int
    place: int

    def read(self) -> bytes:
        image = self.column.value(self.row, self.name)
        if isinstance(image, list):
            image = image[self.place]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            raise ImageError(f"{self.name}: the image has neither bytes nor a path")
        return read_image_file(self.column.path.parent / image) if isinstance(image, str) else image


class ImageColumn:
    """The image column of one file: a few rows of it in memory, moving forward, or anew to go back."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self._name = path, name
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._values: pa.Array | None = None
        self._start = self._end = 0  # the rows that _values holds

    def value(self, row: int, name: str) -> Any:
        """What the column holds in a row, as Python objects."""
        import pyarrow as pa

        with self._lock:
            try:
                if not self._start <= row < self._end:
                    self._move_to(row)
                assert self._values is not None
                return self._values[row - self._start].as_py()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                self._group, self._start, self._end = -1, 0, 0
                raise ImageError(f"{name}: cannot be read from {self.path} ({_one_line(error)})") from error

    def _move_to(self, row: int) -> None:
        self._file = self._file or open_parquet(self.path)
        group, first = _row_group(self._file, row)
        if group != self._group or row < self._start:
            self._batches = self._file.iter_batches(IMAGE_ROWS, row_groups=[group], columns=[self._name])
            self._group, self._end = group, first
        while row >= self._end:
            batch = next(self._batches)
            self._start, self._end = self._end, self._end + len(batch)
            self._values = batch.column(0)


def _image_column(file: "pq.ParquetFile") -> str | None:
    return next((name for name in ("images", "image") if name in file.schema_arrow.names), None)


def _row_group(file: "pq.ParquetFile", row: int) -> tuple[int, int]:
    """The row group that holds a row, and that group's first row."""
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            return group, first
        first += count
    raise IndexError(f"row {row} of {first}")


def text_rows(file: "pq.ParquetFile", path: Path, columns: list[str]) -> Iterator[Any]:
    """Rows as dicts, in flat memory; a DataError in place of a row whose text is not UTF-8."""
    import pyarrow as pa

    batches, count = file.iter_batches(TEXT_ROWS, columns=columns), 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: broken at row {count} or soon after ({_one_line(error)})") from error
        if batch is None:
            return
        yield from (_row(batch, place) for place in range(len(batch)))
        count += len(batch)


def _row(batch: "pa.RecordBatch", place: int) -> dict[str, Any] | DataError:
    try:
        return batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return DataError(f"a text is not UTF-8 ({error.reason})")


def _messages(column: str, value: Any) -> Any:
    """`texts` as messages. Its images come first by convention, so a mark in the text says nothing and is
    left out.
    """
    if column != "texts" or not isinstance(value, list):
        return value
    messages = []
    for pair in value:
        for role in ("user", "assistant"):
            text = pair.get(role) if isinstance(pair, dict) else pair
            messages.append({"role": role, "content": without_marks(text) if isinstance(text, str) else text})
    return messages


def _image_places(value: Any) -> list[int]:
    """Which places of a row hold an image: the column may be null, one image, or a list with nulls in it."""
    if isinstance(value, list):
        return [place for place, image in enumerate(value) if image is not None]
    return [] if value is None else [0]


def _without_bytes(file: "pq.ParquetFile", image: str | None) -> list[str]:
    """The parts of the image column that tell how many images there are: all but the bytes, if possible."""
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    parts = [leaf for leaf in leaves if leaf.split(".")[0] == image]
    return [leaf for leaf in parts if not leaf.endswith(".bytes")] or parts


def open_parquet(path: Path) -> "pq.ParquetFile":
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        message = f"{path}: reading parquet needs pyarrow; run: pip install 'llama3v[parquet]'"
        raise DataError(message) from error
    try:
        # Both, or else whole column chunks are loaded: with one row group, all images of the file.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file ({_one_line(error)})") from error


def _footer(path: Path) -> bytes:
    """The metadata at the end of a parquet file: ..., metadata, its length (4 bytes), "PAR1"."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > size - 8:
            raise DataError(f"{path}: not a whole parquet file (its end is missing)")
        file.seek(size - 8 - length)
        return file.read(length)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
