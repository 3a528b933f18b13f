"""The projector's first half: n x n neighbouring patches become one visual token, normalised and projected.

    y[i, (r, c)] = GELU(LayerNorm(concat over a, b of x[i, patch(n r + a, n c + b)]) W^T + b)

It is `unshuffle_norm` and the product behind it; there stand the order of patches, class rows and the versions.

One launcher has two implementations; the measured tables of `kernels/_plans.py` choose between them. "apart" is three
launches: `unshuffle_norm`, a product, GELU. "fused" is two: a small kernel reads x once and writes what normalises each
token (three numbers), and the product gathers the patches itself, normalises them on their way to the matrix units and
applies bias and GELU to its sums. No [tokens, K] matrix is written, which for 13 tiles has 27 MB (E = 1024) or 85 MB
(E = 3200).

Why it is so:

* Statistics have a launch of their own. If each program took those of its own rows first, it would read them twice: 128
  rows of 4,096 are 1 MB, 25 us at what one multiprocessor gets from L2, and every column of blocks would do it again.
  The launch reads the 27 MB of 13 tiles once, in about 10 us.
* LayerNorm is applied to x, not to the sums. The other way, rstd * (x W'^T - mean * u) with W' = W * w_norm, needs a
  second copy of the weights (7 to 131 MB), and where the mean is a thousand deviations the sums cancel: they are about
  1,000, and the matrix units add with an error of 2^-24 of that in each of K / 16 steps, which is 1 % of the result.
  Here the operand is rounded where the reference rounds it.
* x goes through registers: the matrix units of sm_90 take the left operand from there. An element costs a conversion,
  two multiply-adds, (x * rstd + shift) * w + b, and half a packing. A block of 128 x 256 x 64 has 307 instructions for
  each of eight warps, 614 cycles for its scheduler beside 1,024 of the matrix units, which work on the second half of
  the block before it meanwhile (triton 3.6: on three quarters of it). All columns of blocks repeat it.
* A chunk of K never holds channels of two patches, so the gather is one number for a chunk: the offset of the patch
  behind the token's first. x is read by pointers (cp.async). A descriptor of the copy engine would need five dimensions
  and has too few for v1; W, an ordinary matrix, is read by the copy engine.
* The rows of a prompt are not written directly, because visual tokens of a picture are cached.

Predicted for an H100 before any of it was measured, in microseconds, from the tuner's times of 2026-11-26. For 13 tiles
the fused product takes 8 % longer than gemm_epilogue's with the tiling "wide". For one tile it is too few blocks, and
each step of K waits for the one before it: the times of the tiling "low" and 0.2 us for each of its steps.

    tiles x E -> N        apart: norm + product      fused: statistics + product
    1  x 1024 -> 896            4 +  12 =  16               3 +  25 =  28
    13 x 1024 -> 896           24 +  40 =  64              11 +  52 =  63
    1  x 1024 -> 3584           4 +  20 =  24               3 +  29 =  32
    13 x 1024 -> 3584          24 + 154 = 178              11 + 169 = 180
    1  x 3200 -> 5120          10 +  55 =  65               5 + 120 = 125
    13 x 3200 -> 5120          99 + 627 = 726              45 + 649 = 694

The gains, at most 4 %, are below the error of the prediction, so every shape stays "apart" until the tuner finds more.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require_one_of, require_tensor, rows_of
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._plans import GemmPlan, Plan, resolve_projection_plan
from internvl_rt.kernels._unshuffle_project_body import project_kernel, statistics_kernel
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue, linear_gelu_reference, plan_gemm_epilogue, tma_can_read
from internvl_rt.kernels.layer_norm import MAX_WIDTH, row_warps
from internvl_rt.kernels.unshuffle_norm import (
    FACTORS,
    plan_unshuffle_norm,
    require_patches,
    unshuffle_norm,
    unshuffle_norm_reference,
)

Version = Literal["v1", "v2"]


def unshuffle_project_reference(
    x_RE: Tensor,
    num_tiles: int,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor,
    factor: int,
    version: Version,
    *,
    plan: Plan = None,  # does not change the result
) -> Tensor:
    """Returns [I, M, N] of rows [I * (L + 1), E] of the tower; here K = factor^2 * E."""
    x_IMK = unshuffle_norm_reference(x_RE, num_tiles, norm_weight_K, norm_bias_K, eps, factor, version)
    return linear_gelu_reference(x_IMK, weight_NK, bias_N)


def plan_unshuffle_project(
    x_RE: Tensor,
    num_tiles: int,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor,
    factor: int,
    version: Version,
    *,
    plan: Plan = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the two fused kernels, or the kernels before and after a torch product."""
    out_RN = rows_of("out", out)
    (num_tokens, n), k, side = out_RN.shape, weight_NK.shape[1], isqrt(out.shape[1])
    chosen = resolve_projection_plan(plan, num_tokens, n, k, x_RE.dtype, target)
    if chosen.kind == "apart":
        x_IMK = x_RE.new_empty(*out.shape[:2], k)
        norm = norm_weight_K, norm_bias_K, eps, factor, version
        before = plan_unshuffle_norm(x_RE, num_tiles, *norm, out=x_IMK, target=target)
        return before + plan_gemm_epilogue(x_IMK, weight_NK, bias_N, activation="gelu", out=out, target=target)
    statistics = torch.empty(3, num_tokens, dtype=torch.float32, device=x_RE.device)
    tokens: dict[str, Any] = {"x": x_RE, "x_stride": x_RE.stride(0), "num_tokens": num_tokens, "side": side}
    tokens["statistics"] = statistics
    gather: dict[str, Any] = {"E": x_RE.shape[1], "FACTOR": factor, "TRANSPOSED": version == "v1"}
    # One float32 lacks 2^-24 of the mean at most; 16-bit values that differ from the mean do so by 2^-12 of it or more.
    gather["CENTRED"] = x_RE.dtype == torch.float32
    channels, is_wide = x_RE.shape[1], k > MAX_WIDTH
    patch_bytes = channels * x_RE.itemsize
    use_tma = chosen.use_tma and patch_bytes % 16 == 0 and tma_can_read(weight_NK, target)
    programs = cdiv(num_tokens, chosen.block_m) * cdiv(n, chosen.block_n)
    if use_tma:  # a program makes its descriptor once, so there are no more programs than run at once
        resident = min(2, max(1, target.shared_bytes // chosen.shared_bytes(x_RE.itemsize)))
        programs = min(programs, resident * target.num_sms)
    return (
        Launch(
            statistics_kernel,
            (num_tokens, 1, 1),
            {**tokens, "eps": eps},
            {**gather, "WIDE": is_wide, "BLOCK_E": next_power_of_2(channels)},
            num_warps=row_warps(channels if is_wide else k),
        ),
        Launch(
            project_kernel,
            (programs, 1, 1),
            {
                **tokens,
                "norm_weight": norm_weight_K,
                "norm_bias": norm_bias_K,
                "weight": weight_NK,
                "bias": bias_N,
                "out": out_RN,
                "N": n,
                "weight_stride": weight_NK.stride(0),
                "out_stride": out_RN.stride(0),
            },
            {
                **gather,
                "USE_TMA": use_tma,
                "PRECISION": "ieee" if x_RE.dtype == torch.float32 else "tf32",  # 16 bits have one precision only
                "BLOCK_M": chosen.block_m,
                "BLOCK_N": chosen.block_n,
                "BLOCK_K": chosen.block_k,
                "GROUP_M": chosen.group_m,
            },
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            descriptors=use_tma,
            matrix_units=True,
        ),
    )


def unshuffle_project(
    x_RE: Tensor,
    num_tiles: int,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor,
    factor: int,
    version: Version,
    *,
    plan: Plan = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `unshuffle_project_reference`, for factors 1, 2 and 4 and K = factor^2 * E up to MAX_MERGED_WIDTH.

    Raises ValueError naming the argument that does not fit.
    """
    dtype, device = x_RE.dtype, x_RE.device
    require_one_of("x_RE", dtype, SPEC.tolerances)
    num_tokens, width = require_patches(x_RE, num_tiles, factor, version)
    require_tensor("norm_weight_K", norm_weight_K, (width,), dtype, device)
    require_tensor("norm_bias_K", norm_bias_K, (width,), dtype, device)
    n = weight_NK.shape[0]
    require_tensor("weight_NK", weight_NK, (n, width), dtype, device)
    require_tensor("bias_N", bias_N, (n,), dtype, device)
    shape = (num_tiles, num_tokens, n)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    require_tensor("out", out, shape, dtype, device)
    target = target_of(device)
    chosen = resolve_projection_plan(plan, num_tiles * num_tokens, n, width, dtype, target)
    norm = norm_weight_K, norm_bias_K, eps
    if chosen.kind == "apart":
        x_IMK = unshuffle_norm(x_RE, num_tiles, *norm, factor, version)
        return gemm_epilogue(x_IMK, weight_NK, bias_N, activation="gelu", out=out)
    operands = (*norm, weight_NK, bias_N, factor, version)
    run(plan_unshuffle_project(x_RE, num_tiles, *operands, plan=chosen, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes tiles `side` visual tokens wide. Class rows, and `padding` more columns of x and W, which must not be read,
    are NaN."""
    tiles, channels, n, factor = case["I"], case["E"], case["N"], case.sizes.get("factor", 2)
    num_patch_rows, k = tiles * (case["side"] * factor) ** 2, factor**2 * channels
    padding = case.sizes.get("padding", 0)
    implementation = case.sizes.get("implementation")  # a key of _IMPLEMENTATIONS, or the name of a plan

    def matrix(height: int, width: int) -> Tensor:
        values = torch.randn(height, width + padding, dtype=torch.float32, device=device)
        values[:, width:] = torch.nan
        return values

    def vector(width: int) -> Tensor:
        return torch.randn(width, dtype=torch.float32, device=device).to(dtype)

    x = case.sizes.get("deviation", 1.0) * matrix(num_patch_rows + tiles, channels) + case.sizes.get("mean", 0.0)
    x[num_patch_rows:] = torch.nan
    return {
        "x_RE": x.to(dtype)[:, :channels],
        "num_tiles": tiles,
        "norm_weight_K": vector(k),
        "norm_bias_K": vector(k),
        "eps": 1e-5,
        "weight_NK": (matrix(n, k) * k**-0.5).to(dtype)[:, :k],
        "bias_N": vector(n),
        "factor": factor,
        "version": case.sizes.get("version", "v2"),
        "plan": _IMPLEMENTATIONS.get(implementation, implementation) if implementation else None,
    }


# Blocks so small that a small case has several in each dimension, and a last group with fewer rows of blocks.
_SMALL = GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)
_IMPLEMENTATIONS: dict[str, Plan] = {
    "apart": "apart",
    "fused": _SMALL,
    "tma": replace(_SMALL, use_tma=True),
}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    k = case.sizes.get("factor", 2) ** 2 * case["E"]
    tokens, n = case["I"] * case["side"] ** 2, case["N"]
    return Cost(bytes=dtype.itemsize * (tokens * k + n * k + tokens * n + 2 * k + n), flops=2 * tokens * n * k)


def _model_cases() -> Iterator[Case]:
    for tiles in (1, 13):
        for model, channels, n in (("1b", 1024, 896), ("8b", 1024, 3584), ("38b", 3200, 5120)):
            sizes = {"I": tiles, "side": 16, "E": channels, "N": n}
            for tiling in ("low",) if tiles == 1 else ("wide", "square", "low"):
                yield Case(f"{model}_{tiles}_tiles_{tiling}", {**sizes, "implementation": tiling})
            yield Case(f"{model}_{tiles}_tiles", sizes)  # with the table's plan
        for model, channels, n in (("8b", 1024, 8192), ("38b", 3200, 10240)):  # as wide as two visual tokens
            yield Case(f"flash_{model}_{tiles}_tiles", {"I": tiles, "side": 8, "E": channels, "N": n, "factor": 4})


SPEC = KernelSpec(
    name="unshuffle_project",
    used_by="every projector: between the vision tower and the decoder",
    reference=unshuffle_project_reference,
    plan=plan_unshuffle_project,
    launcher=unshuffle_project,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(
            Case(f"channels_{width}_{name}", {"I": 2, "side": 1, "E": width, "N": 24, "implementation": name})
            for width, name in (*((width, "fused") for width in (1, 2, 15, 17, 128)), (2, "tma"), (128, "tma"))
        ),
        *(
            Case(
                f"{version}_factor_{factor}_{name}",
                {"I": 2, "side": 3, "E": 24, "N": 40, "factor": factor, "version": version, "implementation": name},
            )
            for factor in FACTORS
            for version in ("v1", "v2")
            for name in ("fused", "tma")
        ),
        *(
            Case(
                f"wide_{name}",
                {"I": 1, "side": 2, "E": 1030, "N": 8, "factor": 4, "version": version, "implementation": name},
            )
            for name, version in (("fused", "v1"), ("apart", "v2"))
        ),
        *(
            Case(f"{what}_{name}", {"I": 2, "E": 24, "implementation": name, **sizes})
            for name in _IMPLEMENTATIONS
            for what, sizes in (
                ("no_tiles", {"I": 0, "side": 2, "N": 40}),
                ("blocks", {"side": 6, "E": 16, "N": 72}),  # several in each dimension
                ("one_output", {"side": 6, "N": 1, "version": "v1"}),
                ("strided", {"side": 2, "N": 40, "padding": 8}),
                ("shifted", {"side": 2, "N": 40, "mean": 1000.0}),
                ("constant", {"side": 2, "N": 40, "mean": 3.0, "deviation": 0.0}),
            )
        ),
    ),
    model_cases=tuple(_model_cases()),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 16480 products in another order"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "the normalised row is rounded to 11 bits, and the result again"),
        torch.bfloat16: Tolerance(16e-3, 16e-3, 8e-3, "the normalised row is rounded to 8 bits, and the result again"),
    },
)
