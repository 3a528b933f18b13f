"""Marks which digits each visual token of a picture shows; the vision tower learns these marks besides the answers."""

import numpy as np
import numpy.typing as npt

from internvl_rt.inputs.tiles import ImageOptions, choose_grid
from support.digits import Boxes

COLUMNS = 4  # of a visual token, for each of which its digits are marked
NUM_MARKS = COLUMNS * 10  # of a visual token
SHOWN, HINTED, PART = 0.4, 0.1, 0.2


def mark_visible(
    size: tuple[int, int], digits: str, boxes: Boxes, options: ImageOptions, cells: int
) -> npt.NDArray[np.int8]:
    """Returns marks [visual tokens, NUM_MARKS]: 1 where a digit is shown, 0 where not, -1 where unsure.

    A visual token stands for one of `cells` x `cells` cells of its tile, and each column of the cell has ten marks.
    A column shows a digit if its middle crosses the digit, and enough of the digit's height is in the cell. The mark is
    unsure if less of the height is, or if the tile has too little of the digit. `size`: width, height.
    """
    columns, rows = choose_grid(*size, options)
    side = options.image_size
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    scale = np.array((columns * side, rows * side)) / size
    placed_TD4 = (boxes * np.tile(scale, 2))[None] - np.tile(corners, 2)[:, None]
    if options.thumbnail and len(corners) > 1:
        placed_TD4 = np.concatenate((placed_TD4, (boxes * np.tile(side / np.array(size), 2))[None]))
    low_TD2, high_TD2 = placed_TD4[..., :2], placed_TD4[..., 2:]
    inside_TD2 = np.clip(np.minimum(high_TD2, side) - np.maximum(low_TD2, 0), 0, None)
    part_TD = inside_TD2.prod(2) / (high_TD2 - low_TD2).prod(2)
    starts, step = np.arange(cells) * side / cells, side / cells
    low_TDR, high_TDR = low_TD2[..., 1:], high_TD2[..., 1:]
    height_TDR = np.clip(np.minimum(high_TDR, starts + step) - np.maximum(low_TDR, starts), 0, None)
    share_TDR = height_TDR / np.minimum(high_TDR - low_TDR, step)
    middles = (np.arange(cells * COLUMNS) + 0.5) * step / COLUMNS
    crossed_TDC = (low_TD2[..., :1] < middles) & (middles < high_TD2[..., :1])
    marks = np.zeros((len(placed_TD4), cells, cells * COLUMNS, 10), np.int8)
    for place, digit in enumerate(map(int, digits)):
        crossed_T1C = crossed_TDC[:, place, None]
        share_TR1, part_T11 = share_TDR[:, place, :, None], part_TD[:, place, None, None]
        mark_TRC = marks[..., digit]
        mark_TRC[crossed_T1C & (share_TR1 > HINTED) & (part_T11 > 0) & (mark_TRC == 0)] = -1
        mark_TRC[crossed_T1C & (share_TR1 > SHOWN) & (part_T11 > PART)] = 1
    return marks.reshape(-1, NUM_MARKS)
