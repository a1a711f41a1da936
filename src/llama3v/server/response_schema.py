"""The responses of the API, for the OpenAPI document and for who checks responses against it.

They are written by `responses.py`, in plain dictionaries: a stream makes hundreds a second. No field is there that is not
here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Finish = Literal["stop", "length"]


class Odds(_Answer):
    """A token and its natural log-probability; -9999 stands for probability 0."""

    token: str
    logprob: Annotated[float, Field(le=0)]
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None


class TokenOdds(Odds):
    """A token that was chosen, and the likeliest at its place."""

    top_logprobs: list[Odds]


class Logprobs(_Answer):
    """Of all tokens of an answer."""

    content: list[TokenOdds]


class CachedTokens(_Answer):
    """Of the prompt."""

    cached_tokens: Natural


class Usage(_Answer):
    """OpenAI's usage."""

    prompt_tokens: Natural
    completion_tokens: Natural
    total_tokens: Natural
    prompt_tokens_details: CachedTokens


class Timings(_Answer):
    """Pictures, and where the time went."""

    images: Natural
    images_cached: Natural
    tiles: Natural
    grids: list[Annotated[str, Field(pattern=r"^\d+x\d+$")]]
    visual_tokens: Natural
    queue_seconds: Seconds
    vision_seconds: Seconds
    prefill_seconds: Seconds
    decode_seconds: Seconds
    first_text_seconds: Seconds


class AnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: Natural
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class TextChoice(_Answer):
    """One answer as plain text."""

    index: Natural
    text: str
    logprobs: None
    finish_reason: Finish


class _Head(_Answer):
    id: str
    created: Natural
    model: str


class _Completion(_Head):
    usage: Usage
    timings: Timings


class ChatCompletion(_Completion):
    """A whole answer to messages."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    """A whole answer to prompts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Delta(_Answer):
    """More of an answer; its role stands in the first one."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPiece(_Answer):
    """More of one answer."""

    index: Natural
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Finish | None


class TextPiece(_Answer):
    """More of one answer as plain text."""

    index: Natural
    text: str
    logprobs: None
    finish_reason: Finish | None


class _Chunk(_Head):
    usage: Usage | None = None
    timings: Timings | None = None


class ChatChunk(_Chunk):
    """An event of a stream of answers to messages. The last one has `usage` and no choices, where that is asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]


class TextChunk(_Chunk):
    """An event of a stream of answers to prompts."""

    object: Literal["text_completion"]
    choices: list[TextPiece]


class Tokens(_Answer):
    """Ids of a text, their number, and how many the model's context holds."""

    count: Natural
    max_model_len: Natural
    tokens: list[Natural]


class ModelCard(_Answer):
    """A model."""

    id: str
    object: Literal["model"]
    created: Natural
    owned_by: Literal["llama3v"]
    max_model_len: Natural
    engine: str


class ModelList(_Answer):
    """All models, which is one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(_Answer):
    """The process lives."""

    status: Literal["ok"]


class Ready(_Answer):
    """Whether new work is welcome."""

    ready: bool


class ErrorDetail(_Answer):
    """What was wrong, in a constant sentence; `code` for programs, `param`: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """A refusal, in OpenAI's shape."""

    error: ErrorDetail
