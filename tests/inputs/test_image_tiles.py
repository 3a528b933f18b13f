import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions, choose_grid, plan_tiles

Pixels = npt.NDArray[np.uint8]
OFFICIAL = ImageOptions()


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pattern(height: int, width: int) -> Pixels:
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    planes = (x * x * 3 + y * 5 + (x * y) // 7, x * 11 + y * y, (x ^ y) * 13)
    return np.stack([plane % 256 for plane in planes], axis=-1).astype(np.uint8)


# Grid


def closest_grid(width: int, height: int, max_tiles: int, size: int) -> tuple[int, int]:
    """States the official rule for min_tiles = 1 in another way: of the grids whose ratio is closest, it takes the
    largest that the picture covers by half, or else the smallest."""
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    least = min(abs(width / height - i / j) for i, j in grids)
    tied = sorted((i * j, (i, j)) for i, j in grids if abs(width / height - i / j) == least)
    covered = [grid for tiles, grid in tied if 2 * width * height > size * size * tiles]
    return covered[-1] if covered else tied[0][1]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 24), st.sampled_from([112, 448]))
def test_grid_is_the_closest_in_aspect_ratio(width: int, height: int, max_tiles: int, size: int) -> None:
    options = ImageOptions(image_size=size, max_tiles=max_tiles)
    assert choose_grid(width, height, options) == closest_grid(width, height, max_tiles, size)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 400), st.integers(1, 24))
def test_grid_of_an_exact_ratio_grows_with_the_picture(columns: int, rows: int, scale: int, max_tiles: int) -> None:
    width, height = columns * scale, rows * scale
    options = ImageOptions(max_tiles=max_tiles)
    assert choose_grid(width, height, options) == closest_grid(width, height, max_tiles, 448)


@pytest.mark.parametrize(("side", "grid"), [(633, 1), (634, 2), (950, 2), (951, 3), (5000, 3)])
def test_square_pictures_take_more_tiles_when_these_are_half_covered(side: int, grid: int) -> None:
    assert choose_grid(side, side, OFFICIAL) == (grid, grid)


@pytest.mark.parametrize(
    ("tiles", "width", "height", "small", "large"),
    [(4, 5, 2, (4, 1), (2, 2)), (6, 15, 4, (3, 2), (6, 1))],  # the ratio is halfway between the two grids'
)
def test_grids_of_one_size_that_tie_are_taken_in_the_order_of_the_official_set(
    tiles: int, width: int, height: int, small: tuple[int, int], large: tuple[int, int]
) -> None:
    options = ImageOptions(min_tiles=tiles, max_tiles=tiles)
    assert choose_grid(width, height, options) == small  # first in the set
    assert choose_grid(1000 * width, 1000 * height, options) == large  # last in the set, and half covered


@pytest.mark.parametrize(
    ("width", "height", "grid", "tiles"),
    [(1, 1, (1, 1), 1), (3, 2000, (1, 12), 13), (10000, 1, (12, 1), 13), (1920, 1080, (4, 2), 9)],
)
def test_tiles_of_extreme_sizes(width: int, height: int, grid: tuple[int, int], tiles: int) -> None:
    options = ImageOptions(image_size=448)
    assert choose_grid(width, height, options) == grid
    assert plan_tiles(width, height, options).num_tiles == tiles
    assert open_image(noise(height, width), options).tiles().shape == (tiles, 448, 448, 3)


# Tiles


def reference_resize(array: Pixels, width: int, height: int, vertical_first: bool = False) -> Pixels:
    """Resizes as Pillow's Resample.c does: antialiased bicubic in integers, one axis after the other."""
    if vertical_first:
        return _resize_rows(_resize_rows(array, height).swapaxes(0, 1), width).swapaxes(0, 1)
    return _resize_rows(_resize_rows(array.swapaxes(0, 1), width).swapaxes(0, 1), height)


def _resize_rows(array: Pixels, size: int) -> Pixels:
    if len(array) == size:
        return array
    scale = len(array) / size
    stretch = max(scale, 1.0)
    out = np.empty((size, *array.shape[1:]), np.uint8)
    for row in range(size):
        center = (row + 0.5) * scale
        first, last = max(0, int(center - 2 * stretch + 0.5)), min(len(array), int(center + 2 * stretch + 0.5))
        x = np.abs((np.arange(first, last) - center + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = np.where(x < 1, near, np.where(x < 2, far, 0))
        weight *= 1 / np.cumsum(weight)[-1]
        fixed = np.trunc(weight * (1 << 22) + np.copysign(0.5, weight)).astype(np.int64)
        total = (1 << 21) + np.tensordot(fixed, array[first:last].astype(np.int64), 1)
        out[row] = np.clip(total >> 22, 0, 255)
    return out


def reference_tiles(array: Pixels, options: ImageOptions, resize: Callable[..., Pixels] = reference_resize) -> Pixels:
    size = options.image_size
    columns, rows = choose_grid(array.shape[1], array.shape[0], options)
    canvas = resize(array, columns * size, rows * size)
    tiles = [
        canvas[row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    ]
    return np.stack([*tiles, resize(array, size, size)] if options.thumbnail and len(tiles) > 1 else tiles)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (28, 28), (28, 56), (50, 90), (96, 54), (150, 70), (7, 200), (200, 3), (301, 17)]
)
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_equal_integer_bicubic_bit_for_bit(height: int, width: int, thumbnail: bool) -> None:
    options = ImageOptions(image_size=28, max_tiles=6, thumbnail=thumbnail)
    array = noise(height, width)
    tiles = open_image(array, options).tiles()
    assert tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous
    assert len(tiles) == plan_tiles(width, height, options).num_tiles
    assert np.array_equal(tiles, reference_tiles(array, options))


@pytest.mark.parametrize(("width", "height"), [(56, 31), (34, 60), (44, 94)])
def test_the_horizontal_pass_comes_first_where_the_order_matters(width: int, height: int) -> None:
    array, options = pattern(height, width), ImageOptions(image_size=28)

    def vertical_first(array: Pixels, width: int, height: int) -> Pixels:
        return reference_resize(array, width, height, vertical_first=True)

    tiles = open_image(array, options).tiles()
    assert np.array_equal(tiles, reference_tiles(array, options))
    assert not np.array_equal(tiles, reference_tiles(array, options, vertical_first))


@pytest.mark.parametrize(
    ("width", "height", "size", "digest"),  # SHA-256 of the tiles that the official code cuts with Pillow 12.3.0
    [
        (1, 100, 28, "9d67eb78e37b25fb"),
        (1, 101, 28, "2d30a713c44d2ea9"),  # the vertical pass comes first for the thumbnail
        (2, 201, 28, "2b1825bcbc0f555e"),
        (3, 336, 28, "79440d073ea3d6d6"),  # as high as the grid
        (3, 337, 28, "07f4f89205216d3a"),  # the vertical pass comes first for the grid too
        (1, 29, 28, "c8d9f9e24779a930"),  # not 100 times taller than wide
        (4, 449, 448, "d53e8745102615c3"),
        (13, 1345, 448, "77efc6121ae267d4"),
    ],
)
def test_pictures_over_100_times_taller_than_wide_are_cut_as_by_pillow_12(
    width: int, height: int, size: int, digest: str
) -> None:
    tiles = open_image(pattern(height, width), ImageOptions(image_size=size)).tiles()
    assert hashlib.sha256(tiles.tobytes()).hexdigest().startswith(digest)


def test_tiles_run_row_by_row_and_the_thumbnail_is_last() -> None:
    colors = noise(2, 3, seed=5)
    picture = np.repeat(np.repeat(colors, 448, axis=0), 448, axis=1)
    tiles = open_image(picture, OFFICIAL).tiles()
    assert np.array_equal(tiles[:6], np.broadcast_to(colors.reshape(6, 1, 1, 3), (6, 448, 448, 3)))
    assert np.array_equal(tiles[6, [0, 0, -1, -1], [0, -1, 0, -1]], colors[[0, 0, 1, 1], [0, 2, 0, 2]])
    assert len(tiles) == 7
