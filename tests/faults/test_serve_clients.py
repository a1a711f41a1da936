"""Many clients: those that leave, wait, read slowly or take too much harm nobody but themselves."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.engines.torch import TorchEngine
from llama3v.model.prompt import Turn
from llama3v.server.keys import Key, digest_of
from tests.serving import Running, image_part, png, running, text_part

QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu", conversations=2)


@pytest.fixture
def steps(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> "Steps":
    """Control over how long the model's steps take."""
    return Steps(engine, monkeypatch)


class Steps:
    """Seconds that each step takes, and how many there were; they can be held, until all who shall ask have asked."""

    def __init__(self, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._free = threading.Event()
        self._free.set()
        self.seconds = {"vision": 0.0, "read": 0.0}
        self.count = {"vision": 0, "read": 0}
        for kind, owner, name in (
            ("vision", engine, "_visual_tokens_of_tiles"),
            ("read", engine._caches, "read_part"),
        ):
            monkeypatch.setattr(owner, name, self._slowed(kind, getattr(owner, name)))

    def _slowed(self, kind: str, work: Any) -> Any:
        def step(*arguments: Any) -> Any:
            self.count[kind] += 1
            assert self._free.wait(60)
            time.sleep(self.seconds[kind])
            return work(*arguments)

        return step

    def hold(self) -> None:
        """From now on no step is taken."""
        self._free.clear()

    def go_on(self) -> None:
        """Steps are taken again."""
        self._free.set()

    def reached(self, kind: str, count: int) -> None:
        end = time.monotonic() + 20
        while self.count[kind] < count:
            assert time.monotonic() < end, f"{kind} was not reached"
            time.sleep(0.005)


@contextmanager
def asking(server: Running, content: Any, **more: Any) -> Iterator[socket.socket]:
    """A client that has asked and reads nothing; it leaves at the end."""
    body = json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()
    raw = socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])))
    try:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        yield raw
    finally:
        raw.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["queued", "vision", "prefill", "decode"])
def test_who_leaves_frees_its_place_and_the_neighbours_answer_stays_the_same(
    engine: TorchEngine, steps: Steps, phase: str, stream: bool
) -> None:
    """llama.cpp 24496: a cancelled request took its neighbours with it. mlx-vlm 1668: answers got mixed up."""
    expected = engine.answer([Turn("user", "Hello")], max_new_tokens=16)
    data = png(10 * len(phase) + stream, (84, 84))  # five tiles, not seen before
    with running(engine, max_new_tokens=200) as server, ThreadPoolExecutor() as pool:
        steps.seconds = {"vision": 0.05 if phase == "vision" else 0.0, "read": 0.02}
        neighbour = pool.submit(server.chat, "Hello", max_tokens=16)
        steps.reached("read", 2)
        steps.count = {"vision": 0, "read": 0}
        if phase == "queued":
            steps.hold()
        others = [pool.submit(server.chat, "Hello", max_tokens=2) for _ in range(3)] if phase == "queued" else []
        content = [image_part(data), text_part(QUESTION)]
        with asking(server, content, max_tokens=200, stream=stream):
            if phase == "queued":
                server.queued(3)  # one of the four has the second worker
                steps.go_on()
            else:
                steps.reached("vision", {"vision": 2, "prefill": 5, "decode": 5}[phase])
                steps.reached("read", {"vision": 0, "prefill": 2, "decode": 8}[phase])
        left = time.monotonic()
        assert neighbour.result(30).json()["choices"][0]["message"]["content"] == expected
        assert all(other.result(30).status_code == 200 for other in others)
        if phase == "vision":
            assert steps.count["vision"] < 5  # it did not look at the rest
        assert server.idle(5)
        assert time.monotonic() - left < 5


def test_concurrent_answers_are_those_given_alone(engine: TorchEngine) -> None:
    asked = [(f"{text} {number}", number % 4) for number, text in enumerate([QUESTION, "Hello", "A dog?", "Why?"] * 3)]
    pictures = [png(number, (84, 42) if number % 2 else (40, 40)) for number in range(3)]

    def alone(text: str, kind: int) -> str:
        images = [] if kind == 3 else [pictures[kind]]
        return engine.answer([Turn("user", text, tuple(range(len(images))))], images, max_new_tokens=8)

    expected = [alone(*question) for question in asked]
    with running(engine) as server, ThreadPoolExecutor(12) as pool:

        def ask(question: tuple[str, int]) -> str:
            text, kind = question
            images = [] if kind == 3 else [image_part(pictures[kind])]
            answer = server.chat([*images, text_part(text)], max_tokens=8)
            return answer.json()["choices"][0]["message"]["content"]

        assert list(pool.map(ask, asked)) == expected
        assert server.idle()


def test_a_full_queue_says_when_to_come_again(engine: TorchEngine, steps: Steps) -> None:
    with running(engine, queue=4) as server, ThreadPoolExecutor(16) as pool:
        steps.hold()
        asked = [pool.submit(server.chat, "Hello", max_tokens=4) for _ in range(16)]
        wait(asked, timeout=30, return_when=FIRST_COMPLETED)
        steps.go_on()
        answers = [answer.result(30) for answer in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert len(refused) < 16
        for answer in refused:
            assert answer.json()["error"]["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert {answer.status_code for answer in answers} == {200, 429}
        assert server.idle()


def test_one_client_cannot_keep_another_waiting(engine: TorchEngine, steps: Steps) -> None:
    """The second one is served in turns with the first, whose many requests came before."""
    keys = [Key(name=name, sha256=digest_of(name)) for name in ("many", "one")]
    steps.seconds["read"] = 0.02
    order: list[str] = []
    with running(engine, keys=keys) as server, ThreadPoolExecutor(16) as pool:
        steps.hold()

        def ask(name: str) -> None:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
            headers = {"Authorization": f"Bearer {name}"}
            assert server.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            order.append(name)

        waiting = [pool.submit(ask, "many") for _ in range(12)]
        server.queued(10)  # and two are in work
        last = pool.submit(ask, "one")
        server.queued(11)
        steps.go_on()
        last.result(30)
        assert order.index("one") < 6
        assert all(future.result(30) is None for future in waiting)


def test_a_slow_reader_holds_nobody_up(engine: TorchEngine) -> None:
    with running(engine, max_new_tokens=60) as server:
        with asking(server, "Hello", stream=True, max_tokens=60), asking(server, "Hi", stream=True, max_tokens=60):
            started = time.monotonic()
            assert server.chat("Hello", max_tokens=4).status_code == 200  # both workers are free again
            assert time.monotonic() - started < 20
        assert server.idle()


def test_a_request_past_its_deadline_is_stopped(engine: TorchEngine, steps: Steps) -> None:
    steps.seconds["read"] = 0.05
    with running(engine, deadline_seconds=1.0, max_new_tokens=200) as server:
        answer = server.chat("Hello", max_tokens=200)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert len(lines) > 2  # what was made until then had come
        assert server.idle()


def test_a_defect_in_one_request_is_a_constant_500_and_the_next_is_answered(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine._caches.read_part

    def fail(owner: object, prompt: Any) -> Any:
        if len(prompt.ids) > 60:
            raise RuntimeError("secret at 0x7f00 in /home/somebody")
        return original(owner, prompt)

    monkeypatch.setattr(engine._caches, "read_part", fail)
    with running(engine) as server:
        answer = server.chat("a dog " * 30, max_tokens=2)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        body = {"messages": [{"role": "user", "content": "a dog " * 30}], "max_tokens": 2, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            text = stream.read().decode()
        assert "internal_error" in text
        assert "secret" not in text
        assert server.chat("Hi", max_tokens=2).status_code == 200
        assert server.idle()


def test_keys_are_needed_known_and_limited(engine: TorchEngine) -> None:
    keys = [
        Key(name="shop", sha256=digest_of("right"), requests_per_minute=3, max_new_tokens=2),
        Key(name="other", sha256=digest_of("another")),
    ]
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with running(engine, keys=keys) as server:

        def ask(header: str | None) -> Any:
            headers = {} if header is None else {"Authorization": header}
            return server.http.post("/v1/chat/completions", json=body, headers=headers)

        for wrong in (None, "", "right", "Basic right", "Bearer", "Bearer wrong", "Bearer righ", "Bearer right2"):
            assert ask(wrong).status_code == 401, wrong
        assert ask("Bearer right").json()["usage"]["completion_tokens"] <= 2
        assert ask("bearer right").status_code == 200
        assert ask("Bearer another").status_code == 200
        assert ask("Bearer right").status_code == 200
        limited = ask("Bearer right")
        assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limited")
        assert int(limited.headers["retry-after"]) >= 1
        assert ask("Bearer another").status_code == 200
        assert server.http.get("/health").status_code == 200
        for path in ("/metrics", "/v1/models"):
            assert server.http.get(path).status_code == 401


def test_the_server_drains_what_is_in_work(engine: TorchEngine, steps: Steps) -> None:
    steps.seconds["read"] = 0.05
    answers: list[Any] = []
    with running(engine) as server:
        asking_threads = [
            threading.Thread(target=lambda: answers.append(server.chat("Hello", max_tokens=24))) for _ in range(4)
        ]
        for thread in asking_threads:
            thread.start()
        scheduler, end = server.gateway.scheduler, time.monotonic() + 10
        while scheduler.running + scheduler.waiting < 4:  # a request that has not arrived is not in work
            assert time.monotonic() < end
            time.sleep(0.005)
        server.stop()
        for thread in asking_threads:
            thread.join(30)
    assert [answer.status_code for answer in answers] == [200] * 4
