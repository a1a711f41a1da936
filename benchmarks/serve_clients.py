"""Clients of an OpenAI-compatible server, for benchmarks/serve.py: streams that are timed, left or read slowly."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
from PIL import Image

TEXTS = (
    "What is on the table?",
    "How many shapes are there?",
    "Describe the picture.",
    "What colour is the largest shape?",
    "Where is the star?",
    "Is there a circle?",
)


@dataclass
class Timing:
    """One answer: seconds to its first text and to its end, and its tokens."""

    first: float
    whole: float
    tokens: int
    text: str


@dataclass
class Load:
    """What became of the requests of a load test."""

    right: int = 0
    wrong: int = 0
    left: int = 0
    read_slowly: int = 0
    statuses: Counter = field(default_factory=Counter)
    timings: list[Timing] = field(default_factory=list)


def picture(seed: int, size: tuple[int, int]) -> str:
    """A data URL of coloured squares, others for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str, *pictures: str, tokens: int) -> dict[str, Any]:
    """A request: greedy, streamed, with its usage."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def mixed(tokens: int) -> list[dict[str, Any]]:
    """Questions about no, one or two pictures, small and large."""
    sizes = [(90, 90), (240, 160), (120, 300), (400, 400)]
    urls = [picture(number, sizes[number % 4]) for number in range(8)]
    asked = [question(text, tokens=tokens) for text in TEXTS]
    asked += [question(TEXTS[n % 6], urls[n], tokens=tokens) for n in range(8)]
    asked += [question(TEXTS[n], urls[n], urls[n + 1], tokens=tokens) for n in range(2)]
    return asked


async def ask(client: httpx2.AsyncClient, body: dict[str, Any], *, pause: float = 0.0, leave_at: float = 1e9) -> Any:
    """One stream -> Timing; the status, where it is refused; None, where the client leaves after `leave_at` seconds."""
    started = time.perf_counter()
    first, texts, tokens = 0.0, [], 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return response.status_code
        async for line in response.aiter_lines():
            if time.perf_counter() - started > leave_at:
                return None
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line[6:])
            if "error" in data:
                return data["error"].get("code") or "error"
            said = "".join(choice["delta"].get("content") or "" for choice in data.get("choices") or [])
            if said and not first:
                first = time.perf_counter() - started
            texts.append(said)
            tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
            if pause:
                await asyncio.sleep(pause)
    whole = time.perf_counter() - started
    return Timing(first or whole, whole, tokens, "".join(texts))


def open_client(address: str) -> httpx2.AsyncClient:
    """A client with room for many streams."""
    limits = httpx2.Limits(max_connections=256, max_keepalive_connections=0)  # llama-server may close one that is kept
    return httpx2.AsyncClient(base_url=address, timeout=120, limits=limits)


async def together(address: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[list[Timing], float]:
    """All requests, `clients` at a time, each on a connection of its own -> timings, and seconds in all."""
    async with open_client(address) as client:
        waiting = list(reversed(bodies))
        timings: list[Timing] = []

        async def work() -> None:
            while waiting:
                try:
                    found = await ask(client, waiting.pop())
                except httpx2.HTTPError as error:
                    raise RuntimeError(f"{address} hung up: {error!r}") from error
                assert isinstance(found, Timing), f"{address} refused a question: {found}"
                timings.append(found)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return timings, time.perf_counter() - started


async def alone(address: str, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """The answers, one after the other."""
    return [timing.text for body in bodies for timing in (await together(address, [body], 1))[0]]


async def load(address: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float, seed: int = 0) -> Load:
    """Many clients for a while: a fifth of the requests is left, a tenth is read slowly, each answer is compared."""
    expected = await alone(address, bodies)
    found = Load()
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        async with open_client(address) as client:
            while time.perf_counter() < end:
                place = chance.randrange(len(bodies))
                kind = chance.random()
                leaves, slow = kind < 0.2, 0.2 <= kind < 0.3
                found.left += leaves
                found.read_slowly += slow
                leave_at = chance.random() * 2 if leaves else 1e9
                asking = ask(client, bodies[place], pause=0.05 if slow else 0.0, leave_at=leave_at)
                try:
                    answer = await asyncio.wait_for(asking, leave_at if leaves else 120)
                except TimeoutError:  # left before anything came
                    continue
                if isinstance(answer, Timing):
                    found.statuses[200] += 1
                    found.right += answer.text == expected[place]
                    if answer.text != expected[place]:
                        found.wrong += 1
                        print(f"question {place}: {answer.text!r}, alone {expected[place]!r}", flush=True)
                    if not slow:
                        found.timings.append(answer)
                elif answer is not None:
                    found.statuses[answer] += 1
                    await asyncio.sleep(0.2 + chance.random())

    await asyncio.gather(*(one(number) for number in range(clients)))
    return found
