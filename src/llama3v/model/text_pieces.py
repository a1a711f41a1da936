"""A text that is longer than a model reads, as pieces that it can read. Nothing is dropped."""

import re
from collections.abc import Callable, Iterator

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")

Fits = Callable[[str], bool]


def cut_text(text: str, fits: Fits) -> list[str]:
    """The text, or pieces of it that all fit: whole sentences, as many as fit together; else words; else characters.

    Together the pieces hold everything of the text but white space, in its order. A single character that does not fit
    stays a piece.

    Args:
        fits: whether the model can read a text; if it can, it can also read any part of it.
    """
    if fits(text):
        return [text]
    pieces: list[str] = []
    for part in _parts(text, fits):
        if pieces and fits(longer := f"{pieces[-1]} {part}"):
            pieces[-1] = longer
        else:
            pieces.append(part)
    return pieces


def _parts(text: str, fits: Fits) -> Iterator[str]:
    for sentence in filter(None, map(str.strip, _SENTENCE_END.split(text))):
        if fits(sentence):
            yield sentence
        else:
            for word in sentence.split():
                yield from _halves(word, fits)


def _halves(word: str, fits: Fits) -> Iterator[str]:
    if len(word) == 1 or fits(word):
        yield word
    else:
        middle = len(word) // 2
        yield from _halves(word[:middle], fits)
        yield from _halves(word[middle:], fits)
