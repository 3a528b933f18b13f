"""Dequantise: W[n, k] = number[n, k] * scale[n, group of k], of 8-bit numbers, or of 4-bit ones minus a zero.

The product is computed in float32 and rounded once. Numbers are float8_e4m3fn or int8 [N, K], or words of `_int4.py`,
int32 [N, W]. A GPU below sm_89 has no FP8, so the kernel reads an FP8 number as an integer (`_numbers_8bit.py`); the
4 bits of a small number become the last bits of a large float32, from which that is subtracted.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._int4 import CHUNK, PLANE, unpack_int4
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._numbers_8bit import BLOCK, operand_of
from internvl_rt.kernels._numbers_8bit import KINDS as KINDS_OF_8_BITS

KINDS = {**KINDS_OF_8_BITS, torch.int32: "int4"}
GROUPS = (32, 64, 128)  # columns of 4-bit numbers that share a scale
# Chunks of 128 columns that a program of 4 warps takes. A thread has 32 bytes of 4-bit numbers or of 8-bit ones, and
# stores 16 bytes at a time.
CHUNKS = {"float8": 32, "int8": 32, "int4": 64}


def dequantise_reference(
    numbers: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    num_columns: int,
    *,
    group: int = BLOCK,
    dtype: torch.dtype,
) -> Tensor:
    """Multiplies out float8_e4m3fn or int8 numbers [N, K], or words of `_int4.py`, whose zero is 8 if it is None."""
    if numbers.dtype != torch.int32:
        values_NK = numbers.float()
    else:
        values_NK = unpack_int4(numbers, num_columns).float()
        values_NK -= 8 if zero_NG is None else zero_NG.float().repeat_interleave(group, 1)[:, :num_columns]
    scale_NK = scale_NG.float()
    if scale_NG.shape[1] > 1:
        scale_NK = scale_NK.repeat_interleave(group, 1)[:, :num_columns]
    return (values_NK * scale_NK).to(dtype)


@triton.jit
def _dequantise_kernel(
    numbers, scale, zero, out, N, K, G, numbers_stride, scale_stride, zero_stride, out_stride, CHUNKS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Takes CHUNKS chunks of 128 columns: row by row, and of each row from the first on."""
    in_row = tl.cdiv(K, 128)
    index = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    row = index // in_row
    chunk = index % in_row
    inside = row < N
    row = row.to(tl.int64)
    scale += row * scale_stride
    if KIND == "int4":
        word = tl.arange(0, 16)[None, :]
        w = tl.load(numbers + (row * numbers_stride + chunk * 16)[:, None] + word, mask=inside[:, None], other=0)
        if zero is not None:
            zero += row * zero_stride
        for i in tl.static_range(8):
            group = chunk * (128 // GROUP) + i * 16 // GROUP
            inside &= group < G
            s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
            if zero is not None:
                offset = 128.0 + tl.load(zero + group, mask=inside, other=0).to(tl.float32)
            else:
                offset = tl.full((CHUNKS,), 136.0, tl.float32)
            bits = (w << (16 - 4 * i) if i < 4 else w >> (4 * i - 16)) & 0xF0000
            value = (bits | 0x43000000).to(tl.float32, bitcast=True) - offset[:, None]  # 128 + n in float32
            column = (chunk * 128 + i * 16)[:, None] + word
            y = (value * s[:, None]).to(out.dtype.element_ty)
            tl.store(out + (row * out_stride)[:, None] + column, y, mask=inside[:, None] & (column < K))
    else:
        column = (chunk * 128)[:, None] + tl.arange(0, 128)[None, :]
        mask = inside[:, None] & (column < K)
        bits = tl.load(numbers + (row * numbers_stride)[:, None] + column, mask=mask, other=0)
        s = tl.load(scale + tl.minimum(chunk, G - 1), mask=inside, other=0.0)  # G may be 1
        value = operand_of(bits, KIND, tl.float32)
        if KIND == "float8":
            value *= 1.329227995784916e36  # 2^120, as the exponents' biases differ
        y = (value * s[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row * out_stride)[:, None] + column, y, mask=mask)


def plan_dequantise(
    numbers: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    num_columns: int,
    *,
    group: int = BLOCK,
    dtype: torch.dtype,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    kind, n = KINDS[numbers.dtype], len(numbers)
    args: dict[str, Any] = {
        "numbers": numbers if kind == "int4" else numbers.view(torch.int8),
        "scale": scale_NG,
        "out": out,
        "N": n,
        "K": num_columns,
        "G": scale_NG.shape[1],
        "numbers_stride": numbers.stride(0),
        "scale_stride": scale_NG.stride(0),
        "zero_stride": 0 if zero_NG is None else zero_NG.stride(0),
        "out_stride": out.stride(0),
    }
    constexprs: dict[str, Any] = {"CHUNKS": CHUNKS[kind], "KIND": kind, "GROUP": group}
    if zero_NG is None:
        constexprs["zero"] = None
    else:
        args["zero"] = zero_NG
    chunks = n * cdiv(num_columns, CHUNK)
    return (Launch(_dequantise_kernel, (cdiv(chunks, CHUNKS[kind]), 1, 1), args, constexprs),)


def dequantise(
    numbers: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    num_columns: int,
    *,
    group: int = BLOCK,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `dequantise_reference`, [N, num_columns] in `dtype`, of numbers that are not NaN.

    8-bit numbers have a float32 scale a row, or one for every 128 columns of it. Words have one in any dtype for every
    `group` columns, and a uint8 zero or None. All rows may lie at any stride.
    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("numbers", numbers.dtype, KINDS)
    require_one_of("dtype", dtype, SPEC.tolerances)
    require(numbers.ndim == 2 and min(numbers.shape) > 0, "numbers", "two dimensions, none 0", tuple(numbers.shape))
    require(num_columns > 0, "num_columns", "1 or more", num_columns)
    n, device = len(numbers), numbers.device
    if KINDS[numbers.dtype] == "int4":
        require_one_of("group", group, GROUPS)
        require_one_of("scale_NG", scale_NG.dtype, SPEC.tolerances)
        require_tensor("numbers", numbers, (n, PLANE * cdiv(num_columns, CHUNK)), numbers.dtype, device)
        require_tensor("scale_NG", scale_NG, (n, cdiv(num_columns, group)), scale_NG.dtype, device)
        if zero_NG is not None:
            require_tensor("zero_NG", zero_NG, tuple(scale_NG.shape), torch.uint8, device)
    else:
        require(group == BLOCK, "group", f"{BLOCK} with 8-bit numbers", group)
        require(zero_NG is None, "zero_NG", "None with 8-bit numbers", zero_NG)
        require_tensor("numbers", numbers, (n, num_columns), numbers.dtype, device)
        groups = 1 if scale_NG.shape[-1] == 1 else cdiv(num_columns, BLOCK)
        require_tensor("scale_NG", scale_NG, (n, groups), torch.float32, device)
    if out is None:
        out = torch.empty(n, num_columns, dtype=dtype, device=device)
    require_tensor("out", out, (n, num_columns), dtype, device)
    target = target_of(device)
    run(plan_dequantise(numbers, scale_NG, zero_NG, num_columns, group=group, dtype=dtype, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws all numbers that there are; `padding`: of 8-bit rows; `factor`: of the scales, which are up to 1."""
    n, k, kind, group = case["N"], case["K"], case["kind"], case.sizes.get("group", BLOCK)
    width = PLANE * cdiv(k, CHUNK) if kind == "int4" else k + case.sizes.get("padding", 0)
    groups = 1 if case.sizes.get("groups") == 1 else cdiv(k, group)
    scale = torch.rand(n, groups, device=device) * case.sizes.get("factor", 1.0)
    zero = None
    if kind == "int4":
        numbers = torch.randint(-(2**31), 2**31, (n, width), device=device).to(torch.int32)
        scale = scale.to(case.sizes.get("scale", dtype))
        if case.sizes.get("zero"):
            zero = torch.randint(0, 16, (n, groups), device=device).to(torch.uint8)
    else:
        bits = torch.randint(0, 256, (n, width), device=device)
        if kind == "float8":
            bits = bits - (bits % 128 == 127).to(bits.dtype)  # not NaN
        numbers = bits.to(torch.uint8).view(torch.float8_e4m3fn if kind == "float8" else torch.int8)[:, :k]
    return {
        "numbers": numbers,
        "scale_NG": scale,
        "zero_NG": zero,
        "num_columns": k,
        "group": group,
        "dtype": dtype,
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    inputs = _make_inputs(case, dtype, torch.device("meta"))
    read = sum(value.numel() * value.itemsize for value in inputs.values() if isinstance(value, Tensor))
    return Cost(bytes=read + case["N"] * case["K"] * dtype.itemsize, flops=case["N"] * case["K"])


def _test_cases() -> Iterator[Case]:
    def case(name: str, kind: str, n: int, k: int, **more: object) -> Case:
        return Case(name, {"N": n, "K": k, "kind": kind, **more})

    for kind in ("float8", "int8"):
        for k in (1, 96, 300, 640):
            yield case(f"{kind}_rows_{k}", kind, 5, k, groups=1)
            yield case(f"{kind}_blocks_{k}", kind, 7, k, padding=k % 7)
        yield case(f"{kind}_tiny", kind, 3, 128, factor=1e-8)  # subnormal results in 16 bits
        yield case(f"{kind}_many", kind, 70, 256)  # more than one program
    for group in GROUPS:
        for k in (1, 96, 160, 300, 512):
            yield case(f"int4_group_{group}_{k}", "int4", 5, k, group=group)
            yield case(f"int4_zero_{group}_{k}", "int4", 6, k, group=group, zero=True)
    for name, stored in (("half", torch.float16), ("bfloat", torch.bfloat16), ("float", torch.float32)):
        yield case(f"int4_{name}_scale", "int4", 4, 200, group=64, zero=True, scale=stored)
    yield case("int4_tiny", "int4", 3, 128, factor=1e-7, scale=torch.float32)
    yield case("int4_many", "int4", 70, 384, zero=True)


def _model_cases() -> Iterator[Case]:
    sizes = {"1b": (896, 4864), "8b": (3584, 18944), "78b": (8192, 29568)}  # D, F
    for model, (width, mlp) in sizes.items():
        for name, n, k in (("gate_up", 2 * mlp, width), ("down", width, mlp)):
            shape: dict[str, Any] = {"N": n, "K": k}
            yield Case(f"{model}_{name}_float8", {**shape, "kind": "float8", "groups": 1})
            yield Case(f"{model}_{name}_float8_blocks", {**shape, "kind": "float8"})
            yield Case(f"{model}_{name}_int8", {**shape, "kind": "int8", "groups": 1})
            yield Case(f"{model}_{name}_int4", {**shape, "kind": "int4"})
            yield Case(f"{model}_{name}_int4_zero", {**shape, "kind": "int4", "zero": True})
            yield Case(f"{model}_{name}_int4_zero_32", {**shape, "kind": "int4", "zero": True, "group": 32})


SPEC = KernelSpec(
    name="dequantise",
    used_by="every decoder with 8-bit or 4-bit weights: products of more rows than the kernels for few rows take",
    reference=dequantise_reference,
    plan=plan_dequantise,
    launcher=dequantise,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances={
        dtype: Tolerance(0.0, 0.0, 0.0, "both round the same float32 product once")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    exact=True,
)
