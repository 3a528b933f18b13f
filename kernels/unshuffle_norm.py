"""Pixel unshuffle and LayerNorm: n x n neighbouring patches become one visual token of n*n*E channels.

    y[i, (r, c)] = LayerNorm(concat over a, b of x[i, patch(n r + a, n c + b)])         a changes slowly, b fast

The class rows, which come last (see _contract), are not read. Version v2 stores token (r, c) at row-major place (r, c);
v1, an early release, stores it at (c, r).

A program holds its token in registers, up to MAX_WIDTH channels. A wider token, such as the 51,200 channels of 4 x 4
patches of InternViT-6B, is read patch by patch: once for its mean, once for its deviation, and once to be normalised.
The second and third time it comes from L2, where the tokens at work are a few MB.
"""

from math import isqrt
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import (
    Case,
    Cost,
    KernelSpec,
    Tolerance,
    require,
    require_one_of,
    require_tensor,
    rows_of,
)
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of
from internvl_rt.kernels.layer_norm import MAX_WIDTH, layer_norm_reference, layer_norm_row, row_warps

FACTORS = (1, 2, 4)
MAX_MERGED_WIDTH = 65536


def unshuffle_norm_reference(
    x_RE: Tensor,
    num_tiles: int,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    factor: int,
    version: Literal["v1", "v2"],
) -> Tensor:
    """Returns visual tokens [I, M, factor^2 * E] from rows [I * (L + 1), E] of the tower; here D = factor^2 * E."""
    num_patch_rows, width = len(x_RE) - num_tiles, x_RE.shape[1]
    side = round((num_patch_rows // max(num_tiles, 1)) ** 0.5) // factor
    x = x_RE[:num_patch_rows].view(num_tiles, side, factor, side, factor, width).transpose(2, 3)
    if version == "v1":
        x = x.transpose(1, 2)
    return layer_norm_reference(x.reshape(num_tiles, side * side, factor * factor * width), weight_D, bias_D, eps)


@triton.jit
def first_patch(token, side, FACTOR: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Returns the row of x with a visual token's first patch; the others are at `patch_offset` behind it."""
    tile = token // (side * side)
    slow, fast = token // side % side, token % side
    if TRANSPOSED:  # v1: tokens are stored column by column
        r, c = fast, slow
    else:
        r, c = slow, fast
    return (tile * side + r) * (FACTOR * FACTOR * side) + c * FACTOR


@triton.jit
def patch_offset(neighbour, side, FACTOR: tl.constexpr):
    return neighbour // FACTOR * (FACTOR * side) + neighbour % FACTOR


@triton.jit
def wide_statistics(x, patch, x_stride, side, eps, E: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Reads a visual token patch by patch; returns the two parts of its mean, and the inverse of its deviation.

    One float32 lacks the mean's last bits where it is much larger than the deviation.
    """
    WIDTH: tl.constexpr = FACTOR * FACTOR * E
    column = tl.arange(0, BLOCK)
    inside = column < E
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for neighbour in range(FACTOR * FACTOR):
        at = x + (patch + patch_offset(neighbour, side, FACTOR)).to(tl.int64) * x_stride + column
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums) / WIDTH
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for neighbour in range(FACTOR * FACTOR):
        at = x + (patch + patch_offset(neighbour, side, FACTOR)).to(tl.int64) * x_stride + column
        centred = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        sums += centred
        squares += centred * centred
    rest = tl.sum(sums) / WIDTH
    return mean, rest, 1.0 / tl.sqrt_rn(tl.sum(squares) / WIDTH - rest * rest + eps)


@triton.jit
def _unshuffle_norm_wide_kernel(
    x,
    weight,
    bias,
    y,
    x_stride,
    y_stride,
    eps,
    side,  # visual tokens along one side of a tile
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # v1: tokens are stored column by column
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    patch = first_patch(token, side, FACTOR, TRANSPOSED)
    mean, rest, rstd = wide_statistics(x, patch, x_stride, side, eps, E, FACTOR, BLOCK)
    column = tl.arange(0, BLOCK)
    inside = column < E
    for neighbour in range(FACTOR * FACTOR):
        at = x + (patch + patch_offset(neighbour, side, FACTOR)).to(tl.int64) * x_stride + column
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        place = neighbour * E + column
        w = tl.load(weight + place, mask=inside, other=0.0)
        b = tl.load(bias + place, mask=inside, other=0.0)
        normed = (values - mean - rest) * rstd * w.to(tl.float32) + b.to(tl.float32)
        tl.store(y + token.to(tl.int64) * y_stride + place, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unshuffle_norm_kernel(
    x,
    weight,
    bias,
    y,
    x_stride,
    y_stride,
    eps,
    side,  # visual tokens along one side of a tile
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # v1: tokens are stored column by column
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    tile = token // (side * side)
    slow, fast = token // side % side, token % side
    if TRANSPOSED:
        r, c = fast, slow
    else:
        r, c = slow, fast
    column = tl.arange(0, BLOCK)
    inside = column < FACTOR * FACTOR * E
    neighbour = column // E
    patch_row = (tile * side + r) * FACTOR + neighbour // FACTOR  # row of patches, if all tiles were one tall picture
    patch = patch_row * (side * FACTOR) + c * FACTOR + neighbour % FACTOR
    values = tl.load(x + patch.to(tl.int64) * x_stride + column % E, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)  # loaded before the reductions wait for the row
    b = tl.load(bias + column, mask=inside, other=0.0)
    normed = layer_norm_row(values, inside, FACTOR * FACTOR * E, eps) * w.to(tl.float32) + b.to(tl.float32)
    tl.store(y + token.to(tl.int64) * y_stride + column, normed.to(y.dtype.element_ty), mask=inside)


def plan_unshuffle_norm(
    x_RE: Tensor,
    num_tiles: int,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    factor: int,
    version: Literal["v1", "v2"],
    *,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    out_RD = rows_of("out", out)
    num_tokens, width = out_RD.shape
    is_wide, channels = width > MAX_WIDTH, x_RE.shape[1]
    return (
        Launch(
            _unshuffle_norm_wide_kernel if is_wide else _unshuffle_norm_kernel,
            (num_tokens, 1, 1),
            {
                "x": x_RE,
                "weight": weight_D,
                "bias": bias_D,
                "y": out_RD,
                "x_stride": x_RE.stride(0),
                "y_stride": out_RD.stride(0),
                "eps": eps,
                "side": isqrt(out.shape[1]),
            },
            {
                "E": channels,
                "FACTOR": factor,
                "TRANSPOSED": version == "v1",
                "BLOCK": next_power_of_2(channels if is_wide else width),
            },
            num_warps=row_warps(channels if is_wide else width),
        ),
    )


def require_patches(x_RE: Tensor, num_tiles: int, factor: int, version: str) -> tuple[int, int]:
    """Raises ValueError unless x_RE holds whole tiles; returns the visual tokens of one, and their width."""
    require(x_RE.ndim == 2, "x_RE", "rows [R, E]", tuple(x_RE.shape))
    require_one_of("factor", factor, FACTORS)
    require(version in ("v1", "v2"), "version", "v1 or v2", version)
    rows, channels = x_RE.shape
    width = factor * factor * channels
    most = MAX_WIDTH if factor == 1 else MAX_MERGED_WIDTH
    require(1 <= width <= most, "x_RE", f"factor^2 * E from 1 to {most}", width)
    require(num_tiles >= 0, "num_tiles", "0 or more", num_tiles)
    grid = isqrt(max(rows // max(num_tiles, 1) - 1, 0))  # patches along one side of a tile
    tiles = f"{num_tiles} tiles of 1 + (a multiple of {factor})^2 rows"
    require(rows == num_tiles * (grid * grid + 1) and grid % factor == 0, "x_RE", tiles, f"{rows} rows")
    require_tensor("x_RE", x_RE, (rows, channels), x_RE.dtype, x_RE.device)
    return (grid // factor) ** 2, width


def unshuffle_norm(
    x_RE: Tensor,
    num_tiles: int,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    factor: int,
    version: Literal["v1", "v2"],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `unshuffle_norm_reference`, for factors 1, 2 and 4 and D = factor^2 * E up to MAX_MERGED_WIDTH.

    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("x_RE", x_RE.dtype, SPEC.tolerances)
    num_tokens, width = require_patches(x_RE, num_tiles, factor, version)
    require_tensor("weight_D", weight_D, (width,), x_RE.dtype, x_RE.device)
    require_tensor("bias_D", bias_D, (width,), x_RE.dtype, x_RE.device)
    shape = (num_tiles, num_tokens, width)
    if out is None:
        out = torch.empty(shape, dtype=x_RE.dtype, device=x_RE.device)
    require_tensor("out", out, shape, x_RE.dtype, x_RE.device)
    target = target_of(x_RE.device)
    run(plan_unshuffle_norm(x_RE, num_tiles, weight_D, bias_D, eps, factor, version, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float | str]:
    """Makes tiles `side` visual tokens wide. Class rows and `padding` more columns, which must not be read, are NaN."""
    tiles, channels, factor = case["I"], case["E"], case.sizes.get("factor", 2)
    num_patch_rows = tiles * (case["side"] * factor) ** 2
    shape = (num_patch_rows + tiles, channels + case.sizes.get("padding", 0))
    x = torch.randn(shape, dtype=torch.float32, device=device) + case.sizes.get("mean", 0.0)
    x[num_patch_rows:] = torch.nan
    x[:, channels:] = torch.nan
    weight, bias = (torch.randn(factor**2 * channels, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    return {
        "x_RE": x.to(dtype)[:, :channels],
        "num_tiles": tiles,
        "weight_D": weight,
        "bias_D": bias,
        "eps": 1e-5,
        "factor": factor,
        "version": case.sizes.get("version", "v2"),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    width = case.sizes.get("factor", 2) ** 2 * case["E"]
    tokens = case["I"] * case["side"] ** 2
    return Cost(bytes=dtype.itemsize * (2 * tokens + 2) * width, flops=8 * tokens * width)


SPEC = KernelSpec(
    name="unshuffle_norm",
    used_by="every projector, with batch_invariant; the second one of Flash",
    reference=unshuffle_norm_reference,
    plan=plan_unshuffle_norm,
    launcher=unshuffle_norm,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(Case(f"channels_{width}", {"I": 2, "side": 1, "E": width}) for width in (1, 2, 15, 17, 128, 1024, 3200)),
        *(
            Case(f"{version}_factor_{factor}", {"I": 2, "side": 3, "E": 24, "factor": factor, "version": version})
            for factor in FACTORS
            for version in ("v1", "v2")
        ),
        Case("widest", {"I": 1, "side": 1, "E": 1024, "factor": 4}),
        *(
            Case(f"wide_{name}", {"I": 1, "side": 1, "E": 1030, "factor": 4, **sizes})
            for name, sizes in (
                ("v1", {"side": 2, "version": "v1"}),
                ("v2", {"side": 2}),
                ("of_the_6b", {"E": 3200}),
                ("strided", {"padding": 10}),
                ("shifted", {"mean": 1000.0}),
                ("factor_2", {"E": 4100, "factor": 2}),
            )
        ),
        Case("no_tiles", {"I": 0, "side": 2, "E": 16}),
        Case("strided", {"I": 2, "side": 2, "E": 20, "padding": 12}),
        Case("shifted", {"I": 1, "side": 2, "E": 64, "mean": 1000.0}),
    ),
    model_cases=tuple(
        Case(f"{name}_{tiles}_tiles", {"I": tiles, "side": side, "E": width, "factor": factor})
        for name, side, width, factor in (
            ("vit_300m", 16, 1024, 2),
            ("vit_6b", 16, 3200, 2),
            ("flash_300m", 8, 1024, 4),
            ("flash_6b", 8, 3200, 4),
        )
        for tiles in (1, 13)
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 51200 values in another order"),
        torch.float16: Tolerance(1e-3, 1e-3, 5e-4, "the output is rounded once to 11 bits"),
        torch.bfloat16: Tolerance(8e-3, 8e-3, 4e-3, "the output is rounded once to 8 bits"),
    },
)
