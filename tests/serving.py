"""A gateway on a free port of this machine, in a thread: what the tests of `llama3v serve` ask."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import numpy as np
import uvicorn
from PIL import Image

from llama3v.config import ServeConfig
from llama3v.server.gateway import Gateway
from llama3v.server.keys import Key
from llama3v.server.verb import http_settings, open_gateway

DEFAULTS = ServeConfig(model="tiny", max_new_tokens=64, vision_cache_mb=8, deadline_seconds=60, drain_seconds=5)


@dataclass
class Running:
    """A server, and a client of it."""

    address: str
    gateway: Gateway
    http: httpx2.Client
    server: uvicorn.Server

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.should_exit = True

    def chat(self, content: Any, **more: Any) -> httpx2.Response:
        """Ask one user's message."""
        messages = more.pop("messages", [{"role": "user", "content": content}])
        return self.http.post("/v1/chat/completions", json={"messages": messages, **more})

    def queued(self, count: int, seconds: float = 20.0) -> None:
        """Wait until so many requests wait for a worker."""
        end = time.monotonic() + seconds
        while self.gateway.scheduler.waiting < count:
            assert time.monotonic() < end, f"only {self.gateway.scheduler.waiting} of {count} requests wait"
            time.sleep(0.005)

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing is in work or held, soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            scheduler = self.gateway.scheduler
            if not scheduler.running and not scheduler.waiting and not self.gateway.budget.used:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(engine: Any, keys: list[Key] | None = None, **options: Any) -> Iterator[Running]:
    """Serve `engine` while the body runs."""
    gateway = open_gateway(replace(DEFAULTS, **options), keys or [], engine)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(http_settings(gateway))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx2.Client(base_url=address, timeout=60) as client:
            yield Running(address, gateway, client, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def png(seed: int = 0, size: tuple[int, int] = (60, 60), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture file: coloured squares, others for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, media: str = "image/png") -> str:
    """Bytes as a data URL."""
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data), **more}}


def text_part(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "text", "text": text}
