"""Stretches a picture to its tile grid and cuts it into tiles: Pillow's antialiased bicubic, bit for bit, in integers.

Output position o of an axis resized from n to m pixels lies at c = (o + 1/2) n / m and uses the pixels j with

    |j + 1/2 - c| < 2 s,  s = max(n / m, 1),    weight  k((j + 1/2 - c) / s) / (sum of these weights),

where k is the cubic convolution kernel with a = -1/2. Weights are rounded to 22 fractional bits, products are summed in
32 bits, and the sum is rounded and clamped to 8 bits after each pass. The horizontal pass comes first, except where a
picture over 100 times taller than wide loses height: its vertical pass comes first (`Image.resize` of Pillow 12). Two
calls of Pillow's `resize`, one for each axis, compute the same (src/libImaging/Resample.c), and so does
`internvl_rt.inputs.tiles` on the CPU.
An axis that keeps its size gets the weights 0, 0, 1, 0, 0, so the pass that Pillow leaves out changes nothing here.

Both passes treat the thumbnail as one more column of tiles to the right of the grid and one more row of tiles below
it. The tables of the two sizes follow each other, so that two launches do the whole picture.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

FRACTION_BITS = 22  # with 8 bits of pixel and 2 of headroom (weights may be negative, sums above 1) they make 32
CACHED_TABLES = 32  # one a picture's axis; a 4000 x 3000 photograph's take 0.5 MB, the largest of 448-pixel tiles 7 MB


def bicubic_table(size_in: int, size_out: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Computes first pixel [size_out] and fixed-point weights [size_out, taps] for every output position of one axis.

    Weights after the last pixel of a position are 0. The float64 arithmetic runs in Pillow's order.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum(np.trunc(centre - support + 0.5), 0).astype(np.int32)
    last = np.minimum(np.trunc(centre + support + 0.5), size_in).astype(np.int32)
    pixel = first[:, None] + np.arange((last - first).max(), dtype=np.int32)
    x = np.abs((pixel - centre[:, None] + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weight = np.where(pixel < last[:, None], np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)), 0.0)
    weight /= np.cumsum(weight, axis=1)[:, -1:]  # the weights are added up from left to right
    return first, np.trunc(weight * (1 << FRACTION_BITS) + np.copysign(0.5, weight)).astype(np.int32)


def _vertical_first(image_HW3: Tensor, height_out: int) -> bool:
    height, width = image_HW3.shape[:2]
    return height > 100 * width and height_out < height


def _resize_axis_reference(pixels: Tensor, dim: int, size_out: int) -> Tensor:
    first, weights = (torch.from_numpy(table).to(pixels.device) for table in bicubic_table(pixels.shape[dim], size_out))
    shape = [1] * pixels.ndim
    shape[dim] = size_out
    total = torch.full((), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=pixels.device)
    for tap in range(weights.shape[1]):  # after a position's last pixel the weight is 0
        taken = pixels.index_select(dim, (first + tap).clamp(max=pixels.shape[dim] - 1))
        total = total + taken.to(torch.int32) * weights[:, tap].view(shape)
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def resize_tiles_reference(image_HW3: Tensor, columns: int, rows: int, size: int, thumbnail: bool) -> Tensor:
    """Returns uint8 tiles [columns * rows (+ 1), size, size, 3] of a uint8 picture, row by row, then the thumbnail."""
    if image_HW3.is_meta:  # its width and height, which a compiler may leave open, say nothing about the result
        return image_HW3.new_empty(columns * rows + thumbnail, size, size, 3)

    def stretched(width: int, height: int) -> Tensor:
        passes = [(1, width), (0, height)]
        pixels = image_HW3
        for dim, size_out in passes[::-1] if _vertical_first(image_HW3, height) else passes:
            pixels = _resize_axis_reference(pixels, dim, size_out)
        return pixels

    canvas = stretched(columns * size, rows * size).view(rows, size, columns, size, 3)
    tiles = canvas.transpose(1, 2).reshape(rows * columns, size, size, 3)
    return torch.cat((tiles, stretched(size, size)[None])) if thumbnail else tiles


@triton.jit
def _eight_bits(total, FRACTION_BITS: tl.constexpr):
    return tl.minimum(tl.maximum(total >> FRACTION_BITS, 0), 255).to(tl.uint8)


@triton.jit(do_not_specialize=["height", "image_stride"])
def _resize_columns_kernel(
    image, canvas, first, count, weights, height, width, image_stride,
    FRACTION_BITS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes a block of canvas [height, width * 3]. Neighbouring lanes have neighbouring bytes and so read together.

    Addresses are computed from column and channel. From a plain `element` the compiler would let each thread store 16
    neighbouring bytes at once, whose reads lie far from those of the next lane.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None]
    element = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    column = element // 3
    channel = element % 3
    inside = column < width
    begin = tl.load(first + column, mask=inside, other=0)
    taps = tl.load(count + column, mask=inside, other=0)
    source = image + tl.minimum(line, height - 1) * image_stride
    offset = begin * 3 + channel
    total = tl.full((LINES, BLOCK), 1 << (FRACTION_BITS - 1), tl.int32)
    for tap in range(tl.max(taps)):
        taken = tap < taps
        weight = tl.load(weights + tap * width + column, mask=taken, other=0)
        pixel = tl.load(source + offset, mask=taken, other=0)
        total += pixel.to(tl.int32) * weight
        offset += 3
    target = canvas + line * (width * 3) + (column * 3 + channel)
    tl.store(target, _eight_bits(total, FRACTION_BITS), mask=(line < height) & inside)


@triton.jit(do_not_specialize=["columns", "grid_tiles", "lines"])
def _resize_lines_kernel(
    canvas, tiles, first, count, weights, columns, grid_tiles, lines, canvas_stride, size,
    FRACTION_BITS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes a block of one tile [size, size * 3] from the columns of the canvas that belong to the tile."""
    tile = tl.program_id(0)
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)
    element = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    tile_column = tl.where(tile == grid_tiles, columns, tile % columns)
    line = tile // columns * size + y  # the thumbnail's lines follow those of the last row of tiles
    begin = tl.load(first + line, mask=y < size, other=0)
    taps = tl.load(count + line, mask=y < size, other=0)
    source = canvas + begin.to(tl.int64)[:, None] * canvas_stride + tile_column * (size * 3) + element
    total = tl.full((LINES, BLOCK), 1 << (FRACTION_BITS - 1), tl.int32)
    for tap in range(tl.max(taps, axis=0)):
        taken = tap < taps
        weight = tl.load(weights + tap * lines + line, mask=taken, other=0)
        pixel = tl.load(source, mask=taken[:, None] & (element < size * 3), other=0)
        total += pixel.to(tl.int32) * weight[:, None]
        source += canvas_stride
    target = tiles + (tile.to(tl.int64) * size + y[:, None]) * (size * 3) + element
    tl.store(target, _eight_bits(total, FRACTION_BITS), mask=(y < size)[:, None] & (element < size * 3))


@lru_cache(CACHED_TABLES)
def _device_tables(size_in: int, sizes_out: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the tables of an axis' stretches, one after the other: int32 first [m], count [m] and weights [taps, m].

    `count` does not count the zeros after a position's last weight. Neighbouring positions are neighbours in memory.
    """
    tables = [bicubic_table(size_in, size_out) for size_out in sizes_out]
    weights = np.zeros((max(table.shape[1] for _, table in tables), sum(sizes_out)), np.int32)
    for (_, table), end in zip(tables, np.cumsum(sizes_out), strict=True):
        weights[: table.shape[1], end - len(table) : end] = table.T
    count = len(weights) - np.argmax(weights[::-1] != 0, axis=0)
    host = (np.concatenate([first for first, _ in tables]), count.astype(np.int32), weights)
    first, counts, device_weights = (torch.from_numpy(table).to(device) for table in host)
    return first, counts, device_weights


def _tables(size_in: int, sizes_out: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `_device_tables`, whose memory is not given to others before the current stream has used it."""
    tables = _device_tables(size_in, sizes_out, device)
    if device.type == "cuda":
        for table in tables:
            table.record_stream(torch.cuda.current_stream(device))
    return tables


def plan_resize_tiles(
    image_HW3: Tensor, columns: int, rows: int, size: int, thumbnail: bool, *, out: Tensor, target: Target
) -> tuple[Launch, ...]:
    """Plans the launches with the horizontal pass first, whatever the size of the picture.

    Allocates the canvas between the passes: uint8 [height, (columns + 1) * size, 3].
    """
    height, width = image_HW3.shape[:2]
    tables_x = _tables(width, (columns * size, size)[: 1 + thumbnail], image_HW3.device)
    tables_y = _tables(height, (rows * size, size)[: 1 + thumbnail], image_HW3.device)
    canvas_width = len(tables_x[0])
    canvas = torch.empty((height, canvas_width * 3), dtype=torch.uint8, device=image_HW3.device)
    across, down = (dict(zip(("first", "count", "weights"), tables, strict=True)) for tables in (tables_x, tables_y))
    return (
        Launch(
            _resize_columns_kernel,
            (cdiv(height, 8), cdiv(canvas_width * 3, 256), 1),
            {
                "image": image_HW3,
                "canvas": canvas,
                **across,
                "height": height,
                "width": canvas_width,
                "image_stride": image_HW3.stride(0),
            },
            {"FRACTION_BITS": FRACTION_BITS, "LINES": 8, "BLOCK": 256},
            wide_loads=False,  # each position starts at its own byte, `scale` pixels of 3 bytes after its neighbour
        ),
        Launch(
            _resize_lines_kernel,
            (len(out), cdiv(size, 16), cdiv(size * 3, 128)),
            {
                "canvas": canvas,
                "tiles": out,
                **down,
                "columns": columns,
                "grid_tiles": columns * rows,
                "lines": len(tables_y[0]),
                "canvas_stride": canvas.stride(0),
                "size": size,
            },
            {"FRACTION_BITS": FRACTION_BITS, "LINES": 16, "BLOCK": 128},
        ),
    )


def resize_tiles(
    image_HW3: Tensor, columns: int, rows: int, size: int, thumbnail: bool, *, out: Tensor | None = None
) -> Tensor:
    """Computes `resize_tiles_reference`, for a picture with contiguous rows, which may have gaps between them.

    Raises ValueError naming the argument that does not fit.
    """
    require(image_HW3.dtype == torch.uint8, "image_HW3", torch.uint8, image_HW3.dtype)
    shape = tuple(image_HW3.shape)
    require(len(shape) == 3 and shape[-1] == 3 and 0 not in shape, "image_HW3", "shape [height, width, 3]", shape)
    contiguous = image_HW3.stride(2) == 1 and (shape[1] == 1 or image_HW3.stride(1) == 3)
    require(contiguous, "image_HW3", "contiguous rows", f"strides {image_HW3.stride()}")
    for name, value in {"columns": columns, "rows": rows, "size": size}.items():
        require(value >= 1, name, "at least 1", value)
    tiles_shape = (columns * rows + thumbnail, size, size, 3)
    if out is None:
        out = torch.empty(tiles_shape, dtype=torch.uint8, device=image_HW3.device)
    require_tensor("out", out, tiles_shape, torch.uint8, image_HW3.device)
    require(out.is_contiguous(), "out", "a contiguous tensor", f"strides {out.stride()}")
    if _vertical_first(image_HW3, size):  # the grid may still take the usual order, as it is higher than the thumbnail
        num_grid_tiles = columns * rows
        _resize_narrow(image_HW3, columns, rows, out[:num_grid_tiles])
        if thumbnail:
            _resize_narrow(image_HW3, 1, 1, out[num_grid_tiles:])
    else:
        run(plan_resize_tiles(image_HW3, columns, rows, size, thumbnail, out=out, target=target_of(image_HW3.device)))
    return out


def _resize_narrow(image_HW3: Tensor, columns: int, rows: int, out: Tensor) -> None:
    """Fills `out`, the tiles of a grid. Where the vertical pass comes first, the turned picture is resized instead."""
    size, target = out.shape[1], target_of(image_HW3.device)
    if not _vertical_first(image_HW3, rows * size):
        run(plan_resize_tiles(image_HW3, columns, rows, size, False, out=out, target=target))
        return
    turned, image_WH3 = torch.empty_like(out), image_HW3.transpose(0, 1).contiguous()
    run(plan_resize_tiles(image_WH3, rows, columns, size, False, out=turned, target=target))
    out.view(rows, columns, size, size, 3).copy_(turned.view(columns, rows, size, size, 3).permute(1, 0, 3, 2, 4))


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | int | bool]:
    """Makes a picture of noise, or stripes of 0 and 255, clamped when resized; `padding` pixels follow each row."""
    width, height = case["width"], case["height"]
    shape = (height, width + case.sizes.get("padding", 0), 3)
    if case.sizes.get("fill") == "stripes":
        image = torch.arange(math.prod(shape), device=device).view(shape).div(7, rounding_mode="floor") % 2 * 255
    else:
        image = torch.randint(0, 256, shape, device=device)
    names = ("columns", "rows", "size", "thumbnail")
    return {"image_HW3": image.to(dtype)[:, :width], **{name: case[name] for name in names}}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """Counts reading the picture and writing the tiles once; a tap is 2 operations, a position 4 taps at scale 1."""
    width, height, size = case["width"], case["height"], case["size"]
    grids = [(case["columns"], case["rows"]), (1, 1)][: 1 + case["thumbnail"]]
    taps = sum(
        height * columns * size * 4 * max(width / (columns * size), 1)
        + rows * size * columns * size * 4 * max(height / (rows * size), 1)
        for columns, rows in grids
    )
    tiles = sum(columns * rows for columns, rows in grids)
    return Cost(bytes=3 * width * height + 3 * tiles * size**2, flops=2 * 3 * int(taps))


def _case(
    name: str, picture: tuple[int, int], grid: tuple[int, int], size: int, thumbnail: bool, **extra: object
) -> Case:
    (width, height), (columns, rows) = picture, grid
    sizes = {"width": width, "height": height, "columns": columns, "rows": rows, "size": size, "thumbnail": thumbnail}
    return Case(name, {**sizes, **extra})


SPEC = KernelSpec(
    name="resize_tiles",
    used_by="every model: pictures, before the vision tower",
    reference=resize_tiles_reference,
    plan=plan_resize_tiles,
    launcher=resize_tiles,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        _case("photo", (83, 61), (4, 3), 16, True),
        _case("one_pixel", (1, 1), (1, 1), 16, False),
        _case("one_column", (1, 300), (1, 2), 16, True),
        _case("one_row", (701, 1), (3, 1), 16, True),
        _case("equal_size", (32, 16), (2, 1), 16, True),
        _case("half_size", (64, 64), (2, 2), 16, False),
        _case("upscaled", (5, 7), (3, 2), 28, True),
        _case("odd_tile", (40, 90), (2, 3), 17, True),
        _case("a_tile_of_1", (9, 9), (2, 2), 1, True),
        _case("strided", (50, 30), (2, 1), 28, True, padding=5),
        _case("narrow", (2, 230), (2, 3), 16, True),  # the vertical pass comes first
        _case("narrow_and_enlarged", (2, 230), (1, 20), 16, True),  # the vertical pass comes first for the thumbnail
        _case("stripes", (45, 37), (2, 2), 28, True, fill="stripes"),
    ),
    model_cases=(
        _case("photo_12_megapixels", (4000, 3000), (4, 3), 448, True),
        _case("page_a4_300_dpi", (2480, 3508), (3, 4), 448, True),
        _case("full_hd", (1920, 1080), (4, 2), 448, True),
        _case("icon", (640, 640), (1, 1), 448, False),
    ),
    tolerances={torch.uint8: Tolerance(0, 0, 0, "integers, equal to Pillow's")},
    exact=True,
)
