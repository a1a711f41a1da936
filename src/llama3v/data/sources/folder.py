"""A folder of images, with captions beside them where there are any.

The caption of `photo.jpg` stands in `photo.txt`, or in a `metadata.jsonl` or `captions.jsonl` of its
folder, one object {"file_name": ..., "text": ...} per line (Hugging Face's imagefolder convention). An
image without a caption is a sample without turns: it can be encoded and captioned, not learnt from.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from llama3v.config import CaptionConfig
from llama3v.data.sources.base import FileImage, Rejected, Sample, digest_of, name_of
from llama3v.errors import DataError
from llama3v.model.prompt import Turn

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")


class FolderSource:
    """Every image under a folder, in the order of their relative paths. Names and captions are held in
    memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = name_of(path)
        self._names = sorted(_names_under(path, lambda name: name.lower().endswith(IMAGE_SUFFIXES)))
        if not self._names:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{path}: expected images ({suffixes}) or .parquet files, found none")

    @cached_property
    def digest(self) -> str:
        """Of the images' names and sizes."""
        parts = []
        for name in self._names:
            parts += [os.fsencode(name), str((self.path / name).stat().st_size).encode()]
        return digest_of(*parts)

    def __iter__(self) -> Iterator[Sample | Rejected]:
        captions: dict[str, list[str]] = {}  # an image may have several: each is a sample
        for name, caption in self._listed_captions():
            if isinstance(caption, DataError):
                yield Rejected(name, str(caption))
            else:
                captions.setdefault(name, []).append(caption)
        for name in self._names:
            try:
                listed: list[str] | list[str | None] = captions.pop(name, [])
                for text in listed or [self._caption_beside(name)]:
                    yield Sample(name, (FileImage(name, self.path),), _turns(text))
            except DataError as error:
                yield Rejected(name, str(error))
        for name in captions:
            yield Rejected(name, "has a caption, but there is no such image")

    def image(self, name: str) -> FileImage:
        """The image of that name."""
        return FileImage(name, self.path)

    def _listed_captions(self) -> Iterator[tuple[str, str | DataError]]:
        """Name of an image and its caption, or of a line and what is wrong with it."""
        for listing in sorted(_names_under(self.path, lambda name: name in CAPTION_FILES)):
            with (self.path / listing).open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            name, caption = _read_caption(line)
                            yield (Path(listing).parent / name).as_posix(), caption
                        except DataError as error:
                            yield f"{listing} line {number}", error

    def _caption_beside(self, name: str) -> str | None:
        path = (self.path / name).with_suffix(".txt")
        try:
            caption = path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"its caption {path.name} cannot be read ({error})") from error
        if not caption:
            raise DataError(f"its caption {path.name} is empty")
        return caption


def _turns(caption: str | None) -> tuple[Turn, ...]:
    """The turns that `llama3v caption` would have, asked with its own prompt."""
    if caption is None:
        return ()
    return Turn("user", CaptionConfig.prompt, (0,)), Turn("assistant", caption)


def _read_caption(line: bytes) -> tuple[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON object ({error})") from error
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        raise DataError('expected {"file_name": ..., "text": ...}')
    return name, text.strip()


def _names_under(root: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Relative paths, with "/" on every system. Hidden files and folders are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and wanted(name):
                yield (Path(folder) / name).relative_to(root).as_posix()
