"""The pictures of a request: from a data URL (or an address, see fetch.py) to tiles, off the event loop.

Bytes are decoded by the package's one decoder (model/tiles.py), which looks at the header before a pixel is made. Few are
decoded at a time, and nothing of a picture but its tiles outlives this step: a request that waits holds megabytes at most.
"""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llama3v.errors import ImageError
from llama3v.model.slicing import SLICING_VERSION, Grid
from llama3v.model.tiles import MAX_BYTES, MAX_PIXELS, Tiles, decode_image, make_tiles
from llama3v.server.errors import ApiError, refused
from llama3v.server.fetch import Fetcher

_DATA_URL = re.compile(r"data:(?:image/[\w.+-]{1,64}|application/octet-stream)?;base64,", re.IGNORECASE)
_LONGEST_BASE64 = -(-MAX_BYTES // 3) * 4
_FORMATS = "a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"


@dataclass(frozen=True)
class Source:
    """A picture as a request names it."""

    url: str
    detail: str
    """auto, low or high"""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was read: its key, which stands for its pixels and the way they were cut, and its tiles."""

    key: str
    tiles: Tiles

    @property
    def grid(self) -> Grid:
        return self.tiles.grid


class Pictures:
    """Args:
    tile_size, max_tiles: of the model.
    workers: pictures that are decoded at the same time.
    fetch: gets the bytes at an address; None where this server fetches nothing.
    """

    def __init__(
        self,
        *,
        tile_size: int,
        max_tiles: int,
        workers: int,
        fetch: Fetcher | None = None,
    ) -> None:
        self._tile_size, self._max_tiles = tile_size, max_tiles
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="llama3v-pictures")
        self._free = asyncio.Semaphore(workers)

    async def read(self, sources: Sequence[Source]) -> list[Picture]:
        """All pictures of a request, in order. Raises ApiError, naming the first that cannot be used by its number."""
        return [await self._read_one(source, number) for number, source in enumerate(sources, start=1)]

    async def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._fetch is not None:
            await self._fetch.close()

    async def _read_one(self, source: Source, number: int) -> Picture:
        if source.url[:5].lower() == "data:":
            url: str | bytes = source.url
        elif self._fetch is None or source.url[:4].lower() != "http":
            raise refused(_not_fetched(number, self._fetch is not None), code="image_url_not_allowed", param="messages")
        else:
            url = await self._fetch(source.url)
        async with self._free:  # here and not in the pool's queue: a request that is given up takes no place in it
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._picture, url, source.detail, number)

    def _picture(self, url: str | bytes, detail: str, number: int) -> Picture:
        data = url if isinstance(url, bytes) else decode_data_url(url, number)
        try:
            image = decode_image(data)
            tiles = make_tiles(image, self._tile_size, 0 if detail == "low" else self._max_tiles)
        except ImageError:
            raise refused(
                f"Image {number} cannot be read: it is broken, or not {_FORMATS}, or has more than {MAX_PIXELS:,} "
                f"pixels or {MAX_BYTES:,} bytes.",
                code="invalid_image",
                param="messages",
            ) from None
        words = f"{SLICING_VERSION} {self._tile_size} {tiles.grid.columns}x{tiles.grid.rows} {image.mode} {image.size}"
        digest = hashlib.sha256(words.encode())
        digest.update(image.tobytes())
        return Picture(digest.hexdigest(), tiles)


def decode_data_url(url: str, number: int) -> bytes:
    """The bytes of a data URL with base64. What kind of image it is, the bytes say, not the URL. Raises ApiError."""
    head = _DATA_URL.match(url)
    if head is None:
        raise refused(
            f"Image {number}: expected a URL such as data:image/png;base64,...",
            code="invalid_image_url",
            param="messages",
        )
    if len(url) - head.end() > _LONGEST_BASE64:
        raise ApiError(
            413, f"Image {number} has more than {MAX_BYTES:,} bytes.", code="image_too_large", param="messages"
        )
    try:
        return base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise refused(f"Image {number} is not valid base64.", code="invalid_base64", param="messages") from None


def _not_fetched(number: int, some_are: bool) -> str:
    if some_are:
        return f"Image {number}: expected a data URL or an http(s) address."
    return f"Image {number}: this server fetches no addresses; send the image as data:image/png;base64,..."
