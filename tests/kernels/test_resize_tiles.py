"""Compares tiles with Pillow's bit for bit: the reference at full size, the kernels at sizes for the interpreter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import internvl_rt
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions, choose_grid, plan_tiles, tile_image
from internvl_rt.kernels.resize_tiles import (
    CACHED_TABLES,
    FRACTION_BITS,
    _device_tables,
    bicubic_table,
    resize_tiles,
    resize_tiles_reference,
)

Pixels = npt.NDArray[np.uint8]
Resizer = Callable[..., torch.Tensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PHOTOGRAPHS = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
SAMPLES = sorted((Path(internvl_rt.__file__).parent / "tiny" / "samples").glob("*.png"))
LONG = [(20_000, 1), (1, 20_000), (3, 20_000), (20_000, 2)]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow_tiles(array: Pixels, columns: int, rows: int, size: int, thumbnail: bool) -> Pixels:
    def stretched(width: int, height: int) -> Pixels:
        image = Image.fromarray(array)
        first = (width, image.height)
        if image.height > image.width * 100 and height < image.height:  # from Image.resize of Pillow 12.3
            first = (image.width, height)
        once = image.resize(first, Image.Resampling.BICUBIC)
        return np.asarray(once.resize((width, height), Image.Resampling.BICUBIC))

    canvas = stretched(columns * size, rows * size)
    tiles = [line.reshape(size, columns, size, 3).swapaxes(0, 1) for line in np.split(canvas, rows)]
    return np.concatenate([*tiles, stretched(size, size)[None]] if thumbnail else tiles)


def assert_equals_pillow(
    resizer: Resizer, array: Pixels, columns: int, rows: int, size: int, thumbnail: bool, device: torch.device = DEVICE
) -> None:
    tiles = resizer(torch.from_numpy(array).to(device), columns, rows, size, thumbnail)
    np.testing.assert_array_equal(tiles.cpu().numpy(), pillow_tiles(array, columns, rows, size, thumbnail))


# The reference


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    size=st.integers(1, 64),
    thumbnail=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_reference_equals_pillow_at_any_size(
    width: int, height: int, columns: int, rows: int, size: int, thumbnail: bool, seed: int
) -> None:
    assert_equals_pillow(resize_tiles_reference, noise(height, width, seed), columns, rows, size, thumbnail)


@pytest.mark.parametrize("path", [*PHOTOGRAPHS, *SAMPLES], ids=lambda path: path.stem)
@pytest.mark.parametrize("max_tiles", [1, 12])
def test_the_reference_equals_the_tiles_of_the_cpu_path(path: Path, max_tiles: int) -> None:
    options = ImageOptions(max_tiles=max_tiles)
    image = open_image(path, options).decode()
    columns, rows = choose_grid(*image.size, options)
    thumbnail = plan_tiles(*image.size, options).num_tiles > columns * rows
    tiles = resize_tiles_reference(torch.from_numpy(np.array(image)), columns, rows, options.image_size, thumbnail)
    np.testing.assert_array_equal(tiles.numpy(), tile_image(image, options))


@pytest.mark.parametrize("resizer", [resize_tiles_reference, resize_tiles], ids=["reference", "kernels"])
@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [(1, 100, 2, 2), (1, 101, 1, 1), (2, 224, 3, 2), (2, 224, 1, 14)],  # the last grid is as high as the picture
)
def test_pictures_over_100_times_taller_than_wide_are_resized_in_pillows_order(
    resizer: Resizer, width: int, height: int, columns: int, rows: int
) -> None:
    assert_equals_pillow(resizer, noise(height, width), columns, rows, 16, thumbnail=True)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), LONG)
def test_the_reference_equals_pillow_for_long_strips(width: int, height: int) -> None:
    assert_equals_pillow(resize_tiles_reference, noise(height, width), 2, 1, 448, True)


# The kernels


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    columns=st.integers(1, 3),
    rows=st.integers(1, 3),
    size=st.integers(14, 32),
    thumbnail=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_kernels_equal_pillow_at_any_size(
    width: int, height: int, columns: int, rows: int, size: int, thumbnail: bool, seed: int
) -> None:
    assert_equals_pillow(resize_tiles, noise(height, width, seed), columns, rows, size, thumbnail)


@pytest.mark.fast("4719", "flower")
@pytest.mark.parametrize("path", [*PHOTOGRAPHS, *SAMPLES], ids=lambda path: path.stem)
def test_the_kernels_equal_pillow_on_real_pictures(path: Path) -> None:
    image = open_image(path, ImageOptions()).decode()
    image.thumbnail((160, 160))
    assert_equals_pillow(resize_tiles, np.array(image), 3, 2, 32, True)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(20_000, 1), (20_000, 2), (1, 2000), (3, 2000)])
def test_the_kernels_equal_pillow_for_long_strips(width: int, height: int) -> None:
    columns, rows = (12, 1) if width > height else (1, 12)
    assert_equals_pillow(resize_tiles, noise(height, width), columns, rows, 32, False)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", [0.3, 1, 6.5])
def test_the_kernels_equal_pillow_at_full_size(path: Path, scale: float) -> None:
    image = open_image(path, ImageOptions()).decode()
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    assert_equals_pillow(resize_tiles, np.array(image), 4, 3, 448, True)


def test_an_image_whose_rows_lie_two_gigabytes_apart_is_read_where_it_lies() -> None:
    array = noise(2, 5)
    gap = 2**31 + 16  # most of this memory is never touched
    image = torch.empty(gap + 15, dtype=torch.uint8, device=DEVICE).as_strided((2, 5, 3), (gap, 3, 1))
    image.copy_(torch.from_numpy(array))
    np.testing.assert_array_equal(
        resize_tiles(image, 1, 1, 16, False).cpu().numpy(), pillow_tiles(array, 1, 1, 16, False)
    )


# The tables


@given(st.integers(1, 20_000), st.integers(1, 600))
def test_weights_of_a_position_sum_to_one_and_its_pixels_are_inside(size_in: int, size_out: int) -> None:
    first, weights = bicubic_table(size_in, size_out)
    assert first.dtype == weights.dtype == np.int32
    assert first.min() >= 0
    rounding = weights.shape[1] / 2 + 1  # the rounding of each weight adds up to half a unit
    assert np.abs(weights.sum(1) - (1 << FRACTION_BITS)).max() <= rounding
    last = first + weights.shape[1] - np.argmax(weights[:, ::-1] != 0, axis=1)
    assert last.max() <= size_in
    assert np.abs(weights.astype(np.int64)).sum(1).max() * 255 + (1 << FRACTION_BITS - 1) < 2**31  # the sums fit


@pytest.mark.parametrize("size", [1, 2, 3, 448, 1001])
def test_an_axis_that_keeps_its_size_is_copied(size: int) -> None:
    first, weights = bicubic_table(size, size)
    pixel, tap = np.nonzero(weights)
    assert np.array_equal(first[pixel] + tap, np.arange(size))
    assert np.all(weights[pixel, tap] == 1 << FRACTION_BITS)


def test_tables_are_built_once_for_pictures_of_one_size() -> None:
    assert _device_tables(100, (32, 16), DEVICE) is _device_tables(100, (32, 16), DEVICE)
    assert _device_tables.cache_parameters()["maxsize"] == CACHED_TABLES


# Refusals


IMAGE = torch.zeros(6, 7, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_HW3": IMAGE.float()}, "image_HW3: expected torch.uint8, got torch.float32"),
        ({"image_HW3": IMAGE[..., 0]}, r"image_HW3: expected shape \[height, width, 3\], got \(6, 7\)"),
        ({"image_HW3": IMAGE[..., :2]}, r"image_HW3: expected shape \[height, width, 3\], got \(6, 7, 2\)"),
        ({"image_HW3": IMAGE[:0]}, r"image_HW3: expected shape \[height, width, 3\], got \(0, 7, 3\)"),
        ({"image_HW3": IMAGE.transpose(0, 1)}, r"image_HW3: expected contiguous rows, got strides \(3, 21, 1\)"),
        ({"image_HW3": torch.zeros(3, 6, 7, dtype=torch.uint8).permute(1, 2, 0)}, "image_HW3: expected contiguous"),
        ({"columns": 0}, "columns: expected at least 1, got 0"),
        ({"rows": -1}, "rows: expected at least 1, got -1"),
        ({"size": 0}, "size: expected at least 1, got 0"),
        ({"out": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}, r"out: expected shape \(3, 16, 16, 3\)"),
        ({"out": torch.zeros(3, 16, 16, 3)}, "out: expected torch.uint8, got torch.float32"),
        (
            {"out": torch.zeros(3, 16, 16, 6, dtype=torch.uint8)[..., :3]},
            "out: expected a contiguous tensor",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict[str, object], message: str) -> None:
    arguments = {"image_HW3": IMAGE, "columns": 2, "rows": 1, "size": 16, "thumbnail": True, **change}
    on_device = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        resize_tiles(**on_device)
