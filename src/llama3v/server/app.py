"""The HTTP application: routes, who may use them, and what every response says."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llama3v
from llama3v.server import gateway as requests
from llama3v.server.body import ClientGone, read_body, until_gone
from llama3v.server.document import documented, openapi, refusals
from llama3v.server.errors import ApiError, internal_error, refused
from llama3v.server.gateway import Gateway
from llama3v.server.response_schema import Health, ModelCard, ModelList, Ready
from llama3v.server.schema import ChatRequest, CompletionRequest, TokenizeRequest
from llama3v.server.settings import is_loopback

log = logging.getLogger("llama3v.server")

_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE = {"page.css": "text/css", "pico.min.css": "text/css", "page.js": "text/javascript"}

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json", *(f"/page/{name}" for name in _PAGE))
"""What needs no key: the page, which asks for one, and whether the server lives."""


def create_app(gateway: Gateway) -> FastAPI:
    """The application of a gateway. What it opens it closes when the server ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.ready = False
        await asyncio.to_thread(gateway.scheduler.close)
        await gateway.pictures.close()
        gateway.formats.close()
        await asyncio.to_thread(gateway.model.vision_cache.close)

    app = FastAPI(
        title="llama3v",
        version=llama3v.__version__,
        description="Llama 3-V through the API that OpenAI's clients speak.",
        docs_url=None,  # both pages would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.openapi = lambda: openapi(app, gateway, OPEN_PATHS)  # type: ignore[method-assign]
    app.add_middleware(Doorkeeper, gateway=gateway)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    _add_answers(app, gateway)
    _add_state(app, gateway)
    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    """The page at /, and its three files: what stands in _PAGE and nothing else."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE_FOLDER / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE:
            raise HTTPException(404)
        return FileResponse(_PAGE_FOLDER / name, media_type=_PAGE[name], headers={"Cache-Control": "no-cache"})


def _add_answers(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions", **documented(ChatRequest, "An answer to messages, whole or as a stream."))
    async def chat(request: Request) -> Response:
        return await requests.chat(gateway, request)

    @app.post("/v1/completions", **documented(CompletionRequest, "Each prompt answered as one user's turn."))
    async def complete(request: Request) -> Response:
        return await requests.complete(gateway, request)

    @app.post("/tokenize", **documented(TokenizeRequest, "The ids of a text, or of messages as the model reads them."))
    async def tokenize(request: Request) -> Response:
        return JSONResponse(await _tokenize(gateway, request))


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", responses=refusals())
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[_model_card(gateway)])

    @app.get("/v1/models/{name:path}", responses=refusals(404))
    async def model(name: str) -> ModelCard:
        """A model by its name."""
        requests.require_model(gateway, name)
        return _model_card(gateway)

    @app.get("/health", responses=refusals())
    async def health() -> Health:
        """Whether the process lives."""
        return Health(status="ok")

    states: dict[int | str, dict[str, Any]] = {
        200: {"model": Ready},
        503: {"model": Ready, "description": "Ending."},
    }

    @app.get("/ready", responses={**refusals(), **states})
    async def ready() -> Response:
        """Whether new work is welcome."""
        return JSONResponse({"ready": gateway.ready}, 200 if gateway.ready else 503)

    @app.get("/metrics", responses=refusals(), response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _tokenize(gateway: Gateway, request: Request) -> dict[str, Any]:
    with gateway.budget.share() as share:
        body = await read_body(request, TokenizeRequest, gateway.max_body, share)
        requests.require_model(gateway, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("Give either prompt or messages.", param="prompt")
        if body.messages is None:
            ids = gateway.model.text_ids(body.prompt or "")
        else:
            turns, pictures = await until_gone(request, requests.see(gateway, body.messages, share))
            ids = gateway.model.ids(turns, [picture.grid for picture in pictures])
    return {"count": len(ids), "max_model_len": gateway.model.context_tokens, "tokens": ids}


def _model_card(gateway: Gateway) -> ModelCard:
    model = gateway.model
    return ModelCard(
        id=model.name,
        object="model",
        created=gateway.started,
        owned_by="llama3v",
        max_model_len=model.context_tokens,
        engine=model.engine.name,
    )


class Doorkeeper:
    """Around every request: is it meant for this server, whose key is it, and the headers of its response."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        # a name that another site lets point to this machine must not open it to that site's pages
        self._only_local_names = is_loopback(gateway.config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)  # lifespan; there are no websockets
        request = Request(scope, receive)

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
                route = scope.get("route")
                self._gateway.metrics.responded(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            self._admit(request)
        except ApiError as error:
            return await _refusal(error)(scope, receive, answering)
        return await self._app(scope, receive, answering)

    def _admit(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self._only_local_names and not is_loopback(_without_port(host)):
            raise ApiError(421, "This server answers to its own address alone.", code="wrong_host")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "Pages of other sites may not use this server.", code="foreign_origin")
        needs_key = request.url.path not in OPEN_PATHS
        key = self._gateway.keys.holder_of(request.headers.get("authorization")) if needs_key else None
        if request.method == "POST":
            self._gateway.keys.count(key)
        request.state.key = key
        request.state.client = key.name if key else (request.client.host if request.client else "")


_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


def _without_port(host: str) -> str:
    """The name in a Host header."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refusal(error)


async def _http_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at this path.", 405: "This path does not take this method."}
    found = ApiError(error.status_code, words.get(error.status_code, "The request cannot be served."))
    return JSONResponse(found.body(), error.status_code, headers=error.headers)


async def _left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is nginx's, for the log


async def _failed(_: Request, error: Exception) -> Response:
    log.error("a request failed: %s", type(error).__name__, exc_info=error)
    return _refusal(internal_error())


_HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ApiError: _refused,
    HTTPException: _http_refused,
    ClientGone: _left,
    Exception: _failed,
}
