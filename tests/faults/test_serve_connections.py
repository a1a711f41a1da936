"""Sockets that send nothing, drip, or read nothing: they lose their connection, and others keep theirs."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.engines.torch import TorchEngine
from llama3v.server import connections
from tests.serving import Running, running

MOST = 6
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Running]:
    patch = pytest.MonkeyPatch()
    patch.setattr(connections, "HEADER_SECONDS", 0.6)
    patch.setattr(connections, "READ_SECONDS", 0.6)
    patch.setattr(connections, "LOOK_SECONDS", 0.2)
    with running(TorchEngine(tiny_model_dir, device="cpu"), max_connections=MOST) as found:
        yield found
    patch.undo()


def connected(server: Running) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])))
    found.settimeout(5)
    return found


def health(raw: socket.socket) -> None:
    """Ask over a connection, and read all of the answer."""
    raw.sendall(REQUEST + b"\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        part = raw.recv(2**16)
        assert part, "the server closed the connection"
        answer += part
    assert answer.startswith(b"HTTP/1.1 200 ")


def drip(raw: socket.socket, drop: bytes) -> float:
    """Send a little again and again until the server hangs up; how many seconds it took."""
    started = time.monotonic()
    try:
        while time.monotonic() - started < 5:
            raw.sendall(drop)
            time.sleep(0.1)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return time.monotonic() - started


def closed_within(raw: socket.socket, seconds: float) -> bool:
    """Whether the server hangs up."""
    raw.settimeout(seconds)
    try:
        while raw.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


def test_a_connection_that_sends_nothing_is_closed(server: Running) -> None:
    with connected(server) as raw:
        started = time.monotonic()
        assert closed_within(raw, 5)
        assert time.monotonic() - started > 0.5


@pytest.mark.parametrize("kept", [False, True], ids=["a new connection", "a kept one"])
def test_headers_that_drip_are_cut_off(server: Running, kept: bool) -> None:
    """Slow loris: each byte came in time, the request never."""
    with connected(server) as raw:
        if kept:
            health(raw)
        raw.sendall(REQUEST)
        assert 0.5 < drip(raw, b"X-A: a\r\n") < 4


def test_a_body_that_nobody_waits_for_does_not_keep_its_connection(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert b" 415 " in raw.recv(2**16)
        assert 0.5 < drip(raw, b" ") < 4


def test_a_connection_between_two_requests_is_kept_longer_than_a_header_may_take(server: Running) -> None:
    with connected(server) as raw:
        health(raw)
        time.sleep(1.5)
        health(raw)


def test_more_connections_than_there_may_be_close_those_that_have_waited_longest(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of idle sockets pushes out itself, not those who ask."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60.0)
    with ExitStack() as held:
        idle = [held.enter_context(connected(server)) for _ in range(4 * MOST)]
        for _ in range(3):
            assert server.http.get("/health").status_code == 200
            idle.append(held.enter_context(connected(server)))
        assert len(server.server.server_state.connections) <= MOST
        assert closed_within(idle[0], 2)
        assert not closed_within(idle[-1], 0.2)


def test_where_all_connections_have_a_request_in_work_one_more_is_told_to_come_again(server: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as held:
        for _ in range(MOST):
            held.enter_context(connected(server)).sendall(head + b"Content-Length: 100\r\n\r\n{")
        end = time.monotonic() + 5
        while sum(connection.busy for connection in server.server.server_state.connections) < MOST:
            assert time.monotonic() < end
            time.sleep(0.01)
        with connected(server) as one_more:
            answer = one_more.recv(2**16)
            assert closed_within(one_more, 2)
        status, _, content = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in status
        assert json.loads(content)["error"]["code"] == "too_many_connections"
    assert server.idle()
    assert server.http.get("/health").status_code == 200


def test_who_reads_nothing_of_a_response_loses_it(server: Running) -> None:
    """What was written and not read was held for ever."""
    server.http.get("/openapi.json")
    with connected(server) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall((REQUEST.replace(b"/health", b"/openapi.json") + b"\r\n") * 300)  # 10 MB of answers
        raw.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 20
        while any(connection.client == raw.getsockname() for connection in server.server.server_state.connections):
            assert time.monotonic() < end
            time.sleep(0.1)
