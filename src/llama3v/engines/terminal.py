"""Where the verbs that answer write: the answer, and nothing else, to stdout; messages and progress to stderr."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from rich.console import Console
from rich.markup import escape

from llama3v.config import Running
from llama3v.engines.base import BatchEngine, Engine, EngineImage, Room
from llama3v.errors import ImageError
from llama3v.model.tiles import MAX_BYTES, decode_image, overview, read_image_file

if TYPE_CHECKING:
    from PIL import Image

    from llama3v.config import Detail

STDIN = "-"
PICTURE_COLUMNS = 60
PICTURE_PIXELS = 1024  # longest side that is sent to the terminal; more only takes time


def messages() -> Console:
    """For everything that is not the answer."""
    return Console(stderr=True, highlight=False)


def open_engine(
    model: str,
    running: Running = Running(),  # noqa: B008 (frozen)
    *,
    room: Room | None = None,
    quiet: bool = False,
) -> Engine:
    """An engine that is opened (engines/choose.py), with a note on the terminal meanwhile, and what `auto` chose.

    Args:
        room: for all that a conversation will hold.
        quiet: without the note, for who has a progress bar there already.
    """
    from llama3v.engines import choose

    with nullcontext() if quiet else messages().status(f"Loading {escape(model)}"):
        choice = choose.open_engine(model, running, room=room)
    if choice.reason:
        messages().print(escape(choice.reason))
    return choice.engine


def printable(text: str) -> str:
    """Text without control codes: neither a model nor the name of a file gets to command the terminal."""
    return "".join(c if category(c) != "Cc" or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write(text: str) -> None:
    """The next piece of an answer, at once. A terminal gets no control codes, a pipe gets the text as it is."""
    if sys.stdout.isatty():
        text = printable(text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def read_picture(name: str) -> tuple[bytes, "Image.Image"]:
    """The bytes of an image file, or of stdin for "-", and the picture. Raises ImageError, naming the file."""
    data = read_image(name)
    return data, decode_named(data, "stdin" if name == STDIN else name)


def read_image(name: str) -> bytes:
    """The bytes of an image file, or of stdin for "-". Raises ImageError for a file that cannot be read."""
    if name != STDIN:
        return read_image_file(name)
    return sys.stdin.buffer.read(MAX_BYTES + 1)  # one too many: decode_image says that it is too large


def at_detail(image: "Image.Image", detail: "Detail", engine: BatchEngine) -> EngineImage:
    """What the engine is given of a picture: all of it, or its overview."""
    return image if detail == "high" else overview(image, engine.tile_size)


def is_file(name: str) -> bool:
    """Whether there is a file of this name; text that cannot be a name is none."""
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False


def decode_named(data: bytes, name: str) -> "Image.Image":
    """decode_image, whose errors then name the file."""
    try:
        return decode_image(data)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def show_picture(image: "Image.Image") -> None:
    """Draw a picture where a person sits at a terminal: in pixels if it can (Kitty, Sixel), else in half cells."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or 0 in os.get_terminal_size(sys.stdout.fileno()):
        return  # nobody looks, or the terminal does not know its size (a serial line, some containers)
    from textual_image.renderable import Image as Picture  # on import, it asks the terminal what it can

    small = image.copy()
    small.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    console = Console()
    console.print(Picture(small, width=min(PICTURE_COLUMNS, console.width), height="auto"))


def write_summary(out: Path | None, summary: dict[str, Any]) -> dict[str, Any]:
    """Leave summary.json in `out`, if there is one; returns the summary."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary
