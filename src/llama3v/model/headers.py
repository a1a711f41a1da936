"""The size of a picture from its file's header: how it will be cut is known without decoding a pixel.

What is found here is what `decode_image` gives. Only metadata that a PNG has behind its pixels cannot be had without
them; then the picture is decoded after all.
"""

import struct

from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

from llama3v.errors import ImageError
from llama3v.model.slicing import Grid, choose_grid
from llama3v.model.tiles import MAX_BYTES, MAX_PIXELS, decode_image, open_image, orientation_of

_LYING = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # in which Pillow looks for an orientation


def grid_in_header(data: bytes, tile_size: int = 384, max_tiles: int = 6) -> Grid:
    """The grid that `make_tiles(decode_image(data), ...)` will have.

    Raises ImageError for what `decode_image` refuses by its header. A file that is broken further on is not noticed.
    """
    return choose_grid(*upright_size(data), tile_size=tile_size, max_tiles=max_tiles)


def upright_size(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """(width, height) of the picture that `decode_image` gives, EXIF orientation applied. Raises as `grid_in_header`."""
    with open_image(data, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        if image.mode == "F":
            raise ImageError("floating-point pixels have no known range; save the picture with 8 or 16 bits")
        if isinstance(image, PngImagePlugin.PngImageFile):
            if _has_metadata_behind_pixels(data):
                return decode_image(data, max_pixels=max_pixels, max_bytes=max_bytes).size
            image.info.setdefault("exif", None)  # or Pillow decodes the picture to look behind it
        size, orientation = _stored_size(image), orientation_of(image)
    return (size[1], size[0]) if orientation in _LYING else size


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """As stored: Pillow turns a TIFF by itself, and some versions tell the size before that, others after."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return image.size


def _has_metadata_behind_pixels(data: bytes) -> bool:
    """Walks over the chunks of a PNG: length, name, content, checksum."""
    position, pixels = 8, False
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        pixels = pixels or name == b"IDAT"
        if pixels and name in _PNG_METADATA:
            return True
        position += 12 + length
    return False
