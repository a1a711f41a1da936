"""How an image is cut: the grid of slices that LLaVA-UHD chooses (arXiv 2403.11703), in exact integers.

A picture of W x H pixels becomes one overview tile and, if it is large enough, a grid of columns x rows
slices. The published score of a grid is -|log(W/H) - log(columns/rows)|: slices should be nearly square
before the resize. With logarithms in floats, equal scores differ by rounding and a picture's grid depends
on the machine; here scores are fractions, compared exactly, and ties have a rule.
"""

from dataclasses import dataclass
from fractions import Fraction

from llama3v.errors import ConfigError, ImageError

SLICING_VERSION = "uhd-1"
"""Part of the feature cache's fingerprint: change it when `choose_grid`, or the pixels that tiles.py makes, differ for any image."""


@dataclass(frozen=True)
class Grid:
    """Slices of one image: `columns` along its width, `rows` along its height; 1x1: the overview alone."""

    columns: int
    rows: int

    @property
    def slices(self) -> int:
        """Slices in the grid."""
        return self.columns * self.rows

    @property
    def tiles(self) -> int:
        """Tiles that the encoder sees: the overview, and the slices where there is more than one."""
        return 1 if self.slices == 1 else 1 + self.slices


def choose_grid(width: int, height: int, tile_size: int = 384, max_tiles: int = 6) -> Grid:
    """The grid of slices for a picture of `width` x `height` pixels.

    The ideal number of slices is N = min(ceil(width * height / tile_size^2), max_tiles). Every grid with
    N-1, N or N+1 slices (at most `max_tiles`) competes, and the one whose columns/rows is nearest to
    width/height in the logarithm wins. Ties go to more slices, then to more slices along the longer side
    (along the width, for a square picture). Unlike the paper, 1x1 competes too: a small square picture
    stays whole instead of being split in two.

    `max_tiles` counts slices, not the overview; 0 or 1 means the overview only.
    """
    if width < 1 or height < 1:
        raise ImageError(f"expected a picture of at least 1x1 pixels, found {width}x{height}")
    if tile_size < 1 or max_tiles < 0:
        raise ConfigError(f"expected tile_size >= 1 and max_tiles >= 0, found {tile_size} and {max_tiles}")
    ideal = min(-(-width * height // tile_size**2), max_tiles)  # -(-a // b) is ceil(a / b) in integers
    if ideal <= 1:
        return Grid(1, 1)

    def preference(grid: Grid) -> tuple[Fraction, int, int]:
        along_longer_side = grid.columns if width >= height else grid.rows
        return (_distortion(width, height, grid), -grid.slices, -along_longer_side)

    counts = range(ideal - 1, min(ideal + 1, max_tiles) + 1)
    grids = [Grid(columns, count // columns) for count in counts for columns in _divisors(count)]
    return min(grids, key=preference)


def _distortion(width: int, height: int, grid: Grid) -> Fraction:
    """exp |log(W/H) - log(columns/rows)|: a slice's long side over its short one; 1 is square."""
    ratio = Fraction(width * grid.rows, height * grid.columns)
    return max(ratio, 1 / ratio)


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, count + 1) if count % divisor == 0]
