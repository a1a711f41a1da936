"""The grid of slices: vectors worked out by hand, and properties over many sizes."""

import math
import random
import subprocess
import sys

import pytest

from llama3v.errors import ConfigError, ImageError
from llama3v.model.slicing import Grid, choose_grid

_RANDOM = random.Random(20240528)
SIZES = [
    (int(2 ** _RANDOM.uniform(0, 13)), int(2 ** _RANDOM.uniform(0, 13)))  # 1 to 8,191 pixels on a side
    for _ in range(10_000)
]
SETTINGS = [(384, 6), (336, 7), (448, 9), (378, 12)]  # tile_size, max_tiles


def published_score(width: int, height: int, grid: Grid) -> float:
    """LLaVA-UHD (arXiv 2403.11703): higher is better."""
    return -abs(math.log(width / height) - math.log(grid.columns / grid.rows))


def competing_grids(width: int, height: int, tile_size: int, max_tiles: int) -> list[Grid]:
    """Every grid that competes, by brute force."""
    ideal = min(math.ceil(width * height / tile_size**2), max_tiles)
    return [
        Grid(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if abs(columns * rows - ideal) <= 1 and columns * rows <= max_tiles
    ]


@pytest.mark.parametrize(
    ("width", "height", "tile_size", "max_tiles", "columns", "rows"),
    [
        (384, 384, 384, 6, 1, 1),  # N = 1: the overview only
        (385, 384, 384, 6, 1, 1),  # N = 2; nearly square, so 1x1 beats 2x1 and 3x1
        (448, 448, 336, 7, 1, 1),  # N = 2; the paper, without 1x1, splits this square in two
        (768, 768, 384, 6, 2, 2),  # N = 4
        (800, 400, 384, 6, 2, 1),  # N = 3; exactly 2:1
        (400, 800, 384, 6, 1, 2),
        (672, 1008, 336, 6, 2, 3),  # N = 6; exactly 2:3
        (1920, 1080, 384, 6, 3, 2),  # N = 6; 16:9 is a factor 1.19 from 3:2, and 2.8 from 5:1
        (1000, 5000, 384, 6, 1, 5),  # N = 6; exactly 1:5
        (3000, 200, 384, 6, 6, 1),  # N = 5; 15:1, so the longest grid there is
        (3000, 1000, 1000, 5, 3, 1),  # N = 3; exactly 3:1
        (1, 4000, 384, 6, 1, 1),  # little area, however long
        (2000, 1000, 384, 1, 1, 1),  # one slice at most
        (2000, 1000, 384, 0, 1, 1),  # overview only
    ],
)
def test_grids_worked_out_by_hand(width, height, tile_size, max_tiles, columns, rows):
    assert choose_grid(width, height, tile_size, max_tiles) == Grid(columns, rows)


@pytest.mark.parametrize(
    ("width", "height", "tile_size", "max_tiles", "columns", "rows"),
    [
        (1344, 1344, 336, 7, 3, 2),  # 3x2 and 2x3: square, so along the width
        (3000, 1000, 336, 7, 6, 1),  # 6x1 and 3x2 are both a factor 2 from 3:1: along the width
        (1000, 3000, 336, 7, 1, 6),  # the same on end
        (4000, 1000, 336, 9, 8, 1),  # 8x1 and 4x2 are both a factor 2 from 4:1
    ],
)
def test_ties_go_to_the_longer_side(width, height, tile_size, max_tiles, columns, rows):
    assert choose_grid(width, height, tile_size, max_tiles) == Grid(columns, rows)


def test_ties_do_not_depend_on_the_scale_of_the_picture():
    grids = {choose_grid(3 * side, side, 336, 7) for side in range(900, 4000)}
    assert grids == {Grid(6, 1)}


@pytest.mark.parametrize(("tile_size", "max_tiles"), SETTINGS)
def test_no_competing_grid_has_a_better_published_score(tile_size, max_tiles):
    for width, height in SIZES:
        chosen = choose_grid(width, height, tile_size, max_tiles)
        competitors = competing_grids(width, height, tile_size, max_tiles)
        if width * height <= tile_size**2:
            assert chosen == Grid(1, 1)
            continue
        assert chosen in competitors
        best = max(published_score(width, height, grid) for grid in competitors)
        assert published_score(width, height, chosen) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("tile_size", "max_tiles"), SETTINGS)
def test_grids_stay_within_their_limits(tile_size, max_tiles):
    for width, height in SIZES:
        grid = choose_grid(width, height, tile_size, max_tiles)
        assert 1 <= grid.slices <= max_tiles
        assert grid.tiles == (1 if grid == Grid(1, 1) else 1 + grid.columns * grid.rows)


@pytest.mark.parametrize(("tile_size", "max_tiles"), SETTINGS)
def test_a_transposed_picture_has_the_transposed_grid(tile_size, max_tiles):
    for width, height in SIZES:
        if width == height:  # the one documented exception: a square's ties go along the width
            continue
        grid = choose_grid(width, height, tile_size, max_tiles)
        assert choose_grid(height, width, tile_size, max_tiles) == Grid(grid.rows, grid.columns)


def test_a_square_picture_never_has_more_rows_than_columns():
    for side in range(1, 3000, 7):
        grid = choose_grid(side, side, 336, 9)
        assert grid.columns >= grid.rows


@pytest.mark.parametrize(("tile_size", "max_tiles"), SETTINGS)
def test_enlarging_a_picture_never_loses_slices(tile_size, max_tiles):
    for width, height in SIZES[:500]:
        slices = [choose_grid(width * k, height * k, tile_size, max_tiles).slices for k in range(1, 12)]
        assert slices == sorted(slices)


def test_a_wider_picture_has_no_fewer_columns_per_row_at_the_slice_limit():
    ratios = []
    for width in range(1200, 12_000, 10):
        grid = choose_grid(width, 1200, 384, 6)
        ratios.append(grid.columns / grid.rows)
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-3, 5)])
def test_an_empty_picture_is_an_error(size):
    with pytest.raises(ImageError, match="at least 1x1"):
        choose_grid(*size)


@pytest.mark.parametrize(("tile_size", "max_tiles"), [(0, 6), (384, -1)])
def test_impossible_settings_are_an_error(tile_size, max_tiles):
    with pytest.raises(ConfigError, match="tile_size >= 1 and max_tiles >= 0"):
        choose_grid(100, 100, tile_size, max_tiles)


def test_slicing_is_pure_python():
    program = (
        "import sys, llama3v.model.slicing; assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
