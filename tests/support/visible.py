"""Marks which digits each visual token of a picture shows; the vision tower learns these marks besides the answers."""

import numpy as np
import numpy.typing as npt

from internvl_rt.inputs.tiles import ImageOptions, choose_grid
from support.digits import Boxes

SHOWN, HINTED, WHOLE = 0.4, 0.1, 0.6


def mark_visible(
    size: tuple[int, int], digits: str, boxes: Boxes, options: ImageOptions, cells: int
) -> npt.NDArray[np.int64]:
    """Returns marks [visual tokens, 10]: 1 where a digit is shown, 0 where not, -1 where unsure; `size`: width, height.

    A visual token stands for one of `cells` x `cells` cells of its tile. It shows a digit if most of the digit is in
    the tile and much of it in the cell; the mark is unsure if only a little of the digit is in the cell.
    """
    columns, rows = choose_grid(*size, options)
    side = options.image_size
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    scale = np.array((columns * side, rows * side)) / size
    marks = [_mark_tile(digits, boxes * np.tile(scale, 2) - np.tile(corner, 2), side, cells) for corner in corners]
    if options.thumbnail and len(corners) > 1:
        marks.append(_mark_tile(digits, boxes * np.tile(side / np.array(size), 2), side, cells))
    return np.concatenate(marks)


def _mark_tile(digits: str, boxes: Boxes, side: int, cells: int) -> npt.NDArray[np.int64]:
    step = side / cells
    starts = np.array([(x * step, y * step) for y in range(cells) for x in range(cells)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    whole = _overlap(boxes, np.zeros((1, 2)), side)[0] / area
    part = _overlap(boxes, starts, step) / np.minimum(area, step**2)
    marks = np.zeros((len(starts), 10), np.int64)
    for digit, in_tile, in_cell in sorted(zip(map(int, digits), whole, part.T, strict=True), key=lambda one: one[1]):
        marks[(in_cell > HINTED) & (marks[:, digit] == 0), digit] = -1
        if in_tile > WHOLE:
            marks[in_cell > SHOWN, digit] = 1
    return marks


def _overlap(boxes: Boxes, starts: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.float64]:
    """Returns the area that each square of side `step` shares with each box, [squares, boxes]."""
    low = np.maximum(boxes[None, :, :2], starts[:, None])
    high = np.minimum(boxes[None, :, 2:], starts[:, None] + step)
    return np.prod(np.clip(high - low, 0, None), axis=2)
