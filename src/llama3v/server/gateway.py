"""What all requests share, and the path of one: body, pictures, queue, answer."""

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama3v.config import Sampling, ServeConfig
from llama3v.model.prompt import Turn
from llama3v.server.body import Budget, Share, gone, read_body, until_gone
from llama3v.server.errors import ApiError, deadline_exceeded
from llama3v.server.formats import Formats
from llama3v.server.keys import Key, KeyRing
from llama3v.server.metrics import Metrics
from llama3v.server.model import Finished, Question, ServedModel, Sight, Text
from llama3v.server.parse import most_tokens_of, prompts_of, require_supported, samplings_of, turns_of
from llama3v.server.pictures import Picture, Pictures
from llama3v.server.responses import DONE, STILL_HERE, Report, Shape, event, to_json
from llama3v.server.scheduler import Scheduler, Ticket
from llama3v.server.schema import ChatRequest, CompletionRequest, Message

log = logging.getLogger("llama3v.server")

STILL_HERE_SECONDS = 15.0
_LAST_WORDS_SECONDS = 2.0  # for telling a slow reader that its time is over


@dataclass
class Gateway:
    """The running server: everything that requests share."""

    config: ServeConfig
    model: ServedModel
    scheduler: Scheduler
    pictures: Pictures
    keys: KeyRing
    metrics: Metrics
    budget: Budget
    formats: Formats
    started: int
    """Unix time."""
    ready: bool = False
    """Whether new work is welcome: not before the warm-up and not while the server ends."""

    @property
    def max_body(self) -> int:
        """Bytes of the largest request."""
        return self.config.max_body_mb * 2**20


@dataclass
class Asked:
    """A request that was read and fits: what is to be done, and who asks."""

    shape: Shape
    questions: list[Question]
    samplings: list[Sampling]
    stream: bool
    include_usage: bool
    client: str
    key: Key | None
    report: Report
    sight: Sight

    @property
    def with_tokens(self) -> bool:
        return self.samplings[0].logprobs is not None


async def chat(gateway: Gateway, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await _answer(gateway, request, functools.partial(_read_chat, gateway, request))


async def complete(gateway: Gateway, request: Request) -> Response:
    """POST /v1/completions."""
    return await _answer(gateway, request, functools.partial(_read_completion, gateway, request))


async def _answer(gateway: Gateway, request: Request, read: Callable[[Share], Awaitable[Asked]]) -> Response:
    """Read, wait, answer, all within the deadline. What is still held at the end is given back, however it ends."""
    deadline = asyncio.get_running_loop().time() + gateway.config.deadline_seconds
    with contextlib.ExitStack() as held:
        share = held.enter_context(gateway.budget.share())
        try:
            async with asyncio.timeout_at(deadline):
                asked = await read(share)
                ticket = submit(gateway, asked)
                held.callback(gateway.scheduler.withdraw, ticket)
                if asked.stream:
                    return Events(gateway, asked, ticket, deadline, held.pop_all())
                return await until_gone(request, _whole(asked, ticket))
        except TimeoutError:
            raise deadline_exceeded() from None


async def _read_chat(gateway: Gateway, request: Request, share: Share) -> Asked:
    body = await read_body(request, ChatRequest, gateway.max_body, share)
    body_bytes = share.count
    require_model(gateway, body.model)
    require_supported(body)
    schema = await until_gone(request, gateway.formats.schema_of(body))
    samplings = samplings_of(body, gateway.config.max_choices, schema)
    turns, pictures = await until_gone(request, see(gateway, body.messages, share))
    share.give_back(body_bytes)
    key = request.state.key
    question = gateway.model.question(turns, pictures, most_tokens_of(body), most_tokens(gateway, key))
    return _asked(gateway, request, body, Shape("chat", gateway.model.name), [question], samplings)


async def _read_completion(gateway: Gateway, request: Request, share: Share) -> Asked:
    body = await read_body(request, CompletionRequest, gateway.max_body, share)
    require_model(gateway, body.model)
    require_supported(body)
    samplings = samplings_of(body, gateway.config.max_choices)
    most = most_tokens(gateway, request.state.key)
    questions = [
        gateway.model.question([Turn("user", prompt)], [], most_tokens_of(body), most) for prompt in prompts_of(body)
    ]
    if len(questions) * len(samplings) > max(gateway.config.max_choices, len(questions)):
        raise ApiError(400, "Ask for several answers to one prompt, or for one answer to several prompts.", param="n")
    return _asked(gateway, request, body, Shape("text", gateway.model.name), questions, samplings)


def _asked(
    gateway: Gateway,
    request: Request,
    body: ChatRequest | CompletionRequest,
    shape: Shape,
    questions: list[Question],
    samplings: list[Sampling],
) -> Asked:
    sight = Sight()
    return Asked(
        shape=shape,
        questions=questions,
        samplings=samplings,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        client=request.state.client,
        key=request.state.key,
        report=Report(questions, sight),
        sight=sight,
    )


async def see(gateway: Gateway, messages: Sequence[Message], share: Share) -> tuple[list[Turn], list[Picture]]:
    """Turns, and their pictures decoded and cut. Raises ApiError."""
    turns, sources = turns_of(messages, gateway.config.max_images)
    pictures = await gateway.pictures.read(sources)
    share.take(sum(picture.tiles.pixels.nbytes for picture in pictures))
    return turns, pictures


def require_model(gateway: Gateway, name: str | None) -> None:
    """Raises ApiError (404) for a model that is not served here."""
    if name is not None and name != gateway.model.name:
        raise ApiError(
            404, "This server has no such model; GET /v1/models names it.", code="model_not_found", param="model"
        )


def most_tokens(gateway: Gateway, key: Key | None) -> int:
    """Most tokens of an answer to this client."""
    own = key.max_new_tokens if key else None
    return min(gateway.config.max_new_tokens, own or gateway.config.max_new_tokens)


def submit(gateway: Gateway, asked: Asked) -> Ticket:
    """Queue a request. Raises ApiError (429, 503)."""

    def work(ticket: Ticket) -> None:
        asked.report.queue_seconds = ticket.queue_seconds
        texts: list[str] = []
        for number, question in enumerate(asked.questions):
            hear = functools.partial(_hear, asked.report, ticket, texts, number * len(asked.samplings))
            gateway.model.answers(ticket, question, asked.samplings, asked.sight, hear)
        if not ticket.cancelled.is_set():
            gateway.metrics.answered(asked.report)
            _log(gateway, asked, "".join(texts))

    most_waiting = asked.key.max_waiting if asked.key else None
    return gateway.scheduler.submit(asked.client, work, most_waiting=most_waiting)


def _hear(report: Report, ticket: Ticket, texts: list[str], first: int, step: Text | Finished) -> None:
    """Count and pass on what was said. `first`: number of this question's first answer."""
    if first:
        step = replace(step, choice=step.choice + first)
    if isinstance(step, Text):
        report.text_came()
        texts.append(step.text)
    else:
        report.finished.append(step)
    ticket.put(step)


def _log(gateway: Gateway, asked: Asked, answered: str) -> None:
    """Where the operator asks for it: what was asked and answered."""
    if gateway.config.log_prompts:
        asking = [turn.text for question in asked.questions for turn in question.turns]
        log.info("asked %r, answered %r", asking, answered)


async def _whole(asked: Asked, ticket: Ticket) -> Response:
    count = len(asked.questions) * len(asked.samplings)
    texts = [""] * count
    tokens: list[list[Any]] = [[] for _ in range(count)]
    while steps := await ticket.take():
        for step in steps:
            if isinstance(step, Text):
                texts[step.choice] += step.text
                tokens[step.choice] += step.tokens
    if len(asked.report.finished) < count:  # the work was cancelled, by the end of the server
        raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)
    content = asked.shape.whole(texts, tokens if asked.with_tokens else None, asked.report)
    return Response(to_json(content), media_type="application/json", headers=asked.report.headers())


class Events(Response):
    """A stream of server-sent events. It ends where the client leaves, or the deadline passes; so does the work."""

    def __init__(
        self, gateway: Gateway, asked: Asked, ticket: Ticket, deadline: float, held: contextlib.ExitStack
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._gateway, self._asked, self._ticket, self._deadline, self._held = gateway, asked, ticket, deadline, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            sending = asyncio.ensure_future(self._send_all(send))
            watching = asyncio.ensure_future(gone(Request(scope, receive)))
            try:
                await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                else:
                    self._gateway.metrics.left()
            finally:
                for task in (sending, watching):
                    task.cancel()
                await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self._deadline):
                async for data in self._events():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
        except TimeoutError:
            error = deadline_exceeded()
        except ApiError as caught:
            error = caught
        self._gateway.metrics.failed(error.code or "")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await send({"type": "http.response.body", "body": event(error.body()), "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """What has come, again and again; a comment whenever nothing comes for a while."""
        asked, begun = self._asked, set[int]()
        while (steps := await self._ticket.take(STILL_HERE_SECONDS)) != []:
            yield STILL_HERE if steps is None else b"".join(self._chunks(steps, begun))
        if len(asked.report.finished) < len(asked.questions) * len(asked.samplings):
            raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)
        if asked.include_usage:
            yield event(asked.shape.usage(asked.report))
        yield DONE

    def _chunks(self, steps: Sequence[Text | Finished], begun: set[int]) -> Iterator[bytes]:
        shape, with_tokens = self._asked.shape, self._asked.with_tokens
        for step in steps if with_tokens else joined(steps):
            if step.choice not in begun:
                begun.add(step.choice)
                for chunk in shape.begin(step.choice):
                    yield event(chunk)
            yield shape.text_event(step, with_tokens) if isinstance(step, Text) else event(shape.end(step))


def joined(steps: Sequence[Text | Finished]) -> Iterator[Text | Finished]:
    """Texts that follow one another as one: who reads slower than the model writes gets more at a time."""
    for (choice, is_text), group in itertools.groupby(steps, lambda step: (step.choice, isinstance(step, Text))):
        if is_text:
            yield Text(choice, "".join(step.text for step in group if isinstance(step, Text)))
        else:
            yield from group
