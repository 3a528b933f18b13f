"""Patch embedding: pixels to tokens of the vision tower, patches first (see _contract).

    x[i * L + p] = W patch(i, p) + b + position[1 + p]       patches row-major over the tile
    x[I * L + i] = class + position[0]

uint8 tiles are normalised with the ImageNet statistics, (v / 255 - mean) / std in float32, as the official transform
does; floating-point tiles must be normalised already.

There are two launches: the first writes the normalised patches as rows of a matrix, the second multiplies. A product
that gathered pixels itself would read every byte once per block of columns (8 times at E = 1024), one byte a lane,
which takes longer than the product. The matrix fits the L2 cache. Its rows are padded with zeros to whole blocks.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS = 3
TILE_DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


def normalise_tiles_reference(tiles: Tensor) -> Tensor:
    """Normalises uint8 [I, S, S, 3] to float32 [I, 3, S, S]."""
    mean, std = (torch.tensor(each).to(tiles.device)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (tiles.permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_embed_reference(
    tiles: Tensor, weight_EK: Tensor, bias_E: Tensor, class_E: Tensor, position_UE: Tensor
) -> Tensor:
    """Returns rows [I * (L + 1), E]. Tiles are uint8 [I, S, S, 3], or floating point and normalised [I, 3, S, S].

    K = 3 * patch * patch in the order (channel, row, column), the memory order of the checkpoint's convolution.
    """
    pixels = normalise_tiles_reference(tiles) if tiles.dtype == torch.uint8 else tiles
    num_tiles, channels, side, _ = pixels.shape
    patch = round((weight_EK.shape[1] // channels) ** 0.5)
    grid = side // patch
    patches = pixels.to(weight_EK.dtype).view(num_tiles, channels, grid, patch, grid, patch)
    patches_ILK = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_tiles, grid * grid, weight_EK.shape[1])
    x_ILE = F.linear(patches_ILK, weight_EK, bias_E) + position_UE[1:]
    return torch.cat((x_ILE.flatten(0, 1), (class_E + position_UE[0]).expand(num_tiles, -1)))


@triton.jit(do_not_specialize=["num_patches"])
def _patches_kernel(
    tiles, patches, num_patches,
    tile_stride, row_stride, column_stride, channel_stride, patches_stride,
    K: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr, NORMALISE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes patches [R, K] and zeros after them. NORMALISE, unless None, holds a scale and a shift of each channel.

    Neighbouring lanes take neighbouring k, as channel, row and column. From a plain `k` the compiler would let each
    thread store 8 values at once, and the pixels that a warp reads together would be in 18 rows instead of 3.
    """
    patch = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    k = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    channel = k // (PATCH * PATCH)
    row = k // PATCH % PATCH
    column = k % PATCH
    place = (patch % (GRID * GRID)).to(tl.int32)
    source = tiles + patch // (GRID * GRID) * tile_stride
    source += (place // GRID * PATCH).to(tl.int64) * row_stride + (place % GRID * PATCH).to(tl.int64) * column_stride
    offset = channel.to(tl.int64) * channel_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    is_patch = patch < num_patches
    pixels = tl.load(source + offset, mask=is_patch & (k < K), other=0).to(tl.float32)
    if NORMALISE is not None:
        scale = tl.where(channel == 0, NORMALISE[0], tl.where(channel == 1, NORMALISE[1], NORMALISE[2]))
        shift = tl.where(channel == 0, NORMALISE[3], tl.where(channel == 1, NORMALISE[4], NORMALISE[5]))
        pixels = tl.where(k < K, pixels * scale + shift, 0.0)
    target = patches + patch * patches_stride + (channel * (PATCH * PATCH) + row * PATCH + column)
    tl.store(target, pixels.to(patches.dtype.element_ty), mask=is_patch & (k < patches_stride))


@triton.jit(do_not_specialize=["num_rows", "num_patches"])
def _patch_embed_kernel(
    patches, weight, bias, class_token, position, x,
    num_rows, num_patches, width, position_stride, x_stride,
    K: tl.constexpr, PATCHES_STRIDE: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, NUM_PLACES: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Computes a block of x [num_rows, width]. Rows from num_patches on are class rows, which get no product."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_patch = row < num_patches
    is_column = column < width
    k = tl.arange(0, DEPTH)
    patch_pointer = patches + row[:, None] * PATCHES_STRIDE + k[None, :]
    weight_pointer = weight + column.to(tl.int64)[None, :] * WEIGHT_STRIDE + k[:, None]
    of_patch = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    of_class = tl.load(class_token + column, mask=is_column, other=0.0).to(tl.float32)
    total = tl.where(is_patch[:, None], of_patch[None, :], of_class[None, :])
    for start in range(0, K, DEPTH):
        a = tl.load(patch_pointer + start, mask=is_patch[:, None], other=0.0)
        b = tl.load(weight_pointer + start, mask=is_column[None, :] & (start + k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    token = tl.where(is_patch, 1 + row % NUM_PLACES, 0)
    inside = (row < num_rows)[:, None] & is_column[None, :]
    placed = tl.load(position + token[:, None] * position_stride + column[None, :], mask=inside, other=0.0)
    value = total + placed.to(tl.float32)
    tl.store(x + row[:, None] * x_stride + column[None, :], value.to(x.dtype.element_ty), mask=inside)


def plan_patch_embed(
    tiles: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor,
    class_E: Tensor,
    position_UE: Tensor,
    *,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the launches, and allocates the matrix of patches for them."""
    width, depth = weight_EK.shape
    patch = math.isqrt(depth // CHANNELS)
    grid = tiles.shape[2] // patch  # patches along a side; the index holds for both layouts
    num_rows, num_patches = len(out), len(tiles) * grid**2
    block_k = 64 if weight_EK.itemsize == 2 else 32
    patches_RK = weight_EK.new_empty(num_patches, cdiv(depth, block_k) * block_k)
    normalise, pixel_strides = None, ("tile_stride", "channel_stride", "row_stride", "column_stride")
    if tiles.dtype == torch.uint8:
        scales = [1 / (255 * std) for std in IMAGENET_STD]
        normalise = (*scales, *(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)))
        pixel_strides = ("tile_stride", "row_stride", "column_stride", "channel_stride")
    return (
        Launch(
            _patches_kernel,
            (cdiv(num_patches, 16), cdiv(patches_RK.shape[1], 128), 1),
            {
                "tiles": tiles,
                "patches": patches_RK,
                "num_patches": num_patches,
                **dict(zip(pixel_strides, tiles.stride(), strict=True)),
                "patches_stride": patches_RK.stride(0),
            },
            {"K": depth, "PATCH": patch, "GRID": grid, "NORMALISE": normalise, "ROWS": 16, "BLOCK": 128},
            wide_loads=False,  # neighbours in a patch's row are 3 bytes apart, and a row has 14 pixels
        ),
        Launch(
            _patch_embed_kernel,
            (cdiv(num_rows, 128), cdiv(width, 128), 1),
            {
                "patches": patches_RK,
                "weight": weight_EK,
                "bias": bias_E,
                "class_token": class_E,
                "position": position_UE,
                "x": out,
                "num_rows": num_rows,
                "num_patches": num_patches,
                "width": width,
                "position_stride": position_UE.stride(0),
                "x_stride": out.stride(0),
            },
            {
                "K": depth,
                "PATCHES_STRIDE": patches_RK.stride(0),
                "WEIGHT_STRIDE": weight_EK.stride(0),  # a constant, so that the compiler sees that 1176 is 8 * 147
                "NUM_PLACES": grid**2,
                "PRECISION": "ieee" if weight_EK.dtype == torch.float32 else None,
                "ROWS": 128,
                "COLUMNS": 128,
                "DEPTH": block_k,
            },
            num_warps=8,
            matrix_units=True,
        ),
    )


def patch_embed(
    tiles: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor,
    class_E: Tensor,
    position_UE: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `patch_embed_reference`; the tiles may have any strides and, if normalised, any floating-point dtype.

    Raises ValueError naming the argument that does not fit.
    """
    dtype, device = weight_EK.dtype, weight_EK.device
    require_one_of("weight_EK", dtype, SPEC.tolerances)
    require(weight_EK.ndim == 2, "weight_EK", "shape [E, K]", tuple(weight_EK.shape))
    width, depth = weight_EK.shape
    patch = math.isqrt(depth // CHANNELS)
    square = patch >= 1 and depth == CHANNELS * patch**2
    require(width >= 1 and square, "weight_EK", "shape [E, 3 * patch * patch]", (width, depth))
    require_tensor("weight_EK", weight_EK, (width, depth), dtype, device)

    require_one_of("tiles", tiles.dtype, TILE_DTYPES)
    require(tiles.device == device, "tiles", f"a tensor on {device}", f"one on {tiles.device}")
    layout = "[I, S, S, 3]" if tiles.dtype == torch.uint8 else "[I, 3, S, S]"
    require(tiles.ndim == 4, "tiles", f"shape {layout}", tuple(tiles.shape))
    num_tiles, side = len(tiles), tiles.shape[2]
    expected = (num_tiles, side, side, CHANNELS) if tiles.dtype == torch.uint8 else (num_tiles, CHANNELS, side, side)
    require(tuple(tiles.shape) == expected, "tiles", f"shape {layout} with equal sides", tuple(tiles.shape))
    require(side >= patch and side % patch == 0, "tiles", f"sides that are multiples of the patch {patch}", side)

    tokens = (side // patch) ** 2 + 1
    require_tensor("bias_E", bias_E, (width,), dtype, device)
    require_tensor("class_E", class_E, (width,), dtype, device)
    require_tensor("position_UE", position_UE, (tokens, width), dtype, device)
    if out is None:
        out = torch.empty((num_tiles * tokens, width), dtype=dtype, device=device)
    require_tensor("out", out, (num_tiles * tokens, width), dtype, device)
    run(plan_patch_embed(tiles, weight_EK, bias_E, class_E, position_UE, out=out, target=target_of(device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Makes tiles, floating-point ones if `normalised`, cut from a tensor with `padding` more pixels on two sides."""
    num_tiles, patch, grid, width = (case[name] for name in ("I", "patch", "grid", "E"))
    side, depth = patch * grid, 3 * patch * patch
    padded = side + case.sizes.get("padding", 0)
    if case.sizes.get("normalised"):
        tiles = torch.randn(num_tiles, 3, padded, padded, device=device).to(dtype)
        tiles[..., side:, :] = math.nan
        tiles[..., side:] = math.nan
        tiles = tiles[..., :side, :side]
    else:
        tiles = torch.randint(0, 256, (num_tiles, padded, padded, 3), device=device).to(torch.uint8)[:, :side, :side]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    return {
        "tiles": tiles,
        "weight_EK": (normal(width, depth) / depth**0.5).to(dtype),
        "bias_E": normal(width),
        "class_E": normal(width),
        "position_UE": normal(grid * grid + 1, width),
    }


def _case(name: str, num_tiles: int, patch: int, grid: int, width: int, **extra: object) -> Case:
    return Case(name, {"I": num_tiles, "patch": patch, "grid": grid, "E": width, **extra})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    patches, depth, width = case["I"] * case["grid"] ** 2, 3 * case["patch"] ** 2, case["E"]
    tokens = case["grid"] ** 2 + 1
    elements = width * depth + 2 * width + tokens * width + case["I"] * tokens * width
    pixel_bytes = dtype.itemsize if case.sizes.get("normalised") else 1
    return Cost(bytes=pixel_bytes * patches * depth + dtype.itemsize * elements, flops=2 * patches * depth * width)


SPEC = KernelSpec(
    name="patch_embed",
    used_by="every vision tower: its start",
    reference=patch_embed_reference,
    plan=plan_patch_embed,
    launcher=patch_embed,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        _case("patch_14", 1, 14, 3, 70),
        _case("patch_16", 2, 16, 2, 32),
        _case("patch_4", 3, 4, 5, 130),
        _case("patch_2", 2, 2, 7, 5),
        _case("one_patch", 5, 14, 1, 65),
        _case("no_tiles", 0, 14, 2, 64),
        _case("rows_end_with_a_block", 1, 2, 8, 128),  # 64 patches, so the class row begins the next block
        _case("strided", 2, 4, 3, 33, padding=3),
        _case("normalised", 2, 14, 2, 48, normalised=True),
        _case("normalised_strided", 2, 4, 3, 17, normalised=True, padding=2),
    ),
    model_cases=tuple(
        _case(f"{name}_{tiles}_tiles", tiles, 14, 32, width)
        for name, width in (("vit_300m", 1024), ("vit_6b", 3200))
        for tiles in (1, 13)
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums of 588 products in another order"),
        # The output is rounded, and before it each of the 12 to 768 pixels in its sum; all may be off in one direction.
        torch.float16: Tolerance(1e-3, 2.5e-3, 5e-4, "pixels and output are each rounded to 11 bits"),
        torch.bfloat16: Tolerance(8e-3, 2e-2, 4e-3, "pixels and output are each rounded to 8 bits"),
    },
)
