"""The public forms of benchmarks, row by row: Hugging Face parquet, JSON, JSON lines, TSV with base64 images.

Parquet images are read when they are asked for. Those of a TSV are in memory, encoded as they came.
"""

import base64
import binascii
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.data.sources.base import BytesImage, FileImage, ImageRef
from llama3v.data.sources.cauldron import ImageColumn, ParquetImage, open_parquet, text_rows
from llama3v.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

REFERENCE_LENGTH = 64
"""A TSV image shorter than this is the index of the row that holds it (VLMEvalKit's form)."""


@dataclass(frozen=True)
class Row:
    """One row. `name` (file#number) is what errors say; `values` are its columns without the pixels."""

    name: str
    values: Mapping[str, Any]
    file: Path
    pictures: Mapping[str, tuple[ImageRef, ...]]

    def text(self, *columns: str) -> str:
        """The first of the columns that is there, as text; "" for null. Raises DataError where none is there."""
        value = self.value(*columns)
        return "" if value is None or value != value else str(value)

    def value(self, *columns: str) -> Any:
        for column in columns:
            if column in self.values:
                return self.values[column]
        found = ", ".join(self.values)
        raise DataError(f"{self.name}: expected a column {' or '.join(columns)}, found {found}")

    def texts(self, *columns: str) -> tuple[str, ...]:
        """A list of texts; a lone text counts as a list of one, null as none."""
        value = self.value(*columns)
        if value is None:
            return ()
        return tuple(str(one) for one in value) if isinstance(value, list | tuple) else (str(value),)

    def get(self, column: str, default: Any = "") -> Any:
        value = self.values.get(column)
        return default if value is None or value != value else value

    def images(self, *columns: str) -> tuple[ImageRef, ...]:
        """The images of the first of the columns that is there: pictures in the file, or names of files beside it."""
        for column in columns:
            if column in self.pictures:
                return self.pictures[column]
            if isinstance(self.values.get(column), str):
                return (FileImage(self.values[column], self.file.parent),)
        raise DataError(f"{self.name}: expected images in {' or '.join(columns)}, found neither")

    def has_images(self, column: str) -> bool:
        """Whether the file itself holds the column's pictures."""
        return column in self.pictures

    def in_folder(self, folder: str, column: str, suffix: str = "") -> tuple[ImageRef, ...]:
        """The image file that a column names, in a folder beside the data file."""
        return (FileImage(f"{folder}/{self.text(column)}{suffix}", self.file.parent),)


def find_files(where: str, patterns: Sequence[str]) -> list[Path]:
    """The files of a benchmark: `where` itself, or those under it (or under the hub data set of that name) that the
    first fitting pattern names, in order. Raises DataError.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return [path]
    for pattern in patterns:
        root = path if path.is_dir() else _from_hub(where, pattern)
        found = sorted(root.glob(pattern))
        if found:
            return found
    raise DataError(f"{where}: expected a file like {' or '.join(patterns)}, found none; give the file itself")


def _from_hub(where: str, pattern: str) -> Path:
    """Fetch the files that the pattern names as in a shell; returns the folder in which they lie."""
    if where.count("/") != 1 or where.startswith((".", "~", "/")):
        raise DataError(f"{where}: no such file or folder, nor a hub data set (owner/name)")
    from huggingface_hub import snapshot_download

    deeper = "*/" * (pattern.count("/") + 1) + "*"  # the hub's "*" goes across "/", a shell's does not
    try:
        return Path(snapshot_download(where, repo_type="dataset", allow_patterns=[pattern], ignore_patterns=[deeper]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{where}: cannot be had from the hub ({reason}); download it and give its path") from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by its suffix. Raises DataError, naming the file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix == ".tsv":
        yield from _tsv_rows(path)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        for number, values in enumerate(_json_values(path)):
            if not isinstance(values, dict):
                raise DataError(f"{path.name}#{number}: expected an object, found {type(values).__name__}")
            yield Row(f"{path.name}#{number}", values, path, {})
    else:
        raise DataError(f"{path}: expected a .parquet, .json, .jsonl or .tsv file")


def _parquet_rows(path: Path) -> Iterator[Row]:
    file = open_parquet(path)
    columns = [name for name in file.schema_arrow.names if _holds_images(file.schema_arrow.field(name).type)]
    pixels = {name: ImageColumn(path, name) for name in columns}
    for number, values in enumerate(text_rows(file, path, _without_pixels(file, columns))):
        name = f"{path.name}#{number}"
        if isinstance(values, DataError):
            raise DataError(f"{name}: {values}")
        pictures = {}
        for column in columns:
            value = values.pop(column, None)
            places = range(len(value)) if isinstance(value, list) else range(value is not None)
            pictures[column] = tuple(
                ParquetImage(f"{name}/{column}/{place}", pixels[column], number, place) for place in places
            )
        yield Row(name, values, path, pictures)


def _holds_images(kind: "pa.DataType") -> bool:
    """Bytes, Hugging Face's {bytes, path}, or a list of either."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _without_pixels(file: "pq.ParquetFile", columns: Sequence[str]) -> list[str]:
    """The leaves to read: all but the bytes, where something else tells that there is an image."""
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    told = {leaf.split(".")[0] for leaf in leaves if not leaf.endswith(".bytes")}
    dropped = {leaf for leaf in leaves if leaf.endswith(".bytes") and leaf.split(".")[0] in told.intersection(columns)}
    return [leaf for leaf in leaves if leaf not in dropped]


def _json_values(path: Path) -> Iterator[Any]:
    """The rows of a JSON list, of JSON lines, of {"data": [...]} or {"questions": [...]}, or of {key: row}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            yield from [json.loads(line) for line in text.splitlines() if line.strip()]
            return
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: neither JSON nor JSON lines ({error})") from error
    if isinstance(whole, dict):
        rows = next(
            (whole[key] for key in ("data", "questions", "annotations") if isinstance(whole.get(key), list)), None
        )
        if rows is None and whole and all(isinstance(row, dict) for row in whole.values()):
            rows = [{"key": key, **row} for key, row in whole.items()]
        whole = [whole] if rows is None else rows
    if not isinstance(whole, list):
        raise DataError(f"{path}: expected a list of rows, found {type(whole).__name__}")
    yield from whole


def _tsv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a field holds a whole image
    images: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, values in enumerate(csv.DictReader(file, delimiter="\t")):
                name = f"{path.name}#{number}"
                pictures = {}
                if values.get("image"):
                    text = _own_image(values, images, name)
                    pictures["image"] = (
                        BytesImage(f"{path.name}/{values.get('index', number)}", _decoded(text, name)),
                    )
                others = {key: value for key, value in values.items() if key not in (None, "image")}
                yield Row(name, others, path, pictures)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TSV file ({error})") from error


def _own_image(values: Mapping[str, Any], images: dict[str, str], name: str) -> str:
    """The row's base64 text, or that of the earlier row whose index stands in its place."""
    text, index = str(values["image"]), str(values.get("index"))
    if len(text) >= REFERENCE_LENGTH:
        images[index] = text
    elif text not in images:
        raise DataError(f"{name}: expected an image or the index of an earlier row that has one, found {text!r}")
    else:
        text = images[text]
    return text


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: the image is not base64 ({error})") from error
