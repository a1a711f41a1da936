"""From the bytes of an image file to tiles: the only image decoder of the package.

Bytes are hostile until proven otherwise. The header is checked before a pixel is decoded, and whatever is
wrong becomes an `ImageError` of one line. Colour profiles are ignored, as when SigLIP was trained.
"""

import hashlib
import stat
import struct
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from llama3v.errors import ImageError
from llama3v.model.slicing import Grid, choose_grid

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 40_000_000
MAX_BYTES = 20 * 2**20

# The formats that are read, each by its own Pillow class. Image.open would try forty more decoders, some of
# which start other programs, and would apply its own global pixel limit before ours.
_OPENERS = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}

# EXIF orientation -> what brings the picture upright (EXIF 2.32, tag 0x0112; 1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Tiles:
    """One image for the tower: `pixels` uint8 [n, S, S, 3] RGB, overview first, then slices row by row."""

    pixels: np.ndarray
    grid: Grid


def image_key(data: bytes) -> str:
    """The name of an image in the feature cache: a hash of the file's bytes, 32 hex digits (BLAKE2b-128)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_image_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of an image file. Raises ImageError, naming the file, where it cannot be read."""
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{path}: expected an image file, found a directory")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: expected an image file, found a device or pipe")
        if status.st_size > max_bytes:
            raise ImageError(f"{path}: {_too_many_bytes(status.st_size, max_bytes)}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL byte in the name
        raise ImageError(f"{str(path)!r}: not a file name ({error})") from error
    if not data:
        raise ImageError(f"{path}: the file is empty")
    return data


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """An RGB picture, upright, from the bytes of an image file.

    The first frame of an animation; transparency over white; 16 bits scaled to 8. A file that is truncated,
    too large (`max_pixels`, judged by the header before decoding; `max_bytes`) or not an image raises
    ImageError.
    """
    with open_image(data, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        image.load()
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as `decode_image` gives it; without metadata, which would turn it again. Raises ImageError."""
    orientation = orientation_of(image)
    picture = _to_rgb(image)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    picture.info.clear()
    return picture


@contextmanager
def open_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Generator[Image.Image, None, None]:
    """An image file whose header is read and within the limits; no pixel is decoded yet. As a context manager.

    Raises ImageError, also in place of whatever decoders raise inside the context.
    """
    if not data:
        raise ImageError("expected an image, found 0 bytes")
    if len(data) > max_bytes:
        raise ImageError(_too_many_bytes(len(data), max_bytes))
    name = _format_of(data)
    if name not in _OPENERS:
        raise ImageError(f"expected an image ({', '.join(_OPENERS)}), found {name}")
    size = _size_in_header(name, data)
    if size is not None:
        _check_size(name, size, max_pixels)
    try:
        with _OPENERS[name](BytesIO(data), "") as image:
            _check_size(name, image.size, max_pixels)
            _check_tiff_blocks(image, max_pixels)
            yield image
    except ImageError:
        raise
    except Exception as error:
        # A decoder fed with hostile bytes raises whatever it likes (OSError, SyntaxError, KeyError,
        # MemoryError...); one picture must never end a run, and nothing is hidden: the reason travels with
        # the error.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{name} is broken or truncated: {reason}") from error


def make_tiles(image: Image.Image, tile_size: int = 384, max_tiles: int = 6) -> Tiles:
    """Cut an RGB picture into tiles of `tile_size` pixels: overview first, then the slices row by row.

    Each resize is direct (no crop, no padding) and bicubic, as SigLIP was trained: the whole picture to one
    tile for the overview, and to columns x rows tiles for the slices.
    """
    if image.mode != "RGB":
        raise ImageError(f"expected an RGB picture, found mode {image.mode}; decode_image makes one from a file")
    grid = choose_grid(*image.size, tile_size=tile_size, max_tiles=max_tiles)
    tiles = [_resize(image, 1, 1, tile_size)]
    if grid.slices > 1:
        tiles.append(_resize(image, grid.columns, grid.rows, tile_size))
    return Tiles(np.concatenate(tiles), grid)


def overview(image: Image.Image, tile_size: int) -> Image.Image:
    """The overview alone, as a picture: `make_tiles` of it gives that one tile (detail "low")."""
    return Image.fromarray(_resize(image, 1, 1, tile_size)[0])


def to_pixels(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> "torch.Tensor":
    """uint8 tiles [n, S, S, 3] -> float32 [n, 3, S, S], (value / 255 - mean) / std in each channel."""
    import torch

    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)  # [n, 3, S, S]
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return values.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def normalised(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """`to_pixels` without torch, to the bit: uint8 tiles [n, S, S, 3] -> float32 [n, 3, S, S]."""
    values = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2), np.float32)
    values /= np.float32(255)
    values -= np.asarray(mean, np.float32).reshape(3, 1, 1)
    values /= np.asarray(std, np.float32).reshape(3, 1, 1)
    return values


def _resize(image: Image.Image, columns: int, rows: int, tile_size: int) -> np.ndarray:
    """The picture as columns x rows tiles, row by row: uint8 [columns * rows, S, S, 3]."""
    resized = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).reshape(rows, tile_size, columns, tile_size, 3)
    return pixels.swapaxes(1, 2).reshape(-1, tile_size, tile_size, 3)


def _too_many_bytes(count: int, limit: int) -> str:
    return f"the file has {count:,} bytes; the limit is {limit:,} (save it smaller)"


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} of {width}x{height} pixels: there is nothing in it")
    if width * height > max_pixels:
        raise ImageError(f"{name} of {width}x{height} pixels; the limit is {max_pixels:,} pixels (make it smaller)")


def _format_of(data: bytes) -> str:
    """The image format by its first bytes (a key of _OPENERS), or in words what these bytes are instead."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else f"a {brand!r} container, such as HEIC or a video"
    return _describe_foreign(data)


def _describe_foreign(data: bytes) -> str:
    """What a file that is no image seems to be: named .jpg, these are common in web data."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git LFS pointer (run `git lfs pull`)"
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page"
    if b"<svg" in start:
        return "an SVG drawing"
    if start.startswith(b"%pdf"):
        return "a PDF"
    text = data[:1024].decode("utf-8", "replace").rstrip("\ufffd")  # the end may be half a character
    if len(text) > 8 and not {"\ufffd", "\0"} & set(text):
        return f"text beginning {text[:24]!r}"
    return f"{len(data):,} bytes beginning {data[:8].hex(' ')}"


def _size_in_header(name: str, data: bytes) -> tuple[int, int] | None:
    """Width and height where Pillow's constructor may already allocate for them (GIF, WebP), and for PNG.

    The other formats' constructors only read headers. None where the header is too short or unknown: Pillow
    says why.
    """
    if len(data) < 30:
        return None
    if name == "PNG":
        return struct.unpack(">II", data[16:24])
    if name == "GIF":
        return struct.unpack("<HH", data[6:10])
    if name == "WebP" and data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if name == "WebP" and data[12:16] == b"VP8L":  # 14 bits each
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if name == "WebP" and data[12:16] == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _check_tiff_blocks(image: Image.Image, max_pixels: int) -> None:
    """A small TIFF may declare huge tiles, and libtiff allocates a whole one."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (
            image.tag_v2.get(TiffImagePlugin.TILEWIDTH),
            image.tag_v2.get(TiffImagePlugin.TILELENGTH),
        )
        if width and height:
            _check_size("TIFF tile", (width, height), max_pixels)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where the EXIF block cannot be read, as in every viewer."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error):
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range; save the picture with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey with 16 bits -> 8 bits: 0..65535 to 0..255, rounded. (Pillow's own conversion clips at 255.)"""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"grey values from {values.min()} to {values.max()}; expected 0 to 65535 (16 bits)")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:  # PNG: one grey value that is transparent, so white here
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
