"""A header tells how a picture will be cut, whatever the file: what is planned from headers is what decoding gives."""

import warnings

import numpy as np
import pytest
from PIL import Image
from test_bad_images import FOREIGN, HUGE, LOADED, VARIANTS, encoded, jpeg_header, png, png_chunk

from llama3v.errors import ImageError
from llama3v.model import headers
from llama3v.model.headers import grid_in_header, upright_size
from llama3v.model.slicing import Grid
from llama3v.model.tiles import decode_image, make_tiles

TILE = {"tile_size": 8, "max_tiles": 6}
MIRRORED_AND_TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x05\0\0\0\0\0\0"
XMP_TURNED = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def grid_from_header(data: bytes) -> Grid | None:
    try:
        return grid_in_header(data, **TILE)
    except ImageError:
        return None


def grid_from_pixels(data: bytes) -> Grid | None:
    try:
        return make_tiles(decode_image(data), **TILE).grid
    except ImageError:
        return None


def assert_the_header_agrees(data: bytes) -> None:
    """Where there is a picture, its header has its grid; so what a header refuses is no picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = grid_from_pixels(data)
        assert found is None or grid_from_header(data) == found


@pytest.mark.parametrize("data", [*HUGE.values(), *(data for data, _ in FOREIGN.values())], ids=[*HUGE, *FOREIGN])
def test_what_is_refused_before_decoding_is_refused_by_its_header(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert grid_from_header(data) is None


@pytest.mark.parametrize("name", [*VARIANTS, *LOADED])
def test_the_header_of_every_odd_picture_has_its_grid(name):
    assert_the_header_agrees((VARIANTS | LOADED)[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_truncated_and_damaged_files_agree_or_are_refused(name):
    data, random = VARIANTS[name], np.random.default_rng(2)
    for length in range(0, len(data), max(1, len(data) // 60)):
        assert_the_header_agrees(data[:length])
    for _ in range(80):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, min(len(data), int(random.choice([40, 200, len(data)]))), random.integers(1, 8))
        damaged[places] = random.integers(0, 256, len(places))
        assert_the_header_agrees(damaged.tobytes())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_the_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (48, 16)), format, exif=exif)
    assert upright_size(data) == decode_image(data).size
    assert (upright_size(data) == (16, 48)) == (orientation in (5, 6, 7, 8))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_an_orientation_in_xmp_is_applied(format):
    options = {"pnginfo": _with_xmp()} if format == "PNG" else {"xmp": XMP_TURNED}
    if format == "TIFF":
        options = {"tiffinfo": {700: XMP_TURNED}}
    data = encoded(Image.new("RGB", (48, 16)), format, **options)
    assert upright_size(data) == decode_image(data).size == (16, 48)


def _with_xmp():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP_TURNED.decode())
    return info


@pytest.mark.parametrize("first", [b"", png_chunk(b"eXIf", MIRRORED_AND_TURNED.replace(b"\x05", b"\x01"))])
def test_an_orientation_behind_the_pixels_of_a_png_is_applied(first):
    plain = png(6, 2, first, pixels=bytes(2 * 19))
    turned = plain[:-12] + png_chunk(b"eXIf", MIRRORED_AND_TURNED) + plain[-12:]
    assert upright_size(plain) == decode_image(plain).size == (6, 2)
    assert upright_size(turned) == decode_image(turned).size == (2, 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", "GIF", "BMP"])
def test_every_mode_agrees(mode, format):
    try:
        data = encoded(Image.new(mode, (40, 9)), format)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"there is no {format} of mode {mode}")
    assert upright_size(data) == decode_image(data).size == (40, 9)


def test_pixels_of_unknown_range_are_refused_by_the_header():
    with pytest.raises(ImageError, match="floating-point"):
        upright_size(encoded(Image.new("F", (4, 4)), "TIFF"))


def test_no_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(headers, "decode_image", None)
    for name, data in VARIANTS.items():
        half = data[: len(data) // 2]
        if name not in ("WebP", "lossless WebP", "animated WebP", "AVIF", "TIFF"):  # whose parsers want all of the file
            assert upright_size(half) == upright_size(data)
    huge, hollow = encoded(Image.new("RGB", (8000, 4000)), "PNG"), jpeg_header(4000, 3000)
    monkeypatch.setattr(Image.Image, "load", None)
    assert upright_size(huge) == (8000, 4000)
    assert upright_size(hollow) == (4000, 3000)  # with no such pixels in it
