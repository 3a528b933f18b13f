"""Chooses the official tile grid of a picture and cuts its tiles, in the passes of Pillow 12's resize.

Source: `dynamic_preprocess` (InternVL README.md and internvl_chat/internvl/train/dataset.py).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from internvl_rt.checkpoint.config import MAX_SIDE, MAX_TILES
from internvl_rt.values import Flag, Integer, Kind, Number, OneOf, read, read_fields


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How pictures are read and cut, by default as in the official code. Raises RequestError for a bad value."""

    image_size: int = 448  # side of a tile in pixels
    min_tiles: int = 1
    max_tiles: int = 12  # the thumbnail is not counted
    thumbnail: bool = True  # the whole picture is a last tile, if there is more than one
    exif: Literal["ignore", "apply"] = "ignore"
    alpha: Literal["drop", "white"] = "drop"
    max_pixels: int = 89_478_485  # as many as Pillow opens without a warning; in RGB they take 358 MB
    max_side: int = 65_535  # as in JPEG; between the passes a picture has the width of the canvas and its own height
    max_image_bytes: int = 1 << 29  # encoded; a file is read whole, to be hashed
    max_decode_bytes: int = 700_000_000  # estimated; 8 a pixel where RGBA becomes RGB
    max_decode_s: float = 5.0  # estimated, for one core; photographs of `max_pixels` take 1 to 3

    def __post_init__(self) -> None:
        read_fields(self, _KINDS)
        read("min_tiles", self.min_tiles, Integer(1, self.max_tiles, " (max_tiles)"))


READING_KINDS: dict[str, Kind] = {  # of the options that an engine has by the same names
    "alpha": OneOf(("drop", "white"), "drop or white"),
    "max_pixels": Integer(1, 1 << 30),
    "max_side": Integer(1, 1 << 20),
    "max_image_bytes": Integer(1, 1 << 40),
    "max_decode_bytes": Integer(1, 1 << 40),
    "max_decode_s": Number(0, 1_000_000, above=True),
}
_KINDS: dict[str, Kind] = {
    "image_size": Integer(1, MAX_SIDE),
    "max_tiles": Integer(1, MAX_TILES),
    "min_tiles": Integer(1, MAX_TILES),
    "thumbnail": Flag(),
    "exif": OneOf(("ignore", "apply"), "ignore or apply"),
    **READING_KINDS,
}


@dataclass(frozen=True, slots=True)
class TileLayout:
    """A picture's size in pixels, and how it is cut: into a grid of tiles, and perhaps a thumbnail."""

    width: int
    height: int
    columns: int
    rows: int
    thumbnail: bool  # whether the whole picture is one more tile, the last

    @property
    def num_tiles(self) -> int:
        """Tiles of the picture, the thumbnail included."""
        return self.columns * self.rows + self.thumbnail


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Returns all (columns, rows) with min_tiles <= columns * rows <= max_tiles, by number of tiles, ties in set order.

    The official code sorts a set, so where two grids of the same size tie (only possible with min_tiles > 1) the order
    in which CPython walks that set decides. It depends on the order of insertion, hence the redundant outer loop.
    """
    grids = {
        (columns, rows)
        for side in range(min_tiles, max_tiles + 1)
        for columns in range(1, side + 1)
        for rows in range(1, side + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    """Returns the grid of the closest aspect ratio, as (columns, rows) (official `find_closest_aspect_ratio`).

    On an exact tie the larger grid wins if the picture covers more than half of its pixels. All sizes are at least 1.
    """
    aspect, area = width / height, width * height
    best, best_error = (1, 1), float("inf")
    for columns, rows in _grids(options.min_tiles, options.max_tiles):
        error = abs(aspect - columns / rows)
        fills = area > 0.5 * options.image_size**2 * columns * rows
        if error < best_error or (error == best_error and fills):
            best, best_error = (columns, rows), error
    return best


def plan_tiles(width: int, height: int, options: ImageOptions) -> TileLayout:
    """Plans how a picture of that size is cut."""
    columns, rows = choose_grid(width, height, options)
    return TileLayout(width, height, columns, rows, options.thumbnail and columns * rows > 1)


def tile_image(image: Image.Image, options: ImageOptions) -> npt.NDArray[np.uint8]:
    """Cuts an RGB picture, stretched to its grid, into square tiles (official `dynamic_preprocess`).

    Returns uint8 [num_tiles, image_size, image_size, 3], row by row; the thumbnail, if any, is the last one.
    """
    size = options.image_size
    layout = plan_tiles(*image.size, options)
    columns, rows = layout.columns, layout.rows
    tiles = np.empty((layout.num_tiles, size, size, 3), np.uint8)
    with ThreadPoolExecutor(1) as pool:  # the two resizes run in parallel: Pillow's passes release the GIL
        thumbnail = pool.submit(_resize, image, size, size) if layout.thumbnail else None
        canvas = np.asarray(_resize(image, columns * size, rows * size)).reshape(rows, size, columns, size, 3)
        tiles[: columns * rows].reshape(rows, columns, size, size, 3)[...] = canvas.swapaxes(1, 2)
        if thumbnail:
            tiles[-1] = np.asarray(thumbnail.result())
    return tiles


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resizes by Pillow's antialiased bicubic in the order of Pillow 12: each pass is a call of its own.

    The horizontal pass comes first, except where a picture over 100 times taller than wide loses height. The orders
    round differently, and Pillow 13 starts with the vertical pass for other sizes.
    """
    vertical_first = image.height > 100 * image.width and height < image.height
    halfway = (image.width, height) if vertical_first else (width, image.height)
    return image.resize(halfway, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
