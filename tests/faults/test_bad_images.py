"""Every kind of bad image: an `ImageError` of one line that says what was found, quickly, and in little memory.

The corpus is made here, byte by byte where a library would refuse to write it.
"""

import io
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama3v.errors import ImageError
from llama3v.model import tiles
from llama3v.model.tiles import decode_image, make_tiles, read_image_file


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


def gif(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0)
    return screen + frame + b"\x02\x02\x4c\x01\x00;"


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def webp_canvas(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp(b"VP8X", bytes(4) + sides)


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(*entries: tuple[int, int]) -> bytes:
    """A little-endian TIFF with one directory of LONG tags and no pixels."""
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)


def outcome(data: bytes) -> np.ndarray | str:
    """The pixels, or the message of the refusal. Anything else that is raised fails the test."""
    try:
        return np.asarray(decode_image(data))
    except ImageError as error:
        return str(error)


PHOTO = Image.fromarray(
    np.clip(
        np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3) + np.random.default_rng(0).normal(0, 25, (60, 80, 3)),
        0,
        255,
    ).astype(np.uint8)
)

HUGE = {
    "PNG": png(50_000, 50_000),
    "PNG, grey, one bit": png(50_000, 50_000, depth=1, colour=0),
    "GIF screen": gif(50_000, 50_000, 1, 1),
    "GIF frame beyond its screen": gif(1, 1, 50_000, 50_000),
    "WebP canvas": webp_canvas(50_000, 50_000),
    "WebP canvas, largest": webp_canvas(1 << 24, 1 << 24),
    "WebP lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(20)),
    "WebP lossy": webp(b"VP8 ", b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(20)),
    "JPEG": jpeg_header(50_000, 50_000),
    "BMP": bmp_header(50_000, 50_000),
    "TIFF": tiff((256, 50_000), (257, 50_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (279, 8)),
    "TIFF tile": tiff(
        (256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, 50_000), (323, 50_000), (324, 8), (325, 8)
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_picture_is_refused_by_its_header_in_milliseconds(name):
    started = time.process_time()
    with pytest.raises(ImageError) as refusal:
        decode_image(HUGE[name])
    assert time.process_time() - started < 0.5  # milliseconds; other work on the machine does not count
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["PNG", "GIF screen", "WebP canvas", "JPEG", "BMP", "TIFF"])
def test_the_refusal_states_the_size_and_the_limit(name):
    with pytest.raises(ImageError, match="50000x50000 pixels; the limit is 40,000,000 pixels"):
        decode_image(HUGE[name])


@pytest.mark.parametrize("name", ["WebP lossless", "WebP lossy"])
def test_a_webp_of_the_largest_size_is_refused_before_its_canvas_is_allocated(name):
    with pytest.raises(ImageError, match="16383x16383 pixels; the limit"):
        decode_image(HUGE[name])


def test_refusing_huge_pictures_takes_no_memory(tmp_path):
    """In a process that may hold 256 MB more than it does at the start, where 50,000 x 50,000 pixels need 2.5 GB."""
    for index, data in enumerate(HUGE.values()):
        (tmp_path / f"{index}.bin").write_bytes(data)
    program = textwrap.dedent("""
        import pathlib, resource, sys
        from llama3v.errors import ImageError
        from llama3v.model.tiles import decode_image
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        for path in sorted(pathlib.Path(sys.argv[1]).glob("*.bin")):
            try:
                decode_image(path.read_bytes())
            except ImageError as error:
                assert "MemoryError" not in str(error), (path, error)
            else:
                raise SystemExit(f"{path} was accepted")
    """)
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know its own size")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_a_bomb_that_unpacks_to_many_megabytes_is_refused():
    zeros = zlib.compressobj(9)
    body = b"".join(zeros.compress(bytes(2**20)) for _ in range(128)) + zeros.flush()  # 128 MB of zeros in 128 KB
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 7_000, 6_400, 8, 2, 0, 0, 0))
    with pytest.raises(ImageError, match="7000x6400"):
        decode_image(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b""))


def test_a_bomb_behind_a_small_header_stays_small():
    data = png(4, 4, pixels=bytes(50_000_000))  # far more pixel data than 4x4 pixels need
    assert decode_image(data).size == (4, 4)


def test_pillows_own_limit_is_not_in_the_way():
    """Between its warning (89 megapixels) and ours, our limit alone decides, without a warning."""
    data = png(10_000, 9_500, pixels=bytes((10_000 // 8 + 1) * 9_500), depth=1, colour=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="10000x9500"):
            decode_image(data)
        assert decode_image(data, max_pixels=100_000_000).size == (10_000, 9_500)


def test_the_limits_can_be_set():
    data = encoded(PHOTO, "PNG")
    assert decode_image(data, max_pixels=80 * 60, max_bytes=len(data)).size == (80, 60)
    with pytest.raises(ImageError, match="80x60 pixels; the limit is 4,799 pixels"):
        decode_image(data, max_pixels=80 * 60 - 1)
    with pytest.raises(ImageError, match="bytes; the limit is"):
        decode_image(data, max_bytes=len(data) - 1)


FOREIGN = {
    "nothing": (b"", "found 0 bytes"),
    "two bytes": (b"\xff\xd8", "found 2 bytes beginning ff d8"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "found an SVG drawing"),
    "SVG with a prolog": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg/>', "found an SVG drawing"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "found an HTML page"),
    "HTML in lower case": (b"\n <html><head></head></html>", "found an HTML page"),
    "text": (b"Access denied, please log in.\n", "found text beginning 'Access denied"),
    "git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "found a PDF"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "random bytes": (bytes(range(128, 228)), "found 100 bytes beginning 80 81"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "found text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_image_is_named(name):
    data, message = FOREIGN[name]
    with pytest.raises(ImageError) as refusal:
        decode_image(data)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


VARIANTS = {
    "JPEG": encoded(PHOTO, "JPEG"),
    "progressive JPEG": encoded(PHOTO, "JPEG", progressive=True),
    "PNG": encoded(PHOTO, "PNG"),
    "palette PNG": encoded(PHOTO.quantize(16), "PNG"),
    "WebP": encoded(PHOTO, "WEBP"),
    "lossless WebP": encoded(PHOTO.resize((24, 18)), "WEBP", lossless=True),
    "animated WebP": encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "GIF": encoded(PHOTO.quantize(16), "GIF"),
    "BMP": encoded(PHOTO.resize((24, 18)), "BMP"),
    "TIFF": encoded(PHOTO.resize((24, 18)), "TIFF"),
    "AVIF": encoded(PHOTO, "AVIF"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_truncated_file_is_an_error_or_has_every_pixel(name):
    """Never half grey: whatever the length, either an error or exactly the picture (only trailing bytes are missing)."""
    data = VARIANTS[name]
    whole = np.asarray(decode_image(data))
    lengths = range(0, len(data), max(1, len(data) // 400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about a truncated TIFF directory
        outcomes = [outcome(data[:length]) for length in lengths]
    pictures = [pixels for pixels in outcomes if not isinstance(pixels, str)]
    assert all(np.array_equal(pixels, whole) for pixels in pictures)
    assert len(pictures) <= 0.2 * len(outcomes)
    assert not any("\n" in message for message in outcomes if isinstance(message, str))


@pytest.mark.parametrize("name", VARIANTS)
def test_damaged_bytes_never_raise_anything_but_an_image_error(name):
    data, random = VARIANTS[name], np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about some of the damage
        for _ in range(150):
            damaged = np.frombuffer(data, np.uint8).copy()
            region = min(len(data), int(random.choice([40, 200, len(data)])))
            places = random.integers(0, region, random.integers(1, 12))
            damaged[places] = random.integers(0, 256, len(places))
            result = outcome(damaged.tobytes())
            assert not isinstance(result, str) or "\n" not in result


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_an_error(size):
    with pytest.raises(ImageError, match=f"PNG of {size[0]}x{size[1]} pixels"):
        decode_image(png(*size))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (1, 4000), (4000, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_odd_but_whole_pictures_are_read_and_tiled(size, format):
    picture = decode_image(encoded(Image.new("RGB", size, (9, 200, 100)), format))
    assert picture.size == size
    pixels = make_tiles(picture, tile_size=32).pixels
    assert pixels.shape[1:] == (32, 32, 3)
    assert np.abs(pixels.astype(int) - [9, 200, 100]).max() <= 6


LOADED = {
    "a text chunk that unpacks to 100 MB": png(2, 2, png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(10**8), 9))),
    "an ICC profile that unpacks to 100 MB": png(2, 2, png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10**8), 9))),
    "5 MB of text": png(2, 2, *[png_chunk(b"tEXt", b"c\0" + b"x" * 50_000)] * 100, pixels=bytes(14)),
    "an EXIF block of 5 MB": png(2, 2, png_chunk(b"eXIf", b"II*\0" + bytes(5_000_000)), pixels=bytes(14)),
    "an EXIF directory of 65,535 entries": png(
        2,
        2,
        png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x04\0\0\0\x01\0\0\0\x01" * 65_535),
        pixels=bytes(14),
    ),
    "an EXIF directory that points to itself": png(
        2, 2, png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08"), pixels=bytes(14)
    ),
    "a chunk longer than the file": png(2, 2)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + b"x" * 100,
    "30 ICC segments in a JPEG": encoded(PHOTO, "JPEG", icc_profile=bytes(1_900_000)),
    "a JPEG comment of 60 KB": encoded(PHOTO, "JPEG", comment=b"x" * 60_000),
    "100,000 empty GIF comments": gif(1, 1, 1, 1)[:19] + b"!\xfe\x01x\0" * 100_000 + gif(1, 1, 1, 1)[19:],
}


@pytest.mark.parametrize("name", LOADED)
def test_a_file_loaded_with_metadata_is_read_or_refused_quickly(name):
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = outcome(LOADED[name])
    assert time.process_time() - started < 5
    if isinstance(result, str):
        assert "\n" not in result
        assert len(result) < 400
    else:
        assert result.shape[2] == 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_a_thousand_frames_only_the_first_is_decoded(format):
    frames = [Image.new("RGB", (8, 8), (0, index % 256, 0)) for index in range(1000)]
    data = encoded(Image.new("RGB", (8, 8), (255, 0, 0)), format, save_all=True, append_images=frames)
    assert np.abs(np.asarray(decode_image(data)).astype(int) - [255, 0, 0]).max() <= 8


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))
    with pytest.raises(ImageError, match="grey values from 70000"):
        decode_image(encoded(Image.new("I", (4, 4), 70_000), "TIFF"))


# Files


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        read_image_file(tmp_path / "absent.png")


def test_a_directory_is_named(tmp_path):
    with pytest.raises(ImageError, match="found a directory"):
        read_image_file(tmp_path)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg: the file is empty"):
        read_image_file(tmp_path / "empty.jpg")


@pytest.mark.parametrize(
    ("number", "words"), [(13, "Permission denied"), (5, "Input/output error"), (116, "Stale file handle")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, number, words):
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"x")

    def fail(self):
        raise OSError(number, words)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ImageError, match=rf"picture\.jpg: cannot be read \({words}\)"):
        read_image_file(path)


def test_a_path_through_a_file_a_loop_of_links_and_a_nul_are_image_errors(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in [tmp_path / "file" / "picture.jpg", tmp_path / "loop", tmp_path / "a\0b", tmp_path / ("x" * 5000)]:
        with pytest.raises(ImageError) as refusal:
            read_image_file(path)
        assert "\n" not in str(refusal.value)


def test_a_pipe_or_socket_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="device or pipe"):
        read_image_file(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="device or pipe"):
        read_image_file("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        with pytest.raises(ImageError, match="device or pipe"):
            read_image_file(tmp_path / "s.jpg")


def test_a_file_of_gigabytes_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(50 * 2**30)  # sparse: takes no disk
    with pytest.raises(ImageError, match=r"sparse\.jpg: the file has 53,687,091,200 bytes"):
        read_image_file(path)


def test_the_name_of_a_file_says_nothing_about_its_format(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(encoded(PHOTO, "PNG"))
    assert np.array_equal(np.asarray(decode_image(read_image_file(tmp_path / "picture.jpg"))), np.asarray(PHOTO))


def test_only_the_listed_formats_are_ever_opened():
    """Pillow knows decoders that run other programs (EPS: Ghostscript) or read their format loosely."""
    assert set(tiles._OPENERS) == {"JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"}
