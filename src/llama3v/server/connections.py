"""Connections: how many, and for how long one that sends or reads nothing is kept.

uvicorn bounds neither the wait for a request's first line and headers nor the time in which a reader takes what was written:
a few hundred sockets that drip would hold a small server's file descriptors for ever. A body has a bound of its own
(body.py), and so has the making of an answer (the deadline).
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from llama3v.server.errors import ApiError

HEADER_SECONDS = (
    20.0  # for a request's first line and headers, from when the connection, or their first byte, was there
)
READ_SECONDS = 60.0  # in which a reader takes something of what was written
LOOK_SECONDS = 5.0  # between two looks at a connection
_REFUSAL = ApiError(503, "Too many connections are open; try again later.", code="too_many_connections", retry_after=1)


class Connection(H11Protocol):
    """One connection.

    Args:
        most: connections that may be open. One more closes that which has waited longest without a request in work; where
            all have one, it is refused itself.
    """

    connections: "set[Connection]"  # type: ignore[assignment]

    def __init__(self, *arguments: Any, most: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most = most
        self._timer: asyncio.TimerHandle | None = None
        self._idle_from = 0.0
        self._header_from: float | None = None  # None: between two requests, where uvicorn's keep-alive bounds the wait
        self._unread = 0  # bytes that were written and not taken, when it was last looked at
        self._taken_at = 0.0  # when they became fewer

    @property
    def busy(self) -> bool:
        """Whether a request is in work."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_from = self._header_from = self._taken_at = self.loop.time()
        self._watch()
        if len(self.connections) > self._most and not self._make_room():
            transport.write(_refusal())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy:
            self._header_from = None
        elif self._header_from is None:
            self._header_from = self.loop.time()

    def on_response_complete(self) -> None:
        self._idle_from = self.loop.time()
        super().on_response_complete()

    def _make_room(self) -> bool:
        """Close the one that has waited longest for a request; False where there is none."""
        waiting = [other for other in self.connections if not other.busy and other is not self]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda other: other._idle_from)
        oldest.transport.abort()
        self.connections.discard(oldest)  # at once: more may come before the loop tells it
        return True

    def _watch(self) -> None:
        self._timer = self.loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._taken_at = now
        self._unread = unread
        if now - self._taken_at > READ_SECONDS:
            self.transport.abort()
            return
        if self._header_from is not None and now - self._header_from > HEADER_SECONDS and not self.busy:
            self.transport.close()
        self._watch()


def _refusal() -> bytes:
    body = json.dumps(_REFUSAL.body()).encode()
    named = {**_REFUSAL.headers, "Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body
