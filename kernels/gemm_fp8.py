"""Products of many rows in FP8 (e4m3) with a weight in FP8, and what follows them.

    y = (number * scale_R) W^T + b + residual       W[n, k] = number[n, k] * scale[n, k // 128], or times scale[n, 0]

Sums of 128 products are added in float32 (`_gemm_fp8_body.py`). Where a row of the weight has one scale, the result is
bfloat16, K and N are multiples of 16 and rows lie one after another, torch's own product, cuBLASLt or CUTLASS, takes
the place of the kernel. It takes a GPU with FP8: compute capability 8.9 or newer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._fp8_rows import FP8, IN_FP8, require_fp8
from internvl_rt.kernels._gemm_fp8_body import gemm_fp8_kernel
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._numbers_8bit import BLOCK, require_scales
from internvl_rt.kernels._plans import GemmPlan
from internvl_rt.kernels.dequantise import dequantise_reference
from internvl_rt.kernels.gemv_8bit import draw_numbers


def gemm_fp8_reference(
    numbers_RK: Tensor,
    scale_R: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    *,
    dtype: torch.dtype,
    residual_RN: Tensor | None = None,
    plan: GemmPlan | None = None,  # does not change the result
) -> Tensor:
    """Multiplies in float32, which holds every product of two numbers, and rounds the result to `dtype`."""
    x_RK = numbers_RK.float() * scale_R.float()[:, None]
    dense_NK = dequantise_reference(weight_NK, scale_NG, None, weight_NK.shape[1], dtype=torch.float32)
    y_RN = x_RK @ dense_NK.T
    for added in (bias_N, residual_RN):
        y_RN = y_RN if added is None else y_RN + added
    return y_RN.to(dtype)


def default_plan(num_rows: int, target: Target) -> GemmPlan:
    """Returns the blocks of the kernel; not measured."""
    if num_rows <= 64:
        return GemmPlan("fused", 64, 64, BLOCK, group_m=8, num_warps=4, num_stages=4)
    if target.capability == 90:
        return GemmPlan("fused", 128, 128, BLOCK, group_m=8, num_warps=8, num_stages=4)
    return GemmPlan("fused", 128, 64, BLOCK, group_m=8, num_warps=8, num_stages=3)  # with 128 columns some spill


def torch_can(x: Tensor, weight_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether `torch._scaled_mm` computes this product: its limits are those of the row-wise scaling.

    Operands must have no gaps: on sm_89 torch takes any stride and multiplies as if it were K.
    """
    n, k = weight_NK.shape
    whole = n % 16 == 0 and k % 16 == 0 and x.is_contiguous() and weight_NK.is_contiguous()
    return x.is_cuda and len(x) > 0 and whole and scale_NG.shape[1] == 1 and dtype == torch.bfloat16


def plan_gemm_fp8(
    numbers_RK: Tensor,
    scale_R: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    *,
    dtype: torch.dtype,
    residual_RN: Tensor | None = None,
    plan: GemmPlan | None = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the kernel, which the launcher takes where torch has no such product."""
    (num_rows, k), n = numbers_RK.shape, len(weight_NK)
    plan = plan or default_plan(num_rows, target)
    require(plan.block_k <= BLOCK, "plan", f"block_k of at most {BLOCK}", plan.block_k)
    optional = {"bias": bias_N, "residual": residual_RN}
    args: dict[str, Any] = {
        "x": numbers_RK,
        "x_scale": scale_R,
        "weight": weight_NK,
        "scale": scale_NG,
        "out": out,
        "num_rows": num_rows,
        "N": n,
        "K": k,
        "x_stride": numbers_RK.stride(0),
        "weight_stride": weight_NK.stride(0),
        "scale_stride": scale_NG.stride(0),
        "residual_stride": 0 if residual_RN is None else residual_RN.stride(0),
        "out_stride": out.stride(0),
        **{name: tensor for name, tensor in optional.items() if tensor is not None},
    }
    constexprs: dict[str, Any] = {
        "BLOCKS": scale_NG.shape[1] > 1,
        "EVEN_K": k % plan.block_k == 0,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": plan.group_m,
        **{name: None for name, tensor in optional.items() if tensor is None},
    }
    grid = cdiv(num_rows, plan.block_m) * cdiv(n, plan.block_n)
    how: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "matrix_units": True}
    return (Launch(gemm_fp8_kernel, (grid, 1, 1), args, constexprs, **how),)


def gemm_fp8(
    numbers_RK: Tensor,
    scale_R: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    *,
    dtype: torch.dtype,
    residual_RN: Tensor | None = None,
    out: Tensor | None = None,
    plan: GemmPlan | None = None,
) -> Tensor:
    """Computes `gemm_fp8_reference`: [R, N] in `dtype`, which is that of bias and residual.

    Numbers are float8_e4m3fn, scales float32: [R], and [N, 1] or [N, ceil(K / 128)]. Rows may lie at any stride. `out`
    may be the residual. A `plan` is the kernel's blocks, and takes the kernel in any case.
    Raises ValueError naming the argument that does not fit, or the device if it has no FP8.
    """
    device = numbers_RK.device
    require_one_of("dtype", dtype, SPEC.tolerances)
    require(weight_NK.ndim == 2 and min(weight_NK.shape) > 0, "weight_NK", "shape (N, K)", tuple(weight_NK.shape))
    require(numbers_RK.ndim == 2, "numbers_RK", "two dimensions", tuple(numbers_RK.shape))
    rows, (n, k) = len(numbers_RK), weight_NK.shape
    require_tensor("numbers_RK", numbers_RK, (rows, k), FP8, device)
    require_tensor("weight_NK", weight_NK, (n, k), FP8, device)
    require_tensor("scale_R", scale_R, (rows,), torch.float32, device)
    require_scales("scale_NG", scale_NG, n, k, device)
    if bias_N is not None:
        require_tensor("bias_N", bias_N, (n,), dtype, device)
    if residual_RN is not None:
        require_tensor("residual_RN", residual_RN, (rows, n), dtype, device)
    require_fp8(device)
    if out is not None:
        require_tensor("out", out, (rows, n), dtype, device)
        if residual_RN is not None and out.data_ptr() == residual_RN.data_ptr():
            whole = out.stride() == residual_RN.stride()
            require(whole, "out", "all of the residual or memory of its own", "a part of it")
    if plan is None and torch_can(numbers_RK, weight_NK, scale_NG, dtype):
        return _torch_product(numbers_RK, scale_R, weight_NK, scale_NG, bias_N, dtype, residual_RN, out)
    if out is None:
        out = torch.empty(rows, n, dtype=dtype, device=device)
    target = target_of(device)
    operands = numbers_RK, scale_R, weight_NK, scale_NG, bias_N
    run(plan_gemm_fp8(*operands, dtype=dtype, residual_RN=residual_RN, plan=plan, out=out, target=target))
    return out


def _torch_product(
    numbers_RK: Tensor,
    scale_R: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    residual_RN: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Multiplies without fast accumulation, which would leave sums on matrix units; then adds the residual."""
    y_RN = torch._scaled_mm(
        numbers_RK,
        weight_NK.t(),
        scale_a=scale_R[:, None],
        scale_b=scale_NG.contiguous().view(1, -1),
        bias=bias_N,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    if residual_RN is not None:
        return torch.add(residual_RN, y_RN, out=y_RN if out is None else out)
    return y_RN if out is None else out.copy_(y_RN)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws numbers, in rows with `padding` more columns; `blocks`: the weight has a scale for every 128 columns."""
    rows, n, k, padding = case["R"], case["N"], case["K"], case.sizes.get("padding", 0)
    numbers = torch.randn(rows, k + padding, dtype=torch.float32, device=device).mul_(100).clamp_(-448, 448)
    weight, scale = draw_numbers(case, n, k, device, padding)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    return {
        "numbers_RK": numbers.to(FP8)[:, :k],
        "scale_R": (0.5 + torch.rand(rows, dtype=torch.float32, device=device)) / 100,
        "weight_NK": weight,
        "scale_NG": scale,
        "bias_N": drawn(n) if case.sizes.get("bias") else None,
        "dtype": dtype,
        "residual_RN": drawn(rows, n + padding)[:, :n] if case.sizes.get("residual") else None,
        "plan": SMALL if case.sizes.get("small") else None,
    }


SMALL = GemmPlan("fused", 32, 32, 32, group_m=2, num_warps=4, num_stages=2)  # several blocks in each dimension
_KIND: dict[str, Any] = {"kind": "float8", **IN_FP8}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    rows, n, k = case["R"], case["N"], case["K"]
    scales = 4 * (rows + n * (cdiv(k, BLOCK) if case.sizes.get("blocks") else 1))
    stored = dtype.itemsize * rows * n * (1 + bool(case.sizes.get("residual")))
    return Cost(bytes=(rows + n) * k + scales + stored, flops=2 * rows * n * k)


def _test_cases() -> Iterator[Case]:
    def case(name: str, rows: int, n: int, k: int, **more: object) -> Case:
        return Case(name, {"R": rows, "N": n, "K": k, **_KIND, **more})

    for blocks in (False, True):
        name = "blocks" if blocks else "rows"
        yield case(f"{name}_plain", 35, 40, 160, blocks=blocks)
        yield case(f"{name}_bias", 33, 70, 300, blocks=blocks, bias=True, small=True)
        yield case(f"{name}_residual", 67, 33, 129, blocks=blocks, residual=True, small=True)
        yield case(f"{name}_strided", 17, 48, 256, blocks=blocks, bias=True, residual=True, padding=16)
        yield case(f"{name}_many_rows", 150, 40, 256, blocks=blocks)
        yield case(f"{name}_no_rows", 0, 16, 128, blocks=blocks)
        yield case(f"{name}_one_by_one", 1, 1, 1, blocks=blocks)


def _model_cases() -> Iterator[Case]:
    products: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("1b_qkv", 1152, 896, {"bias": True}),
        ("1b_down", 896, 4864, {"residual": True}),
        ("8b_qkv", 4608, 3584, {"bias": True}),
        ("8b_gate_up", 2 * 18944, 3584, {}),
        ("8b_down", 3584, 18944, {"residual": True}),
        ("78b_down", 8192, 29568, {"residual": True}),
    )
    for name, n, k, more in products:
        for rows in (64, 3392):
            sizes = {"R": rows, "N": n, "K": k, **_KIND, **more}
            yield Case(f"{name}_{rows}", sizes)
            if name in ("8b_gate_up", "8b_down"):
                yield Case(f"{name}_{rows}_blocks", {**sizes, "blocks": True})


SPEC = KernelSpec(
    name="gemm_fp8",
    used_by="every decoder with FP8 weights whose inputs may be rounded: products of more than 16 rows",
    reference=gemm_fp8_reference,
    plan=plan_gemm_fp8,
    launcher=gemm_fp8,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 300 products in another order"),
        torch.float16: Tolerance(1.25e-3, 1e-5, 5e-4, "another order of the sum rounds to the next number of 11 bits"),
        torch.bfloat16: Tolerance(
            1e-2, 1e-5, 4e-3, "to the next number of 8 bits; torch's product and residual round twice"
        ),
    },
)
