"""The OpenAPI document: what each path takes and answers, as narrow as the server really is."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llama3v.server.gateway import Gateway
from llama3v.server.response_schema import ChatChunk, ChatCompletion, Error, TextChunk, TextCompletion, Tokens
from llama3v.server.schema import UNSUPPORTED, ChatRequest, CompletionRequest, TokenizeRequest

_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest)
_REFUSALS = {
    400: "The request cannot be obeyed.",
    401: "A key is missing or unknown.",
    403: "Sent by a page of another site.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The request or an image is too large.",
    415: "Not JSON.",
    421: "Sent to a name that is not this machine's.",
    429: "Too many requests; see Retry-After.",
    503: "The server is about to end.",
    504: "The deadline has passed.",
}
_EVERYWHERE = (401, 403, 421)
_WITH_BODY = (400, 404, 408, 413, 415, 429, 503, 504)
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
"""A picture of one red pixel."""
_PICTURE = {"type": "image_url", "image_url": {"url": _PIXEL}}
_CONVERSATION = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, _PICTURE]}]
_EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {
        "answer": {"messages": _CONVERSATION, "max_tokens": 16},
        "stream": {"messages": _CONVERSATION, "stream": True, "stream_options": {"include_usage": True}},
        "odds": {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 3, "n": 2},
    },
    "CompletionRequest": {"answers": {"prompt": ["Hello", "What is red?"], "temperature": 0.7, "seed": 1}},
    "TokenizeRequest": {"text": {"prompt": "Hello"}, "conversation": {"messages": _CONVERSATION}},
}
_ANSWERS: dict[type[BaseModel], type[BaseModel]] = {
    ChatRequest: ChatCompletion,
    CompletionRequest: TextCompletion,
    TokenizeRequest: Tokens,
}


_EVENTS: dict[type[BaseModel], type[BaseModel]] = {ChatRequest: ChatChunk, CompletionRequest: TextChunk}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a path may answer beside what was asked for: what all may, and these."""
    return {status: {"model": Error, "description": _REFUSALS[status]} for status in (*_EVERYWHERE, *statuses)}


def documented(kind: type[BaseModel], words: str) -> dict[str, Any]:
    """Arguments of a route that reads its body itself, as `kind`."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    examples = {name: {"value": value} for name, value in _EXAMPLES[kind.__name__].items()}
    body = {"required": True, "content": {"application/json": {"schema": reference, "examples": examples}}}
    whole: dict[str, Any] = {"model": _ANSWERS[kind], "description": words}
    if kind in _EVENTS:
        whole["content"] = {"text/event-stream": {"schema": _event(_EVENTS[kind])}}
    responses = {200: whole, **refusals(*_WITH_BODY)}
    return {"description": words, "responses": responses, "openapi_extra": {"requestBody": body}}


def _event(kind: type[BaseModel]) -> dict[str, Any]:
    """A server-sent event with a piece of an answer or an error as JSON; the last one is [DONE]."""
    pieces = [{"$ref": f"#/components/schemas/{name}"} for name in (kind.__name__, Error.__name__)]
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": pieces}}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, content]}}}


def openapi(app: FastAPI, gateway: Gateway, open_paths: tuple[str, ...]) -> dict[str, Any]:
    """The document; made once.

    Args:
        open_paths: those that need no key.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        kinds = [(kind, "validation") for kind in (*_REQUESTS, *_EVENTS.values())]
        _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = document.setdefault("components", {})
        components["schemas"] = {**components.get("schemas", {}), **found["$defs"]}
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, of its 422: nothing here answers so
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["security"] = [{}] if path in open_paths else [{}, {"key": []}]
                if path in open_paths:
                    operation["responses"].pop("401", None)
        _narrow(document, gateway)
        app.openapi_schema = document
    return app.openapi_schema


def _narrow(document: dict[str, Any], gateway: Gateway) -> None:
    """What this server, with these options, takes less than the schemas say."""
    name = gateway.model.name
    for kind in _REQUESTS:
        properties = document["components"]["schemas"][kind.__name__]["properties"]
        properties["model"] = {"enum": [name, None], "description": "Default: the one that is served."}
        if "n" in properties:
            properties["n"] = {"type": ["integer", "null"], "minimum": 1, "maximum": gateway.config.max_choices}
        for field, neutral in UNSUPPORTED.items():
            if field in properties:
                properties[field] = {"enum": [None, *neutral], "description": "Not supported: values that do nothing."}
    (parameter,) = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    parameter["schema"] = {"type": "string", "enum": [name]}
