"""Who is answered next: a bounded queue, fair between clients, and as many workers as the engine holds conversations.

Work runs in one worker's thread; what it puts into its `Ticket`, from whatever thread, reaches the event loop. Nobody waits
for a slow reader: what it has not read stays in its ticket, and an answer is never longer than `max_new_tokens`.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama3v.server.errors import ApiError, internal_error

log = logging.getLogger("llama3v.server")

Work = Callable[["Ticket"], None]

_END = object()


class _Post:
    """Carries events from the threads of the work into the event loop, all that wait in one turn of it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Ticket, Any]] = deque()
        self._called = False

    def send(self, ticket: "Ticket", event: Any) -> None:
        self._waiting.append((ticket, event))
        if self._called:
            return
        self._called = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self._called = False
            ticket.cancelled.set()

    def _deliver(self) -> None:
        self._called = False  # first: what comes from now on may need another turn
        while self._waiting:
            ticket, event = self._waiting.popleft()
            ticket.arrived(event)


class Ticket:
    """One piece of work, seen from the event loop: `take` what it puts.

    Attributes:
        cancelled: the work is not wanted any more; it looks at this between its steps.
        queue_seconds: how long it waited for a worker.
    """

    def __init__(self, client: str, work: Work, post: _Post) -> None:
        self.client = client
        self.cancelled = threading.Event()
        self.queue_seconds = 0.0
        self._work = work
        self._post = post
        self._made = time.perf_counter()
        self._close: Callable[[], None] | None = None
        # of the event loop:
        self._events: list[Any] = []
        self._error: Exception | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, seconds: float | None = None) -> list[Any] | None:
        """All that was put since the last time, at least one; [] at the end; None where nothing comes for `seconds`.

        Raises what the work raised.
        """
        if not self._events and not self._ended:
            await self._wait(seconds)
        events, self._events = self._events, []
        if events:
            return events
        if self._error is not None:
            raise self._error
        return [] if self._ended else None

    async def _wait(self, seconds: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def arrived(self, event: Any) -> None:
        """An event has come; called in the event loop."""
        if event is _END:
            self._ended = True
        elif isinstance(event, Exception):
            self._error, self._ended = event, True
        else:
            self._events.append(event)
        self._wake()

    def put(self, event: Any) -> None:
        """Something for who asked; from any thread. Never waits."""
        self._post.send(self, event)

    def on_cancel(self, close: Callable[[], None]) -> None:
        """What interrupts the step that is under way; may be called from any thread."""
        self._close = close
        if self.cancelled.is_set():
            close()

    def cancel(self) -> None:
        """Give up. Never waits, and does nothing where the work has ended."""
        self.cancelled.set()
        if self._close is not None:
            self._close()

    def run(self) -> None:
        """All of the work, in this thread."""
        self.queue_seconds = time.perf_counter() - self._made
        try:
            if not self.cancelled.is_set():
                self._work(self)
            self.put(_END)
        except Exception as error:  # one request must not end the worker, or its neighbours
            if not isinstance(error, ApiError):
                log.error("a request failed: %s", type(error).__name__, exc_info=error)
                error = internal_error()
            self.put(error)


@dataclass
class _Waiting:
    """Tickets that wait, by client; the client in front is served next and then goes to the end."""

    clients: OrderedDict[str, deque[Ticket]] = field(default_factory=OrderedDict)
    count: int = 0

    def of(self, client: str) -> int:
        return len(self.clients.get(client, ()))

    def push(self, ticket: Ticket) -> None:
        self.clients.setdefault(ticket.client, deque()).append(ticket)
        self.count += 1

    def pop(self) -> Ticket:
        client, tickets = next(iter(self.clients.items()))
        ticket = tickets.popleft()
        self.clients.move_to_end(client)
        if not tickets:
            del self.clients[client]
        self.count -= 1
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        tickets = self.clients.get(ticket.client)
        if tickets is None or ticket not in tickets:
            return False
        tickets.remove(ticket)
        if not tickets:
            del self.clients[ticket.client]
        self.count -= 1
        return True


class Scheduler:
    """Args:
    workers: pieces of work that run at the same time.
    places: pieces of work that may wait. The last quarter of them is only for clients that wait for nothing yet.
    """

    def __init__(self, *, workers: int, places: int) -> None:
        self.workers = workers
        self.places = places
        self.running = 0
        self._waiting = _Waiting()
        self._changed = threading.Condition()
        self._closed = False
        self._mean_seconds = 1.0  # of the latest pieces of work
        self._active: set[Ticket] = set()
        self._post: _Post | None = None  # of the event loop that submits
        self._threads = [
            threading.Thread(target=self._serve, name=f"llama3v-engine-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Pieces of work without a worker."""
        return self._waiting.count

    def submit(self, client: str, work: Work, *, most_waiting: int | None = None) -> Ticket:
        """Queue work.

        Args:
            most_waiting: a limit of this client's own.

        Raises ApiError: 429 where there is no place, 503 where the server is about to end.
        """
        self._post = self._post or _Post()
        ticket = Ticket(client, work, self._post)
        with self._changed:
            if self._closed:
                raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)
            if not self._has_place(client, most_waiting):
                raise self._full()
            self._waiting.push(ticket)
            self._changed.notify()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel work, wherever it is. It is a matter of one step until its worker is free."""
        with self._changed:
            self._waiting.remove(ticket)
        ticket.cancel()

    def close(self, seconds: float = 5.0) -> None:
        """Cancel everything and wait for the workers, at most so long."""
        with self._changed:
            self._closed = True
            active = list(self._active)
            while self._waiting.count:
                active.append(self._waiting.pop())
            self._changed.notify_all()
        for ticket in active:
            ticket.cancel()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _has_place(self, client: str, most_waiting: int | None) -> bool:
        idle = self.running < self.workers and not self._waiting.count
        own = self._waiting.of(client)
        if most_waiting is not None and own >= most_waiting and not idle:
            return False
        common = self.places - self.places // 4
        return self._waiting.count < (common if own else self.places)

    def _full(self) -> ApiError:
        seconds = (self._waiting.count + 1) * self._mean_seconds / self.workers
        return ApiError(
            429,
            "Too many requests are waiting; try again later.",
            code="queue_full",
            retry_after=min(max(1, round(seconds)), 60),
        )

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting.count and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                ticket = self._waiting.pop()
                self._active.add(ticket)
                self.running += 1
            started = time.perf_counter()
            try:
                ticket.run()
            finally:
                with self._changed:
                    self.running -= 1
                    self._active.discard(ticket)
                    self._mean_seconds += 0.2 * (time.perf_counter() - started - self._mean_seconds)
