"""The requests of the API, as OpenAI's clients send them.

A field of OpenAI's that would change the answer and cannot be obeyed is refused, see `UNSUPPORTED`. All other fields that
are not here are ignored: what changes nothing (`user`, `metadata`), `chat_template` (a prompt is written by this package
alone), and what only other servers know.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LONGEST_TEXT = 2_000_000  # characters; more than any context holds
MOST_PARTS = 512
MOST_MESSAGES = 2048
MOST_STOPS = 4  # as OpenAI's


class Body(BaseModel):
    """No conversion of types, no NaN, no infinity."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class ImageUrl(Body):
    """A picture: `data:image/png;base64,...`, or an http(s) address where the server fetches those."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] = Field("auto", description="low: the overview alone, without slices.")


class ImagePart(Body):
    """One picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Body):
    """One text of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=LONGEST_TEXT)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One turn. Only a user's turn may hold pictures; they stand before its text, wherever the parts have them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=LONGEST_TEXT)] | Annotated[list[Part], Field(max_length=MOST_PARTS)]


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool = False


Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
TopK = Annotated[int, Field(ge=-1, le=2**31)]
MinP = Annotated[float, Field(ge=0, lt=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)]


class Generation(Body):
    """What both ways of asking share."""

    model: Annotated[str, Field(max_length=256)] | None = Field(None, description="Default: the one that is served.")
    max_tokens: Count | None = None
    temperature: Temperature | None = Field(None, description="Default: 0, the likeliest token each time.")
    top_p: Share | None = None
    top_k: TopK | None = Field(None, description="As vLLM has it, beside OpenAI's: 0 and -1 are all tokens.")
    min_p: MinP | None = Field(None, description="As vLLM has it, beside OpenAI's.")
    repetition_penalty: RepetitionPenalty | None = Field(None, description="As vLLM has it, beside OpenAI's; 1: none.")
    n: Count | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """JSON that obeys a schema. What `strict` asks for is always so."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON of a kind of the client's own."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: Format | None = None
    modalities: list[str] | None = None


class CompletionRequest(Generation):
    """POST /v1/completions: each prompt is asked as one user's turn, since the model was trained on turns alone."""

    prompt: (
        Annotated[str, Field(max_length=LONGEST_TEXT)]
        | Annotated[list[Annotated[str, Field(max_length=LONGEST_TEXT)]], Field(min_length=1, max_length=16)]
    )
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None


def _either(given: str, absent: str) -> dict[str, Any]:
    """In a schema: the one field and not the other; null is as good as absent."""
    return {"required": [given], "properties": {given: {"not": {"type": "null"}}, absent: {"type": "null"}}}


class TokenizeRequest(Body):
    """POST /tokenize: the ids of a text alone, or of a whole conversation as the model reads it."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [_either("prompt", "messages"), _either("messages", "prompt")]}
    )

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
"""Field -> the values beside null with which it changes nothing. With others it is refused."""
