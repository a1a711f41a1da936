"""Ask a running `llama3v serve` with the clients that people have: openai, LiteLLM and LangChain, those that are installed.

    pip install openai litellm langchain-openai
    python examples/serve/clients.py photo.jpg
    python examples/serve/clients.py photo.jpg --url http://127.0.0.1:8000/v1 --key KEY --client langchain

Each asks for an answer, for a stream, about the picture, and for a model that is not there, which is an error of its own
kind. Nothing is special about this server but its address. Prints what came; the exit code is 0 if all came as it should.
"""

import argparse
import base64
import importlib.util
import json
import mimetypes
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or LiteLLM fetches a price list when it is imported

PACKAGES = {"openai": "openai", "litellm": "litellm", "langchain": "langchain_openai"}
LENGTH = 32  # tokens


@dataclass
class Server:
    """Where to ask, and what about."""

    url: str
    key: str
    model: str
    picture: str
    """A data URL."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A question without a picture."""
        return [{"role": "user", "content": "Hello! What can you see?"}]

    @property
    def about_picture(self) -> list[dict[str, Any]]:
        """A question about the picture."""
        picture = {"type": "image_url", "image_url": {"url": self.picture}}
        return [{"role": "user", "content": [{"type": "text", "text": "What is in the picture?"}, picture]}]


Answer = tuple[str, str]  # what was asked for, what came


def openai_answers(server: Server) -> Iterator[Answer]:
    """OpenAI's own package."""
    import openai

    client = openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)
    create: Any = client.chat.completions.create

    def ask(messages: list[dict[str, Any]], model: str = server.model, **more: Any) -> Any:
        return create(model=model, messages=messages, max_tokens=LENGTH, **more)

    yield "answer", ask(server.messages).choices[0].message.content
    yield "stream", _joined(chunk.choices[0].delta.content for chunk in ask(server.messages, stream=True))
    yield "picture", ask(server.about_picture).choices[0].message.content
    yield "error", _error_of(openai.NotFoundError, lambda: ask(server.messages, model="no-such-model"))


def litellm_answers(server: Server) -> Iterator[Answer]:
    """LiteLLM, for which this is one of many endpoints that speak OpenAI's protocol."""
    import litellm

    def ask(messages: list[dict[str, Any]], model: str = server.model, **more: Any) -> Any:
        return litellm.completion(
            model=f"openai/{model}",
            api_base=server.url,
            api_key=server.key,
            messages=messages,
            max_tokens=LENGTH,
            max_retries=0,
            **more,
        )

    yield "answer", ask(server.messages).choices[0].message.content
    yield "stream", _joined(chunk.choices[0].delta.content for chunk in ask(server.messages, stream=True))
    yield "picture", ask(server.about_picture).choices[0].message.content
    yield "error", _error_of(litellm.NotFoundError, lambda: ask(server.messages, model="no-such-model"))


def langchain_answers(server: Server) -> Iterator[Answer]:
    """LangChain's class for OpenAI's models."""
    import openai
    from langchain_openai import ChatOpenAI

    def chat(model: str = server.model) -> Any:
        options: dict[str, Any] = {"base_url": server.url, "api_key": server.key, "max_completion_tokens": LENGTH}
        return ChatOpenAI(model=model, max_retries=0, **options)

    yield "answer", chat().invoke(server.messages).content
    yield "stream", _joined(chunk.content for chunk in chat().stream(server.messages))
    yield "picture", chat().invoke(server.about_picture).content
    yield "error", _error_of(openai.NotFoundError, lambda: chat("no-such-model").invoke(server.messages))


CLIENTS: dict[str, Callable[[Server], Iterator[Answer]]] = {
    "openai": openai_answers,
    "litellm": litellm_answers,
    "langchain": langchain_answers,
}


def main() -> int:
    """Ask with each client. 1 where an answer and its stream differ, or the error is of another kind."""
    arguments = _arguments()
    kind = mimetypes.guess_type(arguments.picture)[0] or "image/jpeg"
    data = base64.b64encode(arguments.picture.read_bytes()).decode()
    model = arguments.model or _first_model(arguments.url, arguments.key)
    server = Server(arguments.url, arguments.key, model, f"data:{kind};base64,{data}")
    names = [arguments.client] if arguments.client else list(CLIENTS)
    absent = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    for name in absent:
        print(f"{name}: not installed (pip install {PACKAGES[name].replace('_', '-')})")
    wrong = 0
    for name in names:
        if name not in absent:
            wrong += not _show(name, CLIENTS[name](server))
    return int(bool(wrong) or len(absent) == len(names))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API")
    parser.add_argument("--key", default="none", help="an API key, where the server has any")
    parser.add_argument("--model", help="its name in the API; default: the one that the server names first")
    parser.add_argument("--client", choices=list(CLIENTS), help="this one alone")
    return parser.parse_args()


def _first_model(url: str, key: str) -> str:
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def _show(name: str, answers: Iterator[Answer]) -> bool:
    came: dict[str, str] = {}
    for kind, text in answers:
        came[kind] = text
        print(f"{name:9} {kind:8} {' '.join(text.split())[:100]!r}", flush=True)
    right = came["answer"] == came["stream"] and bool(came["picture"]) and came["error"] != ""
    print(
        f"{name:9} {'all came as it should' if right else 'WRONG: the answer and its stream differ, or one is empty'}"
    )
    return right


def _joined(texts: Iterator[str | None]) -> str:
    return "".join(text or "" for text in texts)


def _error_of(kind: type[Exception], ask: Callable[[], Any]) -> str:
    """The message of the error that must come; others pass through."""
    try:
        ask()
    except kind as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
