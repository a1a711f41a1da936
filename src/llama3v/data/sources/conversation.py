"""The messages of a row, as LLaVA, ShareGPT, MiniCPM and OpenAI write them -> turns that own images.

`<image>` in a text says which turn an image belongs to, in order. The marks are taken out: the renderer
puts visual tokens at one canonical place, before the text of the turn. A row that leaves a doubt is an
error, never a guess.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llama3v.errors import DataError
from llama3v.model.prompt import Turn

MARK = "<image>"

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


def read_conversation(messages: Any, images: Sequence[Any]) -> tuple[tuple[Turn, ...], tuple[Any, ...]]:
    """Turns and the images they own, in order.

    `messages`: a list of {from, value} or {role, content}; content is a text, or parts (text, image,
    image_url). `images`: what the row lists beside the messages, of any type. Without a mark anywhere, the
    first user turn owns them all. Raises DataError with the reason why the row cannot be used.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"expected a list of messages, found {_brief(messages)}")
    turns: list[Turn] = []
    inside: list[Any] = []  # images that stand in content parts
    for number, message in enumerate(messages, 1):
        role, text, parts = _read_message(message, number)
        count = text.count(MARK)
        if count and role != "user":
            raise DataError(f"message {number}: {MARK} in a text of the {role}; only user turns own images")
        first = sum(len(turn.images) for turn in turns)
        turns.append(Turn(role, without_marks(text), tuple(range(first, first + count))))
        inside += parts
    if inside and images:
        raise DataError("images stand both beside the messages and inside them")
    images = tuple(inside or images)
    turns = _own(turns, len(images))
    _check(turns)
    return tuple(turns), images


def without_marks(text: str) -> str:
    """The text without its <image> marks, and without the line each had to itself."""
    return text.replace(MARK + "\n", "").replace(MARK, "").strip()


def _own(turns: list[Turn], images: int) -> list[Turn]:
    marks = sum(len(turn.images) for turn in turns)
    if marks == images:
        return turns
    if marks:
        raise DataError(f"{marks} {MARK} marks for {images} images")
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError("images, but no user turn to own them")
    turns[first] = Turn("user", turns[first].text, tuple(range(images)))
    return turns


def _check(turns: list[Turn]) -> None:
    """At most one system turn, at the head; then user and assistant in turn; an assistant has the last
    word.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            before = f"after {spoken[number - 1].role}" if number else "first"
            raise DataError(f"expected user and assistant to alternate, found {turn.role} {before}")
        if not turn.text and not turn.images:
            raise DataError(f"the {turn.role} turn {number // 2 + 1} is empty")
    if not spoken or spoken[-1].role == "user":
        raise DataError("the last question has no answer" if spoken else "no question and no answer")


def _read_message(message: Any, number: int) -> tuple[Literal["system", "user", "assistant"], str, list[Any]]:
    """Role, text with its marks, and images that stand in the message itself."""
    if not isinstance(message, Mapping):
        raise DataError(f"message {number}: expected an object, found {_brief(message)}")
    speaker = message.get("from", message.get("role"))
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"message {number}: expected a role ({', '.join(_ROLES)}), found {_brief(speaker)}")
    content = message.get("value", message.get("content"))
    texts, images = [], []
    for part in content if isinstance(content, list) else [content]:
        text, image = _read_part(part, number)
        texts.append(text)
        images += image
    text = "\n".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise DataError(f"message {number}: not Unicode text (a lone surrogate, {found})") from error
    return role, text, images


def _read_part(part: Any, number: int) -> tuple[str, list[Any]]:
    """A text as it is; an image as its mark and, where the part says which image, that image."""
    if isinstance(part, str):
        return part, []
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], []
    if kind == "image":
        source = part.get("image", part.get("path", part.get("url")))
        return MARK, [] if source is None else [source]
    if kind == "image_url":
        address = part.get("image_url")
        return MARK, [address.get("url") if isinstance(address, Mapping) else address]
    raise DataError(f"message {number}: expected a text or an image, found {_brief(part)}")


def _brief(value: Any) -> str:
    """A value in a few characters, for a message of one line."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
