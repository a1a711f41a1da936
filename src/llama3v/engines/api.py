"""A model behind an OpenAI-compatible endpoint, as an engine: peers are asked the same questions by the same code.

The prompt is the endpoint's own business: it gets turns and pictures, and writes its own template around them.
"""

import base64
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from llama3v.engines.base import EngineImage, ImageFeatures, Question
from llama3v.errors import ConfigError, PromptError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import decode_image, open_image, orientation_of, upright_rgb

KEY = "OPENAI_API_KEY"
AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every endpoint reads; others are sent as PNG."""
TIMEOUT = 600.0  # seconds; a queue in front of a large model takes minutes
RETRIES = 5
LOW_DETAIL = 512  # pixels: the square that OpenAI's own "low" shows of a picture


class ApiEngine:
    """Asks an endpoint.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        model: its name there.
        detail: "low" or "high", sent with every image; default: what the endpoint likes.
        parallel: questions that wait for an answer at a time.
        key: of the API; default: OPENAI_API_KEY of the environment.

    Raises ConfigError where the extra is missing.
    """

    tile_size = LOW_DETAIL

    def __init__(
        self, url: str, model: str, *, detail: str | None = None, parallel: int = 16, key: str | None = None
    ) -> None:
        self.url, self.model, self.detail, self.parallel = url, model, detail, parallel
        # A server of one's own wants none, but the client insists on one.
        self._client = import_openai().OpenAI(
            base_url=url, api_key=key or os.environ.get(KEY) or "none", timeout=TIMEOUT, max_retries=RETRIES
        )
        self._length = "max_tokens"  # of all servers; OpenAI's own newer models take the other name alone

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """See Engine. The answer comes in one piece."""
        return iter([self.answer(turns, images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)])

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """See Engine. Raises ConfigError where the endpoint cannot be reached or refuses, PromptError where it refuses
        this question.
        """
        openai = import_openai()
        messages = [self._message(turn, images) for turn in turns]
        try:
            return self._ask(messages, max_new_tokens, temperature, seed)
        except openai.BadRequestError as error:
            if self._length == "max_tokens" and "max_completion_tokens" in str(error):
                self._length = "max_completion_tokens"
                return self.answer(turns, images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            raise PromptError(f"{self.url} refuses the question: {_reason(error)}") from error
        except openai.AuthenticationError as error:
            raise ConfigError(f"{self.url} refuses the key: {_reason(error)}; set {KEY} in the environment") from error
        except openai.APIConnectionError as error:
            raise ConfigError(f"{self.url} cannot be reached ({_reason(error)}); is the server up?") from error
        except openai.APIError as error:
            raise ConfigError(f"{self.url} answers with an error: {_reason(error)}") from error

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """See Engine. All are sent at once, `parallel` at a time."""

        def ask(question: Question) -> str:
            return self.answer(*question, max_new_tokens=max_new_tokens)

        with ThreadPoolExecutor(self.parallel, "ask") as pool:
            return list(pool.map(ask, questions))

    def _ask(self, messages: list[Any], max_new_tokens: int, temperature: float, seed: int) -> str:
        options: dict[str, Any] = {self._length: max_new_tokens}
        reply = self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=temperature, seed=seed, **options
        )
        if not reply.choices:
            raise ConfigError(f"{self.url} answered without a choice; is it a chat endpoint?")
        return reply.choices[0].message.content or ""

    def _message(self, turn: Turn, images: Sequence[EngineImage]) -> dict[str, Any]:
        if not turn.images:
            return {"role": turn.role, "content": turn.text}
        parts: list[dict[str, Any]] = [self._picture(images[number]) for number in turn.images]
        return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}

    def _picture(self, image: EngineImage) -> dict[str, Any]:
        address = {"url": data_url(image)}
        return {"type": "image_url", "image_url": address | ({"detail": self.detail} if self.detail else {})}


def data_url(image: EngineImage) -> str:
    """A picture as the endpoint takes it: the file as it is where any program reads it alike, else upright as PNG.

    Raises ImageError; PromptError for features, which no endpoint takes.
    """
    if isinstance(image, ImageFeatures):
        raise PromptError("expected a picture for the endpoint, found features of a cache; leave --cache away")
    if isinstance(image, bytes):
        with open_image(image) as opened:
            kind = AS_THEY_ARE.get(opened.format or "") if orientation_of(opened) == 1 else None
        if kind is not None:
            return f"data:{kind};base64,{base64.b64encode(image).decode()}"
        image = decode_image(image)
    file = BytesIO()
    upright_rgb(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def import_openai() -> Any:
    """The client's module. Raises ConfigError where the extra is missing."""
    try:
        import openai
    except ImportError as error:
        raise ConfigError("an endpoint needs an extra: pip install 'llama3v[api]'") from error
    return openai


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
