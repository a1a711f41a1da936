"""Pictures at http(s) addresses, where the operator allows them. An address is a way into the operator's own network.

So: one parser for the check and for the request; the name is resolved once, every address that it has must be a public
one, and the connection goes to the address that was checked; each redirect starts anew; no proxy, no cookies, no
compression; bytes and seconds have a bound. Client errors say that it failed, not why: why would tell who listens where.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable

import httpx2

from llama3v.model.tiles import MAX_BYTES
from llama3v.server.errors import ApiError, refused

MOST_REDIRECTS = 3
FETCH_SECONDS = 15.0
LONGEST_ADDRESS = 2048
PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Awaitable[list[str]]]

_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9]"
)
_ADDRESS = re.compile(r"https?://[\x21-\x5b\x5d-\x7e]+")  # no backslash, space, control or foreign character
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Fetcher:
    """Gets pictures.

    Args:
        resolve: (name, port) -> IP addresses; default: the system's.
        ports: scheme -> the one port that may be asked.
        is_allowed: whether an address may be connected to. These three are for tests.
    """

    def __init__(
        self,
        *,
        resolve: Resolve | None = None,
        ports: dict[str, int] | None = None,
        is_allowed: Callable[[str], bool] | None = None,
    ) -> None:
        self._resolve = resolve or _resolve
        self._ports = ports or PORTS
        self._is_allowed = is_allowed or is_public
        self._client = httpx2.AsyncClient(
            follow_redirects=False,
            trust_env=False,  # no proxy of the environment, no .netrc
            timeout=FETCH_SECONDS,
            limits=httpx2.Limits(max_connections=8, max_keepalive_connections=0),
        )

    async def __call__(self, address: str) -> bytes:
        """The bytes at an address. Raises ApiError (400)."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._get(address)
                    if isinstance(found, bytes):
                        return found
                    address = found
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError, UnicodeError):
            raise _failed() from None
        raise _failed()

    async def close(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def _get(self, address: str) -> bytes | str:
        """The bytes, or where a redirect leads."""
        url = checked_url(address, self._ports)
        port = url.port or self._ports[url.scheme]
        places = await self._resolve(url.host, port)
        if not places or not all(map(self._is_allowed, places)):
            raise _failed()
        request = self._client.build_request(
            "GET",
            url.copy_with(host=places[0]),
            headers={"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.host},  # the certificate must be the name's
        )
        response = await self._client.send(request, stream=True)
        try:
            if response.is_redirect:
                return str(url.join(response.headers.get("location", "")))
            if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
                raise _failed()
            return await _bytes_of(response)
        finally:
            await response.aclose()


def checked_url(address: str, ports: dict[str, int] | None = None) -> httpx2.URL:
    """The address as it will be used. Raises ApiError (400) for forms that two parsers might read differently."""
    if len(address) > LONGEST_ADDRESS or not _ADDRESS.fullmatch(address):
        raise _failed()
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        raise _failed() from None
    allowed = ports or PORTS
    if url.scheme not in allowed or url.userinfo or (url.port or allowed[url.scheme]) != allowed[url.scheme]:
        raise _failed()
    if not _NAME.fullmatch(url.host) and not _is_plain_ip(url.host):
        raise _failed()  # among others: 2130706433, 0x7f.1, 0177.0.0.1, localhost
    return url


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it carries another one within."""
    place = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(place, ipaddress.IPv6Address):
        inner = place.ipv4_mapped or place.sixtofour or (place.teredo or (None, None))[1]
        if inner is None and place in _NAT64:
            inner = ipaddress.IPv4Address(int(place) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return place.is_global and not place.is_multicast and not place.is_reserved


def _is_plain_ip(host: str) -> bool:
    """An IP address in the one form that everybody reads alike."""
    try:
        return str(ipaddress.ip_address(host)) == host.lower()
    except ValueError:
        return False


async def _resolve(name: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def _bytes_of(response: httpx2.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > MAX_BYTES:
            raise _failed()
    return bytes(data)


def _failed() -> ApiError:
    return refused("An image's address cannot be fetched.", code="image_url_failed", param="messages")
