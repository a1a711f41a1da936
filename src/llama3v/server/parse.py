"""From the fields of a request to what this package works with: turns, pictures, sampling."""

import secrets
from collections.abc import Sequence
from typing import Any

from llama3v.config import Sampling
from llama3v.model.prompt import Role, Turn
from llama3v.server.errors import refused
from llama3v.server.pictures import Source
from llama3v.server.schema import UNSUPPORTED, ChatRequest, CompletionRequest, Generation, Message

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def turns_of(messages: Sequence[Message], most_images: int) -> tuple[list[Turn], list[Source]]:
    """Messages as turns, and the pictures they own, in order. Raises ApiError (400)."""
    turns: list[Turn] = []
    sources: list[Source] = []
    for number, message in enumerate(messages):
        parts = [] if isinstance(message.content, str) else message.content
        images = [part.image_url for part in parts if part.type == "image_url"]
        if images and message.role != "user":
            raise refused("Only a user's message may hold images.", param=f"messages.{number}")
        first = len(sources)
        sources += [Source(image.url, image.detail) for image in images]
        if len(sources) > most_images:
            raise refused(
                f"This server takes at most {most_images} images in one request.",
                code="too_many_images",
                param="messages",
            )
        texts = [part.text for part in parts if part.type == "text"]
        text = message.content if isinstance(message.content, str) else "\n".join(texts)
        turns.append(Turn(_ROLES[message.role], text, tuple(range(first, len(sources)))))
    return turns, sources


def require_supported(request: Generation) -> None:
    """Raises ApiError (400) for a field that would change the answer and that nothing here can obey."""
    for name, neutral in UNSUPPORTED.items():
        value = getattr(request, name, None)
        if value is not None and not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
            raise refused(f"This server does not support {name}.", code="unsupported_parameter", param=name)


def samplings_of(request: Generation, most_choices: int, schema: str | None = None) -> list[Sampling]:
    """How each of the answers is sampled: `n` of them, each with a seed of its own. Raises ApiError (400).

    Args:
        schema: what they obey (formats.py).
    """
    count = request.n or 1
    if count > most_choices:
        raise refused(f"This server gives at most {most_choices} answers to one request.", param="n")
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
    options: dict[str, Any] = {
        "temperature": float(request.temperature or 0),
        "top_p": 1.0 if request.top_p is None else float(request.top_p),
        "top_k": max(0, request.top_k or 0),
        "min_p": float(request.min_p or 0),
        "repetition_penalty": 1.0 if request.repetition_penalty is None else float(request.repetition_penalty),
        "stop": stops_of(request),
        "logprobs": alternatives_of(request),
        "json_schema": schema,
    }
    return [Sampling(seed=seed + choice, **options) for choice in range(count)]


def stops_of(request: Generation) -> tuple[str, ...]:
    """Stop texts."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def alternatives_of(request: Generation) -> int | None:
    """How many alternatives are to be told with each token's log-probability; None: not even its own."""
    if not isinstance(request, ChatRequest) or not request.logprobs:
        if isinstance(request, ChatRequest) and request.top_logprobs:
            raise refused("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return None
    return request.top_logprobs or 0


def most_tokens_of(request: Generation) -> int | None:
    """Most tokens of one answer, as the client asks; None where it does not."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def prompts_of(request: CompletionRequest) -> list[str]:
    """The prompts of a plain completion."""
    return [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
