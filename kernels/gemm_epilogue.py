"""A matrix product and what follows it: bias, exact GELU, LayerScale and residual, or rows written to given places.

linear:           y = x W^T + b                       with rows: y[r] becomes row rows[r] of a larger tensor
linear_gelu:      y = gelu(x W^T + b)                 gelu(t) = t * Phi(t), the erf form
linear_residual:  y = r + s * (x W^T + b)             s is LayerScale (ViT) or 1 (decoder)

One launcher has three implementations; the measured tables of `kernels/_plans.py` choose between them. "cublas" is a
torch product with the bias, and then one element-wise kernel if anything remains to be done. "cublas_twice" is the same
but for a few rows that would take a row of blocks for themselves: they are a product of their own. "fused" is one
kernel that keeps the sums in registers until they are results.

A vision tower's rows are I * 1024 patch rows, which fill blocks of 128 rows exactly, and I class rows, which take one
more row of blocks (for I <= 128): where the others fill all multiprocessors, that may take as long again. If each
tile's class row followed its patch rows, each of the I tiles would need nine rows of blocks, the ninth for one row.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
from internvl_rt.kernels._gemm_epilogue_body import epilogue_kernel, fused_kernel
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._plans import CUBLAS_TWICE, EPILOGUES, GemmPlan, Plan, resolve_plan

Activation = Literal["none", "gelu"]

BLOCK_ROWS, FEW_ROWS = 128, 16  # of "cublas_twice": so many rows make a block, and so many are a product of their own


def linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return F.linear(x, weight_NK, bias_N)


def linear_gelu_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight_NK, bias_N))


def linear_residual_reference(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, residual: Tensor, scale_N: Tensor | None
) -> Tensor:
    y = F.linear(x, weight_NK, bias_N)
    return residual + y if scale_N is None else torch.addcmul(residual, y, scale_N)


def gemm_epilogue_reference(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    scale_N: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    plan: Plan = None,  # does not change the result
) -> Tensor:
    """Computes a product. With `rows` [R], its row r is written to row rows[r] of `out`; without it, to R new rows."""
    if residual is not None:
        return linear_residual_reference(x, weight_NK, bias_N, residual, scale_N)
    if activation == "gelu":
        return linear_gelu_reference(x, weight_NK, bias_N)
    y = linear_reference(x, weight_NK, bias_N)
    if rows is None:
        return y
    if out is None:
        out = torch.zeros_like(y)
    elsewhere = len(out)  # one more row, which takes the products of rows that point outside
    padded = torch.cat((out, out.new_empty(1, out.shape[1])))
    padded[torch.where((rows >= 0) & (rows < elsewhere), rows, elsewhere)] = y
    return out.copy_(padded[:elsewhere])


def plan_gemm_epilogue(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    scale_N: Tensor | None = None,
    rows: Tensor | None = None,
    plan: Plan = None,
    product: Tensor | None = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the fused kernel, or the kernel after a torch product, which is in `product` [R, N] (None: in `out`)."""
    x_RK, out_RN = rows_of("x", x), rows_of("out", out)
    residual_RN = None if residual is None else rows_of("residual", residual)
    num_rows, (n, k) = len(x_RK), weight_NK.shape
    chosen = resolve_plan(plan, num_rows, n, k, _epilogue(activation, residual, rows), x.dtype, target)
    optional = {"residual": residual_RN, "scale": scale_N, "rows": rows}
    args: dict[str, Any] = {
        "out": out_RN,
        "num_rows": num_rows,
        "num_out_rows": len(out_RN),
        "N": n,
        "residual_stride": 0 if residual_RN is None else residual_RN.stride(0),
        "out_stride": out_RN.stride(0),
    }
    constexprs: dict[str, Any] = {"GELU": activation == "gelu"}
    if chosen.kind != "fused":
        if activation == "none" and rows is None and (residual is None or _residual_in_product(bias_N, scale_N)):
            return ()
        product_RN = out_RN if product is None else product
        args |= {"product": product_RN, "product_stride": product_RN.stride(0)}
        block_n = min(1024, next_power_of_2(n))
        constexprs |= {"BLOCK_M": 4096 // block_n, "BLOCK_N": block_n}  # 16 elements a thread
        launch = partial(Launch, epilogue_kernel, num_warps=8)
        grid = cdiv(num_rows, constexprs["BLOCK_M"]) * cdiv(n, block_n)
    else:
        use_tma = chosen.use_tma and all(tma_can_read(matrix, target) for matrix in (x_RK, weight_NK))
        optional["bias"] = bias_N
        args |= {"x": x_RK, "weight": weight_NK, "K": k}
        args |= {"x_stride": x_RK.stride(0), "weight_stride": weight_NK.stride(0)}
        constexprs |= {"EVEN_K": k % chosen.block_k == 0, "USE_TMA": use_tma, "GROUP_M": chosen.group_m}
        constexprs |= {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        constexprs["PRECISION"] = "ieee" if x.dtype == torch.float32 else "tf32"  # 16 bits have one precision only
        launch = partial(
            Launch,
            fused_kernel,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            descriptors=use_tma,
            matrix_units=True,
            wide_loads=not use_tma,  # the copy engine needs no load instruction
        )
        grid = cdiv(num_rows, chosen.block_m) * cdiv(n, chosen.block_n)
        if use_tma:  # a program makes its descriptors once, so there are no more programs than run at once
            resident = min(2, max(1, target.shared_bytes // chosen.shared_bytes(x.itemsize)))
            grid = min(grid, resident * target.num_sms)
    args |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    constexprs |= {name: None for name, tensor in optional.items() if tensor is None}
    return (launch(grid=(grid, 1, 1), args=args, constexprs=constexprs),)


def _epilogue(activation: Activation, residual: Tensor | None, rows: Tensor | None) -> str:
    """Returns the name of this epilogue in the tables."""
    return "rows" if rows is not None else activation if residual is None else "residual"


def _residual_in_product(bias_N: Tensor | None, scale_N: Tensor | None) -> bool:
    """Returns whether only the residual is added to x W^T: torch's product adds it itself, before it rounds."""
    return bias_N is None and scale_N is None


def tma_can_read(matrix: Tensor, target: Target) -> bool:
    """Returns whether the copy engine can read blocks of the matrix: `target` has one, and rows begin at 16 bytes."""
    stride_bytes = matrix.stride(0) * matrix.itemsize
    aligned = matrix.data_ptr() % 16 == 0 and stride_bytes % 16 == 0
    return target.capability >= 90 and aligned and matrix.stride(0) >= matrix.shape[1]


def gemm_epilogue(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    scale_N: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    plan: Plan = None,
) -> Tensor:
    """Computes `gemm_epilogue_reference`, for `x` [..., K] with rows at one stride; all floating tensors of one dtype.

    `residual` has the shape of the result, and `out` may be the same tensor. `rows` [R] (int64, distinct) needs `out`
    [T, N]; rows outside 0 ... T - 1 are skipped, because only the device knows them. `out` must not be one of the other
    arguments. Raises ValueError naming the argument that does not fit.
    """
    require_one_of("x", x.dtype, SPEC.tolerances)
    require(weight_NK.ndim == 2 and min(weight_NK.shape) > 0, "weight_NK", "shape (N, K)", tuple(weight_NK.shape))
    (n, k), device = weight_NK.shape, x.device
    require_tensor("x", x, (*x.shape[:-1], k), x.dtype, device)
    require_tensor("weight_NK", weight_NK, (n, k), x.dtype, device)
    for name, vector in (("bias_N", bias_N), ("scale_N", scale_N)):
        if vector is not None:
            require_tensor(name, vector, (n,), x.dtype, device)
    require(activation in ("none", "gelu"), "activation", "'none' or 'gelu'", repr(activation))
    require(scale_N is None or residual is not None, "scale_N", "None without a residual", "a scale")
    shape = (*x.shape[:-1], n)
    if residual is not None:
        require(activation == "none", "activation", "'none' with a residual", repr(activation))
        require_tensor("residual", residual, shape, x.dtype, device)
    if rows is not None:
        require(activation == "none" and residual is None, "rows", "None with an activation or a residual", "rows")
        require_tensor("rows", rows, (x.numel() // k,), torch.int64, device)
        if out is None:
            raise ValueError("out: expected a tensor [T, N] that the rows are written to, got None")
        shape = (out.numel() // n, n)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=device)
    require_tensor("out", out, shape, x.dtype, device)
    require(out.numel() == 0 or out.data_ptr() != x.data_ptr(), "out", "memory of its own", "x")
    if residual is not None and out.data_ptr() == residual.data_ptr():
        require(out.stride() == residual.stride(), "out", "all of the residual or memory of its own", "a part of it")

    target = target_of(device)
    chosen = resolve_plan(plan, x.numel() // k, n, k, _epilogue(activation, residual, rows), x.dtype, target)
    product = None
    if chosen.kind != "fused":
        matrices = rows_of("x", x), weight_NK, bias_N, residual, scale_N, rows, rows_of("out", out)
        product = _torch_product(*matrices, twice=chosen == CUBLAS_TWICE)
    epilogue: dict[str, Any] = {"activation": activation, "residual": residual, "scale_N": scale_N, "rows": rows}
    run(plan_gemm_epilogue(x, weight_NK, bias_N, **epilogue, plan=chosen, product=product, out=out, target=target))
    return out


def _torch_product(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    residual: Tensor | None,
    scale_N: Tensor | None,
    rows: Tensor | None,
    out_RN: Tensor,
    *,
    twice: bool,
) -> Tensor:
    """Computes x W^T + b for the epilogue kernel: in `out_RN`, or in new memory if the epilogue still reads that."""
    added, product_RN = bias_N, out_RN
    if residual is not None and _residual_in_product(bias_N, scale_N):
        added = rows_of("residual", residual)
    elif rows is not None or (
        residual is not None and residual.untyped_storage().data_ptr() == out_RN.untyped_storage().data_ptr()
    ):
        product_RN = x_RK.new_empty(len(x_RK), len(weight_NK))
    whole = len(x_RK) // BLOCK_ROWS * BLOCK_ROWS
    if twice and 0 < whole < len(x_RK) <= whole + FEW_ROWS:
        for part in (slice(whole), slice(whole, None)):
            added_part = added if added is None or added.ndim == 1 else added[part]
            _multiply(x_RK[part], weight_NK, added_part, product_RN[part])
    else:
        _multiply(x_RK, weight_NK, added, product_RN)
    return product_RN


def _multiply(x_RK: Tensor, weight_NK: Tensor, added: Tensor | None, out_RN: Tensor) -> None:
    """Computes x W^T, plus a bias or a matrix, which may be `out_RN`."""
    if added is None:
        torch.mm(x_RK, weight_NK.t(), out=out_RN)
    elif added.data_ptr() == out_RN.data_ptr():  # addmm would copy it first
        out_RN.addmm_(x_RK, weight_NK.t())
    else:
        torch.addmm(added, x_RK, weight_NK.t(), out=out_RN)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Cuts x, weight and residual from tensors with `padding` more columns of NaN; `fill` scales x in 16 bits.

    In float32 it is at most 10: small results of large sums would depend on the order of summation.
    """
    num_rows, n, k = case["R"], case["N"], case["K"]
    epilogue, padding = case["epilogue"], case.sizes.get("padding", 0)
    fill = case.sizes.get("fill", 1.0)
    implementation = case.sizes.get("implementation")  # a key of _IMPLEMENTATIONS, or the name of a plan

    def matrix(height: int, width: int, factor: float = 1.0) -> Tensor:
        values = torch.full((height, width + padding), torch.nan, dtype=dtype, device=device)
        values[:, :width] = factor * torch.randn(height, width, dtype=torch.float32, device=device)
        return values[:, :width]

    def vector() -> Tensor:
        return torch.randn(n, dtype=torch.float32, device=device).to(dtype)

    return {
        "x": matrix(num_rows, k, fill if dtype.itemsize == 2 else min(fill, 10.0)),
        "weight_NK": matrix(n, k, k**-0.5),
        "bias_N": vector() if case.sizes.get("bias", True) else None,
        "activation": "gelu" if epilogue == "gelu" else "none",
        "residual": matrix(num_rows, n) if epilogue == "residual" else None,
        "scale_N": vector() if epilogue == "residual" and case.sizes.get("scale", True) else None,
        "rows": torch.randperm(num_rows, device=device) if epilogue == "rows" else None,
        "plan": _IMPLEMENTATIONS.get(implementation, implementation) if implementation else None,
    }


# Blocks so small that a small case has several in each dimension, and a last group with fewer rows of blocks.
_SMALL = GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)
_IMPLEMENTATIONS: dict[str, Plan] = {
    "cublas": "cublas",
    "twice": "cublas_twice",
    "fused": _SMALL,
    "tma": replace(_SMALL, use_tma=True),
    "pieces": replace(_SMALL, block_n=256),  # the epilogue works on four groups of columns
}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    num_rows, n, k = case["R"], case["N"], case["K"]
    matrices = num_rows * k + n * k + num_rows * n * (1 + (case["epilogue"] == "residual"))
    return Cost(bytes=dtype.itemsize * matrices, flops=2 * num_rows * n * k)


def _model_cases() -> Iterator[Case]:
    layers: tuple[tuple[str, int, int, int, str, dict[str, bool]], ...] = (  # name, rows a tile, N, K, epilogue
        ("300m_qkv", 1025, 3072, 1024, "none", {}),
        ("300m_out", 1025, 1024, 1024, "residual", {}),
        ("300m_fc1", 1025, 4096, 1024, "gelu", {}),
        ("300m_fc2", 1025, 1024, 4096, "residual", {}),
        ("6b_qkv", 1025, 9600, 3200, "none", {"bias": False}),
        ("6b_out", 1025, 3200, 3200, "residual", {}),
        ("6b_fc1", 1025, 12800, 3200, "gelu", {}),
        ("6b_fc2", 1025, 3200, 12800, "residual", {}),
        *((f"projector_{k}_{n}", 256, n, k, "gelu", {}) for n, k in ((896, 4096), (3584, 4096), (8192, 12800))),
        *((f"projector_{n}_rows", 256, n, n, "rows", {}) for n in (896, 3584, 8192)),
        ("decoder_3584_out", 256, 3584, 3584, "residual", {"bias": False, "scale": False}),
    )
    tilings = {  # two layers with the epilogues that need most registers; others, so that every epilogue is there
        **dict.fromkeys(("300m_fc1", "300m_out"), ("wide", "square", "low", "pointers")),
        **dict.fromkeys(("300m_qkv", "projector_896_rows", "decoder_3584_out"), ("square",)),
    }
    for tiles in (1, 13):
        for name, per_tile, n, k, epilogue, further in layers:
            sizes = {"R": tiles * per_tile, "N": n, "K": k, "epilogue": epilogue, **further}
            yield Case(f"{name}_{tiles}_tiles", sizes)  # with the table's plan
            for tiling in tilings.get(name, ()):
                yield Case(f"{name}_{tiles}_tiles_{tiling}", {**sizes, "implementation": tiling})


SPEC = KernelSpec(
    name="gemm_epilogue",
    used_by="every vision tower: its products; every decoder: products of prompts and of more than 16 rows",
    reference=gemm_epilogue_reference,
    plan=plan_gemm_epilogue,
    launcher=gemm_epilogue,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(
            Case(f"{epilogue}_{name}", {"R": 67, "N": 72, "K": 40, "epilogue": epilogue, "implementation": name})
            for name in _IMPLEMENTATIONS
            for epilogue in EPILOGUES
        ),
        *(
            Case(f"{rows}_{n}_{k}_{name}", {"R": rows, "N": n, "K": k, "epilogue": "gelu", "implementation": name})
            for rows, n, k, name in (
                (0, 8, 8, "fused"),
                (0, 8, 8, "cublas"),
                (1, 1, 1, "fused"),
                (9, 1, 1, "cublas"),
                (129, 8, 8, "twice"),
                (144, 40, 8, "twice"),
                (145, 8, 40, "twice"),
                (270, 17, 33, "twice"),
                (1, 40, 48, "tma"),
                (33, 31, 17, "fused"),
                (32, 64, 48, "tma"),
                (3, 1100, 5, "cublas"),
            )
        ),
        *(
            Case(f"{what}_{name}", {"R": 35, "N": 40, "K": 24, "implementation": name, **sizes})
            for name in _IMPLEMENTATIONS
            for what, sizes in (
                ("strided", {"epilogue": "residual", "padding": 8}),
                ("plain_residual", {"epilogue": "residual", "bias": False, "scale": False}),
                ("unscaled_residual", {"epilogue": "residual", "scale": False}),
                ("huge", {"epilogue": "gelu", "bias": False, "fill": 1e3}),
            )
        ),
    ),
    model_cases=tuple(_model_cases()),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 48 products in another order"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "the product is rounded to 11 bits, and the result again"),
        torch.bfloat16: Tolerance(16e-3, 16e-3, 8e-3, "the product is rounded to 8 bits, and the result again"),
    },
)
