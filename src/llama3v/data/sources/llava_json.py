"""LLaVA's JSON and JSONL, and their relatives: ShareGPT, ALLaVA, Cambrian, MiniCPM, OpenAI messages.

Image paths are relative to the data file's directory; where nothing is there, to the directory `images`
beside it.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from llama3v.data.sources.base import BytesImage, FileImage, ImageRef, Rejected, Sample, digest_of, name_of
from llama3v.data.sources.conversation import MARK, read_conversation
from llama3v.data.sources.json_list import MAX_ROW, read_json_list
from llama3v.errors import DataError

_NAMED_MARK = re.compile(r"<image_\d+>")


class JsonSource:
    """A JSON list (read piece by piece) or one JSON object per line. Which of the two, the first character
    says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = name_of(path)

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def __iter__(self) -> Iterator[Sample | Rejected]:
        for number, row in self._rows():
            id = _id_of(row, number)
            try:
                if isinstance(row, DataError):
                    raise row
                yield self._sample(id, row)
            except DataError as error:
                yield Rejected(id, str(error))

    def image(self, name: str) -> ImageRef:
        """The image of that name: a path. DataError for one whose bytes stand in the data file itself."""
        if name.startswith("data:"):
            raise DataError(f"{self.path}: an image inside the data file cannot be found again by its name")
        return FileImage(name, self.path.parent)

    def _rows(self) -> Iterator[tuple[int, Any]]:
        """Number (from 1) and row; a DataError in place of a line that is not JSON."""
        with self.path.open("rb") as file:
            first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if first == b"[":
            yield from enumerate(read_json_list(self.path), 1)
        elif first == b"{":
            yield from self._lines()
        else:
            found = f"{first!r}" if first else "an empty file"
            raise DataError(f"{self.path}: expected a JSON list, or an object on each line; found {found}")

    def _lines(self) -> Iterator[tuple[int, Any]]:
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_ROW):
                number += 1
                if len(line) == MAX_ROW:
                    raise DataError(f"{self.path}: line {number} is too long to be a row (64 MiB)")
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, DataError(f"line {number} is not a JSON object ({error})")

    def _sample(self, id: str, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise DataError(f"expected an object, found {type(row).__name__}")
        messages = row.get("conversations") or row.get("messages")
        images = _images_of(row)
        if isinstance(images, dict):
            messages, images = _number_marks(messages, images)
        turns, owned = read_conversation(messages, images)
        return Sample(id, tuple(self._image(image) for image in owned), turns)

    def _image(self, image: Any) -> ImageRef:
        if isinstance(image, dict):
            image = image.get("path") or image.get("url")
        if not isinstance(image, str) or not image:
            raise DataError(f"expected the path of an image, found {type(image).__name__}")
        if image.startswith("data:"):
            return _inline_image(image)
        if re.match(r"https?://", image):
            raise DataError(f"{image[:100]} is not on this machine; download the images and give their paths")
        return FileImage(image, self.path.parent)


def _id_of(row: Any, number: int) -> str:
    """The row's id; a few sets call it idx, and some have none."""
    id = None
    if isinstance(row, dict):
        id = row.get("id") if row.get("id") is not None else row.get("idx")
    return f"row {number}" if id is None else str(id)


def _images_of(row: dict[str, Any]) -> list[Any] | dict[str, Any]:
    """`image` or `images`: null, one, a list, or MiniCPM's {"<image_00>": path}."""
    if row.get("image") and row.get("images"):
        raise DataError("the row has both `image` and `images`")
    images = row.get("images") or row.get("image") or []
    if isinstance(images, dict) and any(_NAMED_MARK.fullmatch(key) for key in images):
        return images
    return images if isinstance(images, list) else [images]


def _number_marks(messages: Any, images: dict[str, Any]) -> tuple[Any, list[Any]]:
    """MiniCPM: each image has a mark of its own. -> the messages with plain marks, and the images in their
    order.

    An image may be mentioned again later; its first mention owns it.
    """
    order: list[str] = []

    def plain(match: re.Match[str]) -> str:
        if match[0] not in images:
            raise DataError(f"the text mentions {match[0]}, which the row does not have")
        if match[0] in order:
            return ""
        order.append(match[0])
        return MARK

    if not isinstance(messages, list):
        return messages, list(images.values())
    plainer = []
    for message in messages:
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if isinstance(content, str):
            message = {
                "role": message.get("role", message.get("from")),
                "content": _NAMED_MARK.sub(plain, content),
            }
        plainer.append(message)
    if order and len(order) < len(images):
        raise DataError(f"the text mentions {len(order)} of {len(images)} images")
    return plainer, [images[mark] for mark in order or images]


def _inline_image(address: str) -> BytesImage:
    """data:image/png;base64,... in OpenAI's messages. Its name is a hash: the bytes have no other."""
    header, _, body = address.partition(",")
    if not header.endswith(";base64"):
        raise DataError(f"expected a base64 data address, found {header[:60]!r}")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"a data address is not base64 ({error})") from error
    return BytesImage(f"data:{digest_of(data)}", data)
