"""Token ids to text, piece by piece."""

from collections.abc import Iterable
from typing import Any


class Detokenizer:
    """Decodes a growing list of tokens; what it has returned never changes.

    One character may need several tokens, so text is held back while it ends in the replacement character. A token is
    always decoded together with the piece before it: some tokenizers write its space only then.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._previous: list[int] = []  # the tokens of the last piece
        self._held: list[int] = []  # the tokens since then

    def push(self, token: int) -> str:
        """The text that this token completes; "" where it completes none."""
        self._held.append(token)
        text = self._text_of_held()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._release(text)

    def rest(self) -> str:
        """What is held back, at the end of the answer."""
        return self._release(self._text_of_held())

    def text_of(self, tokens: Iterable[int]) -> str:
        """The text of a whole answer."""
        return "".join(map(self.push, tokens)) + self.rest()

    def _text_of_held(self) -> str:
        before = self._decode(self._previous)
        return self._decode(self._previous + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        if text:
            self._previous, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
