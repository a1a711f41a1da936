"""The answers of the API, in OpenAI's shapes: whole, or as server-sent events."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from llama3v.engines.base import Token
from llama3v.server.model import Finished, Question, Sight, Text


class Report:
    """What one request took: summed up from its answers while they are made.

    Attributes:
        first_text_seconds: from the request's arrival to the first text; None until then.
    """

    def __init__(self, questions: Sequence[Question], sight: Sight) -> None:
        self.queue_seconds = 0.0
        self.first_text_seconds: float | None = None
        self.finished: list[Finished] = []
        self._questions = questions
        self._sight = sight
        self._started = time.perf_counter()

    def text_came(self) -> None:
        """The first call counts."""
        if self.first_text_seconds is None:
            self.first_text_seconds = time.perf_counter() - self._started

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(end.counts.new_tokens for end in self.finished)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, visual ones included."""
        return sum(question.prompt_tokens for question in self._questions)

    def seconds(self, phase: str) -> float:
        """Of `phase` (vision, prefill, decode), over all answers."""
        return sum(getattr(end.counts, f"{phase}_seconds") for end in self.finished)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage."""
        cached = self.finished[0].counts.cached_tokens if self.finished else 0
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def timings(self) -> dict[str, Any]:
        """What is ours alone: pictures, and where the time went."""
        pictures = [picture for question in self._questions for picture in question.pictures]
        return {
            "images": len(pictures),
            "images_cached": len(pictures) - self._sight.new_images,
            "tiles": sum(picture.grid.tiles for picture in pictures),
            "grids": [f"{picture.grid.columns}x{picture.grid.rows}" for picture in pictures],
            "visual_tokens": self.finished[0].counts.visual_tokens if self.finished else 0,
            "queue_seconds": round(self.queue_seconds, 4),
            "vision_seconds": round(self.seconds("vision"), 4),
            "prefill_seconds": round(self.seconds("prefill"), 4),
            "decode_seconds": round(self.seconds("decode"), 4),
            "first_text_seconds": round(self.first_text_seconds or 0.0, 4),
        }

    def headers(self) -> dict[str, str]:
        """`timings` as headers, for answers that come as a whole."""
        return {
            f"X-Llama3v-{name.replace('_', '-').title()}": str(value)
            for name, value in self.timings().items()
            if not isinstance(value, list)
        }


class Shape:
    """One of the two APIs' shapes. `kind`: chat or text."""

    def __init__(self, kind: str, model: str) -> None:
        self.chat = kind == "chat"
        self._base = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Token]] | None, report: Report) -> dict[str, Any]:
        """The whole response; `tokens` of each answer where log-probabilities are asked for."""
        choices = []
        for end in report.finished:
            text = texts[end.choice]
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            odds = None if tokens is None else {"content": [_logprob(token) for token in tokens[end.choice]]}
            choices.append({"index": end.choice, **said, "logprobs": odds, "finish_reason": end.reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": report.usage(), "timings": report.timings()}

    def begin(self, choice: int) -> list[dict[str, Any]]:
        """What a stream says before the first text of an answer."""
        return [self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def text(self, text: Text, with_tokens: bool) -> dict[str, Any]:
        """More of an answer."""
        odds = {"content": [_logprob(token) for token in text.tokens]} if with_tokens else None
        return self._chunk(text.choice, {"delta": {"content": text.text}} if self.chat else {"text": text.text}, odds)

    def text_event(self, text: Text, with_tokens: bool) -> bytes:
        """`text` as a server-sent event. All of them are alike but for the text, so the rest is written once."""
        if with_tokens:
            return event(self.text(text, with_tokens))
        if text.choice not in self._frames:
            frame = event(self.text(Text(text.choice, _MARK), with_tokens))
            before, _, after = frame.rpartition(to_json(_MARK))
            self._frames[text.choice] = before, after
        before, after = self._frames[text.choice]
        return before + to_json(text.text) + after

    def end(self, finished: Finished) -> dict[str, Any]:
        """The end of an answer."""
        return self._chunk(finished.choice, {"delta": {}} if self.chat else {"text": ""}, None, finished.reason)

    def usage(self, report: Report) -> dict[str, Any]:
        """What follows the last answer, for who asks for it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._base, "object": kind, "choices": [], "usage": report.usage(), "timings": report.timings()}

    def _chunk(
        self, choice: int, said: dict[str, Any], odds: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        entry = {"index": choice, **said, "logprobs": odds, "finish_reason": reason}
        return {**self._base, "object": kind, "choices": [entry]}


_MARK = "\0the text"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
STILL_HERE = b": still here\n\n"
"""A comment, so that proxies do not take a waiting stream for a dead one."""


def to_json(data: Any) -> bytes:
    """Compact, and valid whatever a model says."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def _logprob(token: Token) -> dict[str, Any]:
    return {**_odds(token), "top_logprobs": [_odds(other) for other in token.alternatives]}


def _odds(token: Token) -> dict[str, Any]:
    # a token outside what top-p left, or of a broken model, may have probability 0: JSON has no infinity
    logprob = max(token.logprob, -9999.0)
    whole = "\N{REPLACEMENT CHARACTER}" not in token.text  # a token may be a part of a character
    return {"token": token.text, "logprob": logprob, "bytes": list(token.text.encode()) if whole else None}
