"""Decoding to RGB and cutting into tiles: every pixel where it belongs. (Broken files: tests/faults/test_bad_images.py.)"""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from llama3v.errors import ImageError
from llama3v.model.slicing import Grid, choose_grid
from llama3v.model.tiles import decode_image, image_key, make_tiles, read_image_file, to_pixels


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def decoded(image: Image.Image, format: str = "PNG", **options) -> np.ndarray:
    return np.asarray(decode_image(encoded(image, format, **options)))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Decoding


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_a_lossless_rgb_file_decodes_to_its_pixels(format):
    picture = noise(31, 17)
    assert np.array_equal(decoded(picture, format), np.asarray(picture))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_every_common_format_decodes(format):
    pixels = decoded(Image.new("RGB", (33, 21), (200, 40, 40)), format)
    assert pixels.shape == (21, 33, 3)
    assert np.abs(pixels.astype(int) - [200, 40, 40]).max() <= 12


def test_a_jpeg_is_decoded_at_full_quality_as_pillow_does():
    data = encoded(noise(800, 600).resize((1600, 1200)), "JPEG", quality=90)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data))))


def test_bilevel_and_grey_pictures_become_rgb():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(decoded(grey), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    bilevel = grey.point(lambda value: 255 if value > 99 else 0).convert("1")
    assert np.array_equal(decoded(bilevel)[..., 0], np.where(np.asarray(grey) > 99, 255, 0))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(format):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decoded(Image.fromarray(values), format)
    assert np.array_equal(pixels[..., 0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_a_transparent_value_in_sixteen_bit_grey_is_white():
    values = np.full((4, 4), 1000, dtype=np.uint16)
    values[0, 0] = 5140
    pixels = decoded(Image.fromarray(values), transparency=5140)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [4, 4, 4]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    picture = Image.new(mode, (3, 1), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    picture.putpixel((2, 0), (0, 0, 0, 51) if mode == "RGBA" else (0, 51))  # alpha 0.2
    assert decoded(picture)[0, :, 0].tolist() == [0, 255, 204]


def test_a_palette_with_alpha_values_is_laid_over_white():
    picture = Image.new("P", (3, 1))
    picture.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    picture.putdata([0, 1, 2])
    pixels = decoded(picture, transparency=bytes([255, 0, 255]))
    assert pixels[0].tolist() == [[0, 0, 0], [255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(
    ("mode", "paint", "clear"),
    [("P", 2, 1), ("L", 7, 9), ("1", 0, 1), ("RGB", (1, 2, 3), (4, 5, 6))],
)
def test_a_single_transparent_colour_is_white(mode, paint, clear):
    picture = Image.new(mode, (2, 1), paint)
    if mode == "P":
        picture.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), clear)
    pixels = decoded(picture, transparency=255 if mode == "1" else clear)
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() != [255, 255, 255]


def test_a_palette_with_alpha_decodes_without_a_warning():
    picture = noise(20, 20).quantize(8)
    data = encoded(picture, transparency=bytes(range(0, 256, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data)


def test_cmyk_jpegs_are_not_negatives():
    white, ink = Image.new("CMYK", (16, 16), (0, 0, 0, 0)), Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert decoded(white, "JPEG").min() >= 250
    assert np.abs(decoded(ink, "JPEG").astype(int) - [255, 0, 0]).max() <= 6


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # 3 wide, 2 high
# What a camera stores for each orientation, so that the picture shown is UPRIGHT (EXIF 2.32: where row 0 and column 0 are).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),  # shown by turning 90 degrees clockwise
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation])).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decoded(stored, format, exif=exif, **options)[..., 0], UPRIGHT)


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_lossy_formats(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((32, 48), dtype=np.uint8)
    shown[:16, :16] = 255  # a white corner at the top left
    stored = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1]} | {
        5: shown.T,
        6: np.rot90(shown),
        7: shown[::-1, ::-1].T,
        8: np.rot90(shown, -1),
    }
    picture = Image.fromarray(np.ascontiguousarray(stored[orientation])).convert("RGB")
    pixels = decoded(picture, format, exif=exif)
    assert pixels.shape == (32, 48, 3)
    assert pixels[4, 4, 0] > 230
    assert max(pixels[4, 44, 0], pixels[28, 4, 0], pixels[28, 44, 0]) < 25


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage that is no TIFF header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_an_unreadable_exif_block_leaves_the_picture_as_it_is(exif):
    picture = Image.new("RGB", (16, 8), "red")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's "corrupt EXIF data"
        assert decoded(picture, "JPEG", exif=exif).shape == (8, 16, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_gives_its_first_frame(format):
    first, second = Image.new("RGB", (20, 10), (250, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 250))
    pixels = decoded(first, format, save_all=True, append_images=[second])
    assert pixels.shape == (10, 20, 3)
    assert np.abs(pixels.astype(int) - [250, 0, 0]).max() <= 8


def test_text_chunks_and_profiles_are_ignored():
    picture = noise(8, 8)
    information = PngImagePlugin.PngInfo()
    information.add_text("comment", "x" * 10_000, zip=True)
    pixels = decoded(picture, pnginfo=information, icc_profile=b"profile" * 100)
    assert np.array_equal(pixels, np.asarray(picture))


def test_the_key_depends_on_the_bytes_alone():
    assert image_key(b"abc") == image_key(b"abc")
    assert image_key(b"abc") != image_key(b"abd")
    assert len(image_key(b"")) == 32


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded(noise(5, 5)))
    assert read_image_file(tmp_path / "picture.png") == encoded(noise(5, 5))


# Tiles


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 4000), (4000, 1), (384, 384), (1200, 500), (500, 1200), (3, 900)])
def test_tiles_have_the_shape_that_the_grid_says(size):
    tiles = make_tiles(noise(*size), tile_size=96, max_tiles=6)
    assert tiles.grid == choose_grid(*size, tile_size=96, max_tiles=6)
    assert tiles.pixels.shape == (tiles.grid.tiles, 96, 96, 3)
    assert tiles.pixels.dtype == np.uint8


def test_tiles_are_the_overview_and_then_the_slices_row_by_row():
    picture = noise(3 * 32, 2 * 32)  # exactly 3x2 tiles: the slices are crops, untouched by the resize
    tiles = make_tiles(picture, tile_size=32, max_tiles=6)
    assert tiles.grid == Grid(3, 2)
    assert np.array_equal(tiles.pixels[0], np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))
    for row in range(2):
        for column in range(3):
            box = (32 * column, 32 * row, 32 * column + 32, 32 * row + 32)
            assert np.array_equal(tiles.pixels[1 + 3 * row + column], np.asarray(picture.crop(box)))


def test_slices_put_together_are_the_picture_resized_once():
    picture = noise(250, 90)
    tiles = make_tiles(picture, tile_size=32, max_tiles=6)
    columns, rows = tiles.grid.columns, tiles.grid.rows
    whole = np.vstack([np.hstack(list(tiles.pixels[1 + columns * row :][:columns])) for row in range(rows)])
    expected = picture.resize((columns * 32, rows * 32), Image.Resampling.BICUBIC)
    assert np.array_equal(whole, np.asarray(expected))


def test_without_slices_there_is_only_the_overview():
    picture = noise(300, 200)
    tiles = make_tiles(picture, tile_size=32, max_tiles=0)
    assert tiles.grid == Grid(1, 1)
    assert np.array_equal(tiles.pixels[0], np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))


def test_a_picture_three_pixels_wide_or_high_keeps_its_channels_last():
    red = (255, 0, 0)
    for size in [(3, 50), (50, 3), (3, 3)]:
        pixels = make_tiles(decode_image(encoded(Image.new("RGB", size, red))), tile_size=16).pixels
        assert (pixels == np.array(red, dtype=np.uint8)).all()


def test_a_picture_that_is_not_rgb_is_refused():
    with pytest.raises(ImageError, match="found mode L"):
        make_tiles(Image.new("L", (10, 10)))


def test_pixels_are_normalised_by_channel():
    torch = pytest.importorskip("torch")
    tiles = make_tiles(noise(40, 30), tile_size=16, max_tiles=4).pixels
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    pixels = to_pixels(tiles, mean, std)
    expected = (tiles.astype(np.float64) / 255 - mean) / std
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert np.allclose(pixels.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_siglip_pixels_span_minus_one_to_one():
    tiles = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    pixels = to_pixels(tiles, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pixels[0].unique().tolist() == [-1.0]
    assert pixels[1].unique().tolist() == [1.0]
