"""Reading a request's body: how large, how slowly, how much of it at once. And noticing that its client has gone."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from llama3v.server.errors import ApiError, refused

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

BODY_SECONDS = 60.0  # for a whole body: a client that drips gives its place to others
_LARGE = 2**20  # from here on a body is parsed outside of the event loop
_LONGEST_FIELD = 100


class ClientGone(Exception):  # noqa: N818 - not an error
    """Nobody waits for the answer any more."""


class Budget:
    """Bytes of requests that are held at the same time; what does not fit is refused, so memory has a bound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Raises ApiError (429) where the bound would be passed."""
        with self._lock:
            if self.used + count > self.limit:
                raise ApiError(
                    429,
                    "The server holds too much data of other requests; try again later.",
                    code="busy",
                    retry_after=2,
                )
            self.used += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.used -= count

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """A request's share; given back at its end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.give_back(share.count)


class Share:
    """What one request holds."""

    def __init__(self, budget: Budget) -> None:
        self.count = 0
        self._budget = budget

    def take(self, count: int) -> None:
        """See Budget.take."""
        self._budget.take(count)
        self.count += count

    def give_back(self, count: int) -> None:
        """Less of it is needed."""
        self._budget.give_back(count)
        self.count -= count


async def read_body(request: Request, kind: type[Model], limit: int, share: Share) -> Model:
    """The body as `kind`. Raises ApiError: 400, 408, 413, 415 or 429; ClientGone."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # also: a page of another site cannot send this type without asking first
        raise ApiError(415, "Expected the header Content-Type: application/json.", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Send the body as it is, without Content-Encoding.", code="unsupported_encoding")
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length) > limit):
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _read(request, limit, share)
    except TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.", code="request_timeout") from None
    parse = asyncio.to_thread(_parse, data, kind) if len(data) > _LARGE else _parsed(data, kind)
    found = await parse
    return found


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is given up where the client leaves meanwhile (ClientGone). After the body was read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int, share: Share) -> bytes:
    data = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if len(data) + len(part) > limit:
            raise _too_large(limit)
        share.take(len(part))
        data += part
        if not message.get("more_body", False):
            return bytes(data)


async def _parsed(data: bytes, kind: type[Model]) -> Model:
    return _parse(data, kind)


def _parse(data: bytes, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise refused("The body is not valid JSON.", code="invalid_json") from None
        field = ".".join(map(str, first["loc"]))[:_LONGEST_FIELD]
        message = f"{field}: {first['msg']}"[:300]
        raise refused(message, code="invalid_value", param=field or None) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request has more than {limit:,} bytes.", code="request_too_large")
