"""`llama3v chat`: a conversation about images on the terminal."""

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape

from llama3v.config import ChatConfig
from llama3v.engines.base import Engine, EngineImage
from llama3v.engines.terminal import (
    at_detail,
    is_file,
    messages,
    open_engine,
    printable,
    read_picture,
    show_picture,
    write,
)
from llama3v.errors import ConfigError, Llama3VError
from llama3v.model.prompt import Turn

HELP = "/image FILE adds a picture to the next question, /reset starts anew, /quit or ^D leaves, ^C stops an answer."


class Conversation:
    """Turns and their images, and the pictures that wait for the next question."""

    def __init__(self, engine: Engine, config: ChatConfig) -> None:
        self._engine = engine
        self._config = config
        self.reset()

    def reset(self) -> None:
        self.turns: list[Turn] = []
        self.images: list[EngineImage] = []
        self.waiting: list[EngineImage] = []

    def show(self, data: bytes, image: Image.Image) -> None:
        """A picture, as a file and decoded, for the next question."""
        high = self._config.detail == "high"
        self.waiting.append(data if high else at_detail(image, "low", self._engine))
        show_picture(image)

    def ask(self, question: str, write: Callable[[str], None]) -> bool:
        """Write the answer piece by piece; False where ^C stopped it.

        What was written stays in the conversation. A question without any answer, because it was refused or stopped
        at once, leaves the conversation as it was.
        """
        images = [*self.images, *self.waiting]
        turn = Turn("user", question, tuple(range(len(self.images), len(images))))
        pieces: list[str] = []
        finished = False
        try:
            stream = self._engine.stream(
                [*self.turns, turn],
                images,
                max_new_tokens=self._config.max_new_tokens,
                sampling=self._config.sampling,
            )
            for piece in stream:
                pieces.append(piece)
                write(piece)
            finished = True
        except KeyboardInterrupt:
            pass
        if finished or pieces:
            self.turns += [turn, Turn("assistant", "".join(pieces))]
            self.images, self.waiting = images, []
        return finished


def chat(config: ChatConfig, engine: Engine | None = None) -> dict[str, Any]:
    """Talk about images until /quit or the end of the input; answers go to stdout, everything else to stderr.

    Args:
        engine: runs the model; default: that of `config.model` and `config.engine`.

    Returns {"verb", "model", "turns": [{"role", "text", "images"}, ...]} of the conversation since the last /reset.
    Raises ImageError for a bad file on the command line; a bad file later is told and the conversation goes on.
    """
    console = messages()
    pictures = [read_picture(name) for name in config.images]
    conversation = Conversation(engine or open_engine(config.model, config), config)
    for data, image in pictures:
        conversation.show(data, image)
    if sys.stdin.isatty():
        console.print(f"[dim]{HELP}[/]")
    _talk(conversation, console)
    turns = [{"role": turn.role, "text": turn.text, "images": list(turn.images)} for turn in conversation.turns]
    return {"verb": "chat", "model": config.model, "turns": turns}


def _talk(conversation: Conversation, console: Console) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() a history and line editing
    while True:
        try:
            line = _next_line(console).strip()
        except EOFError:
            if sys.stdin.isatty():
                console.print()  # the shell's prompt on a line of its own
            return
        except KeyboardInterrupt:
            console.print(f"\n[dim]{HELP}[/]")
            continue
        if line == "/quit":
            return
        try:
            _obey(line, conversation, console)
        except Llama3VError as error:
            console.print(f"[red]{escape(printable(str(error)))}[/]")


def _next_line(console: Console) -> str:
    if sys.stdin.isatty():
        return console.input("[bold green]you[/] ")
    return input()  # piped: one question per line, and no prompt


def _obey(line: str, conversation: Conversation, console: Console) -> None:
    """One line of the person: a command or a question."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        conversation.reset()
        console.print("[dim]a new conversation[/]")
    elif command == "/image":
        conversation.show(*read_picture(_file_name(argument.strip())))
    elif command == "/help":
        console.print(f"[dim]{HELP}[/]")
    elif line.startswith("/"):
        raise ConfigError(f"expected a question or a command, found {command}. {HELP}")
    elif line:
        finished = conversation.ask(line, write)
        write("\n")
        if not finished:
            console.print("[dim]stopped[/]")


def _file_name(text: str) -> str:
    """A file name as typed, or as terminals paste it: in quotes or with escaped spaces."""
    if not text or text == "-":
        raise ConfigError("expected a file after /image, found none; for example: /image photo.jpg")
    names = [text]
    with contextlib.suppress(RuntimeError):  # "~nobody" is a name like any other
        names.append(str(Path(text).expanduser()))
    with contextlib.suppress(ValueError):  # and so is a lone quote
        names.append(" ".join(shlex.split(text)))
    return next((name for name in names if is_file(name)), text)
