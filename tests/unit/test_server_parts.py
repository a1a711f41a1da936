"""Parts of the gateway by themselves: addresses, keys, the config file, the queue's order, the canary."""

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from hypothesis import given
from hypothesis import strategies as st

from llama3v.config import ServeConfig
from llama3v.engines.torch import TorchEngine
from llama3v.errors import ConfigError
from llama3v.server import fetch
from llama3v.server.canary import require_sight, warm_up
from llama3v.server.errors import ApiError
from llama3v.server.fetch import Fetcher, checked_url, is_public
from llama3v.server.keys import KeyRing, digest_of, new_key
from llama3v.server.scheduler import Ticket, _Waiting
from llama3v.server.settings import is_loopback, read_settings
from llama3v.server.verb import serve

REFUSED_ADDRESSES = [
    "file:///etc/passwd",
    "ftp://example.com/a.png",
    "http://localhost/a.png",
    "http://localhost./a.png",
    "http://2130706433/a.png",
    "http://0x7f000001/a.png",
    "http://0177.0.0.1/a.png",
    "http://127.1/a.png",
    "http://0/a.png",
    "http://1.2.3/a.png",
    "http://user@example.com/a.png",
    "http://user:secret@example.com/a.png",
    "http://example.com\\@127.0.0.1/a.png",
    "http://example.com:22/a.png",
    "https://example.com:80/a.png",
    "http://exa mple.com/a.png",
    "http://example.com/\r\nHost: evil",
    "http://ⓔxample.com/a.png",
    "http://[::ffff:127.0.0.1%25eth0]/a.png",
    "http://[0:0:0:0:0:ffff:7f00:1]/a.png",
    "http:///a.png",
    "http://intern/a.png",
    "http://" + "a" * 3000 + ".com",
]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_an_address_that_parsers_may_read_differently_is_refused(address: str) -> None:
    with pytest.raises(ApiError, match="cannot be fetched"):
        checked_url(address)


@pytest.mark.parametrize(
    "address", ["http://example.com/a.png", "https://cdn.example.co.uk:443/a?b=c#d", "http://8.8.8.8/x"]
)
def test_an_ordinary_address_is_taken_as_it_is(address: str) -> None:
    assert checked_url(address).host in address


PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *("255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *("ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_of_an_own_network_is_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert all(map(is_public, ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"]))


class _Pictures(BaseHTTPRequestHandler):
    """A site with a picture, redirects, and things that never end."""

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        if self.path == "/picture":
            self._send(200, b"\x89PNG", {"Content-Length": "4"})
        elif self.path == "/endless":
            self._send(200, b"x" * 3000)
        elif self.path == "/packed":
            self._send(200, b"x", {"Content-Encoding": "gzip"})
        elif self.path.startswith("/to?"):
            self._send(302, b"", {"Location": self.path.partition("?")[2]})
        elif self.path == "/loop":
            self._send(302, b"", {"Location": "/loop"})
        else:
            self._send(404, b"")

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Pictures)
    server.hosts = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetched(site: HTTPServer, path: str, names: dict[str, list[str]] | None = None) -> bytes:
    """What is fetched from pictures.example, a name that leads to `site`; of `is_allowed` only its address is public."""
    asked: list[str] = []

    async def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        return (names or {}).get(name, ["127.0.0.1"] if name == "pictures.example" else ["10.0.0.1"])

    async def get() -> bytes:
        ports = {"http": site.server_port, "https": 443}
        fetcher = Fetcher(resolve=resolve, ports=ports, is_allowed=lambda address: address == "127.0.0.1")
        try:
            return await fetcher(f"http://pictures.example:{site.server_port}{path}")
        finally:
            await fetcher.close()
            assert len(asked) <= fetch.MOST_REDIRECTS + 1  # once for each request, never again

    return asyncio.run(get())


def test_a_picture_is_fetched_from_the_address_that_was_checked_under_its_own_name(site: HTTPServer) -> None:
    assert fetched(site, "/picture") == b"\x89PNG"
    assert site.hosts == [f"pictures.example:{site.server_port}"]  # type: ignore[attr-defined]
    assert fetched(site, "/to?/picture") == b"\x89PNG"


@pytest.mark.parametrize(
    "path",
    [
        *("/loop", "/packed", "/nothing", "/to?file:///etc/passwd", "/to?http://127.0.0.1/picture", "/to?//evil/x"),
        *("/to?http://elsewhere.example/picture", "/to?http://169.254.169.254/latest", "/to?"),
    ],
)
def test_redirects_are_checked_anew_and_what_is_odd_is_refused(site: HTTPServer, path: str) -> None:
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetched(site, path)


def test_a_name_with_one_private_address_among_public_ones_is_refused(site: HTTPServer) -> None:
    with pytest.raises(ApiError):
        fetched(site, "/picture", {"pictures.example": ["127.0.0.1", "10.0.0.1"]})
    assert site.hosts == []  # type: ignore[attr-defined]


def test_what_is_too_large_is_given_up(site: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    with pytest.raises(ApiError):
        fetched(site, "/endless")


def test_a_server_for_others_needs_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(ConfigError, match="needs a key"):
            read_settings(ServeConfig(host=host))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        read_settings(ServeConfig(host=host))
    _, lines = new_key("shop")
    (tmp_path / "serve.toml").write_text('host = "0.0.0.0"\n' + lines)
    config, keys = read_settings(ServeConfig(config=tmp_path / "serve.toml"))
    assert (config.host, [key.name for key in keys]) == ("0.0.0.0", ["shop"])


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('port = 9000\nqueue = 3\nvision_cache_dir = "kept"\nremote_images = true\n')
    config, _ = read_settings(ServeConfig(config=path, queue=5))
    assert (config.port, config.queue, config.vision_cache_dir, config.remote_images) == (9000, 5, Path("kept"), True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port =", "expected TOML"),
        ("prot = 1", "there is no option prot"),
        ("make_key = 'x'", "there is no option make_key"),
        ("port = 'x'", "port: "),
        ("queue = 0", "--queue is 0"),
        ("[[keys]]\nname = 'a'\nsha256 = 'short'", "keys.0.sha256"),
        ("[[keys]]\nname = 'a b'\nsha256 = '" + "0" * 64 + "'", "keys.0.name"),
        ("[[keys]]\nname = 'a'\nsha256 = '" + "0" * 64 + "'\nlimit = 3", "keys.0.limit"),
        (2 * ("[[keys]]\nname = 'a'\nsha256 = '" + "0" * 64 + "'\n"), "same name"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_settings(ServeConfig(config=tmp_path / "serve.toml"))
    assert "\n" not in str(caught.value)


def test_a_new_key_is_printed_once_and_known_by_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(ServeConfig(make_key="shop"))
    printed = capsys.readouterr()
    key = printed.out.strip()
    lines = printed.err.partition("[[keys]]")
    assert key not in printed.err
    (tmp_path / "serve.toml").write_text(lines[1] + lines[2])
    _, keys = read_settings(ServeConfig(config=tmp_path / "serve.toml"))
    holder = KeyRing(keys).holder_of(f"Bearer {key}")
    assert holder is not None
    assert (holder.name, holder.sha256) == ("shop", digest_of(key))
    with pytest.raises(ApiError, match="not known"):
        KeyRing(keys).holder_of("Bearer \udcff")


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_clients_are_served_in_turns_and_each_in_its_own_order(clients: list[str]) -> None:
    waiting = _Waiting()
    tickets = []
    for client in clients:
        ticket = Ticket.__new__(Ticket)
        ticket.client = client
        tickets.append(ticket)
        waiting.push(ticket)
    served = [waiting.pop() for _ in clients]
    assert waiting.count == 0
    for client in "abc":
        assert [t for t in served if t.client == client] == [t for t in tickets if t.client == client]
    for place, ticket in enumerate(served):  # nobody is served twice while another, who waits, is passed over
        later = {other.client for other in served[place:]}
        turn = [other.client for other in served[place : place + len(later)]]
        assert set(turn) == later, (ticket.client, turn)


def test_a_model_that_sees_passes_the_canary_and_a_blind_one_does_not(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(tiny_model_dir, device="cpu")
    assert require_sight(engine) > 0
    warm_up(engine)
    blind = TorchEngine(tiny_model_dir, device="cpu")
    original = blind._visual_tokens_of_tiles
    monkeypatch.setattr(blind, "_visual_tokens_of_tiles", lambda tiles: original(tiles) * 0)
    with pytest.raises(ConfigError, match="broken"):
        require_sight(blind)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(site: HTTPServer) -> None:
    with pytest.raises(ConfigError, match="give another --port"):
        serve(ServeConfig(model="there-is-none", port=site.server_port))
