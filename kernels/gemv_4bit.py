"""Products of the few rows of a decode step with a weight of 4-bit numbers, and what comes before and after them.

    y = act(norm(x) W^T + b) + residual                W[n, k] = (number[n, k] - zero[n, group of k]) * scale[n, group]

All is as in gemv, but the weight is read as it is stored, in words (`_int4.py`), and is never rounded to x's dtype.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._gemv_4bit_body import gemv_4bit_kernel
from internvl_rt.kernels._gemv_plan import (
    EXCHANGE_CHUNKS,
    MAX_SPLIT_PROGRAMS,
    MAX_SPLITS,
    GemvPlan,
    GemvWorkspace,
)
from internvl_rt.kernels._int4 import CHUNK, PLANE
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels.dequantise import GROUPS, dequantise_reference
from internvl_rt.kernels.gemv import (
    MODELS,
    Activation,
    gemv_reference,
    plan_outputs,
    plan_product,
    require_rows,
    require_vectors,
    result_of,
)
from internvl_rt.kernels.gemv import SPEC as GEMV

TOLERANCES = {
    torch.float32: Tolerance(5e-5, 1e-4, 1e-5, "sums with an offset of 128, which costs 5 of 24 bits"),
    # As of gemv. The weight is not rounded here, which the float64 reference does not do either.
    torch.float16: Tolerance(1e-3, 4e-3, 6.5e-4, "operands and result are each rounded to 11 bits"),
    torch.bfloat16: Tolerance(8e-3, 3.2e-2, 5.5e-3, "operands and result are each rounded to 8 bits"),
}
COLUMNS = 1024  # that a warp loads at once on the CUDA cores, 16 bytes of words a thread
IDLE_SHARE = 0.25  # of what a program loads there, at most, may lie beyond K
WARPS = 4  # of a program on matrix units
RESIDENT = 4  # such programs that the registers of a multiprocessor hold, as compiled for 32 rows of the weight


def gemv_4bit_reference(
    x_RK: Tensor,
    words_NW: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    group: int,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,  # does not change the result
    early_trigger: bool = False,  # nor does this
) -> Tensor:
    """Computes `gemv_reference` with the weight in x's dtype."""
    weight_NK = dequantise_reference(words_NW, scale_NG, zero_NG, x_RK.shape[1], group=group, dtype=x_RK.dtype)
    return gemv_reference(x_RK, weight_NK, bias_N, norm_weight_K, eps, activation=activation, residual_RN=residual_RN)


@lru_cache(1024)
def choose_gemv_4bit_plan(
    rows: int, n: int, k: int, dtype: torch.dtype, target: Target, *, normed: bool = False
) -> GemvPlan:
    """Returns the plan for x [rows, k] and a weight [n, k]; `normed`: with RMSNorm.

    Matrix units are best for one row, too: numbers become operands of 16 bits by an instruction and a half each, where
    the CUDA cores take three, and more for a sum in float32. There the plan is the same for 1 to 16 rows, so a row has
    the same bits whatever the others are. Not measured. Float32, and float16 with a norm (`plan_product` says why), are
    no such operands: one or two rows of them are multiplied on the CUDA cores, by as many warps as K gives work to.

    A program on matrix units takes 32 rows of the weight, or 16 of a small one. K is split into the number of parts
    with which the last program ends first, as in `choose_gemv_plan`.
    """
    if rows <= 2 and (dtype == torch.float32 or (normed and dtype == torch.float16)):
        loads = cdiv(k, COLUMNS)
        num_warps = next(warps for warps in (8, 4, 2, 1) if cdiv(loads, warps) * warps * (1 - IDLE_SHARE) <= loads)
        return GemvPlan(4, COLUMNS * num_warps, num_warps)
    chunks = cdiv(k, CHUNK * WARPS)
    block_n = 32 if cdiv(n, 32) * chunks >= target.num_sms else 16
    tiles = cdiv(n, block_n)

    def chunks_in_turn(splits: int) -> int:
        rounds = cdiv(tiles * splits, RESIDENT * target.num_sms)
        return rounds * (cdiv(chunks, splits) + (EXCHANGE_CHUNKS if splits > 1 else 0))

    most = max(1, min(chunks, MAX_SPLIT_PROGRAMS * target.num_sms // tiles, MAX_SPLITS))
    per_split = cdiv(chunks, min(range(1, most + 1), key=chunks_in_turn))
    return GemvPlan(block_n, CHUNK * WARPS, WARPS, cdiv(chunks, per_split), matrix=True)


def plan_gemv_4bit(
    x_RK: Tensor,
    words_NW: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    group: int,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    (rows, k), n = x_RK.shape, len(words_NW)
    plan = plan or choose_gemv_4bit_plan(rows, n, k, x_RK.dtype, target, normed=norm_weight_K is not None)
    how = (cdiv(n, plan.block_n), plan, workspace, programmatic_launch, early_trigger, target)
    common = plan_product(x_RK, words_NW, norm_weight_K, eps, *how)
    for name in ("STAGES", "PREFETCH", "AHEAD"):
        del common["constexprs"][name]
    plan_outputs(common, bias_N, activation, residual_RN, out)
    common["args" if zero_NG is not None else "constexprs"]["zero"] = zero_NG
    common["args"] |= {"scale": scale_NG, "G": scale_NG.shape[1]}
    common["constexprs"] |= {
        "GROUP": group,
        # The interpreter has no inline assembly; its plain operations give the same numbers.
        "ROWS": rows if not plan.matrix else 8 if rows <= 8 else 16,
        "ASM": not target.interpreted,
    }
    most = _max_registers(common["constexprs"], x_RK.dtype, target)
    return (Launch(gemv_4bit_kernel, **common, max_registers=most),)


def _max_registers(constexprs: dict[str, Any], dtype: torch.dtype, target: Target) -> int | None:
    """Returns the most of a thread with which nothing spills and RESIDENT programs run at once, or 3 with 16 rows.

    None: what the compiler takes, where it would not do with as few.
    """
    if dtype == torch.float32 or constexprs["WIDE"] or not constexprs["MATRIX"]:
        return None
    if constexprs["GROUP"] == 32:
        return 255  # with less the compiler spills a little, to make room for a third program
    if constexprs["ROWS"] == 16:
        has_zeros = "zero" not in constexprs  # which is None there
        return None if has_zeros and target.capability in (100, 103) else 168
    return 128


def gemv_4bit(
    x_RK: Tensor,
    words_NW: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    group: int,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    out: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
) -> Tensor:
    """Computes `gemv_4bit_reference` for at most MAX_ROWS rows at any stride; `gemv` says the rest.

    Every call gives the same bits. In 16 bits, but for float16 with a norm, a row also gets the same bits whatever the
    other rows are.
    words_NW: int32 [N, 16 ceil(K / 128)], as `pack_int4` makes them; scale_NG: [N, ceil(K / group)] in any dtype;
    zero_NG: uint8, or None, which is 8 everywhere; group: 32, 64 or 128. All else is of x's dtype.
    Raises ValueError naming the argument that does not fit.
    """
    dtype, device = x_RK.dtype, x_RK.device
    require_rows("x_RK", x_RK, plan)
    rows, k = x_RK.shape
    require(k > 0, "x_RK", "at least 1 column", k)
    require_tensor("x_RK", x_RK, (rows, k), dtype, device)
    require(words_NW.ndim == 2 and len(words_NW) > 0, "words_NW", "two dimensions, none 0", tuple(words_NW.shape))
    n = len(words_NW)
    require_tensor("words_NW", words_NW, (n, PLANE * cdiv(k, CHUNK)), torch.int32, device)
    last = (n - 1) * words_NW.stride(0)
    require(
        last < 2**31 - words_NW.shape[1],
        "words_NW",
        "places of words that 32 bits can tell",
        f"{last} before the last row",
    )
    require_one_of("group", group, GROUPS)
    require_one_of("scale_NG", scale_NG.dtype, TOLERANCES)
    require_tensor("scale_NG", scale_NG, (n, cdiv(k, group)), scale_NG.dtype, device)
    require(scale_NG.is_contiguous(), "scale_NG", "a contiguous tensor", f"strides {scale_NG.stride()}")
    if zero_NG is not None:
        require_tensor("zero_NG", zero_NG, tuple(scale_NG.shape), torch.uint8, device)
        require(zero_NG.is_contiguous(), "zero_NG", "a contiguous tensor", f"strides {zero_NG.stride()}")
    require_vectors(x_RK, ("bias_N", bias_N), n, ("norm_weight_K", norm_weight_K), k)
    if plan is not None and plan.matrix:
        fits = plan.num_stages == 0 and plan.block_n >= 16 and plan.block_k == CHUNK * plan.num_warps
        require(fits, "plan", f"no stages, block_n from 16 on, block_k {CHUNK} a warp", plan)
    elif plan is not None:
        require(plan.block_k >= CHUNK, "plan", f"block_k from {CHUNK} on", plan)
    out = result_of(x_RK, n, activation, residual_RN, out)
    run(
        plan_gemv_4bit(
            x_RK,
            words_NW,
            scale_NG,
            zero_NG,
            bias_N,
            norm_weight_K,
            eps,
            group=group,
            activation=activation,
            residual_RN=residual_RN,
            plan=plan,
            workspace=workspace,
            programmatic_launch=programmatic_launch,
            early_trigger=early_trigger,
            out=out,
            target=target_of(device),
        )
    )
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws what gemv is tested with, and in the place of its weight all words there are, with scales of any dtype
    (`scale`) such that elements are about K^-1/2.
    """
    inputs = GEMV.make_inputs(case, dtype, device)
    n, k, group = case["N"], case["K"], case.sizes.get("group", 128)
    del inputs["weight_NK"]
    shape = n, cdiv(k, group)
    scale = (torch.rand(shape, device=device) + 0.5) * (k**-0.5 / 7)
    return {
        **inputs,
        "words_NW": torch.randint(-(2**31), 2**31, (n, PLANE * cdiv(k, CHUNK)), device=device).to(torch.int32),
        "scale_NG": scale.to(case.sizes.get("scale", dtype)),
        "zero_NG": torch.randint(0, 16, shape, device=device).to(torch.uint8) if case.sizes.get("zero") else None,
        "group": group,
        "plan": TEST_PLANS.get(case.sizes.get("plan", "")),
    }


TEST_PLANS = {  # so small that a small case has several chunks, blocks and splits
    "rows": GemvPlan(4, 128, 1),
    "split_rows": GemvPlan(8, 128, 1, split_k=2),
    "matrix": GemvPlan(16, 256, 2, matrix=True),
    "split": GemvPlan(16, 128, 1, split_k=3, matrix=True),
}
_NORM: dict[str, Any] = {"norm": True}
_SWIGLU: dict[str, Any] = {"norm": True, "activation": "swiglu"}
_RESIDUAL: dict[str, Any] = {"residual": True}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    dense, n, k = GEMV.cost(case, dtype), case["N"], case["K"]
    groups = n * cdiv(k, case.sizes.get("group", 128))
    scales = groups * (case.sizes.get("scale", dtype).itemsize + bool(case.sizes.get("zero")))
    words = 4 * PLANE * cdiv(k, CHUNK) * n
    return replace(dense, bytes=dense.bytes - dtype.itemsize * n * k + words + scales)


def _test_cases() -> Iterator[Case]:
    def case(name: str, rows: int, n: int, k: int, **more: object) -> Case:
        return Case(name, {"R": rows, "N": n, "K": k, **more})

    for rows in (0, 1, 2, 3, 5, 16):
        yield case(f"int4_rows_{rows}", rows, 40, 96, bias=True, group=32, zero=True, **_NORM)
        yield case(f"int4_swiglu_{rows}", rows, 48, 128, **_SWIGLU)
        yield case(f"int4_residual_{rows}", rows, 24, 160, group=64, **_RESIDUAL)
    for plan, rows in (("rows", 1), ("rows", 2), ("split_rows", 2), ("matrix", 3), ("matrix", 16), ("split", 5)):
        for group in GROUPS:
            yield case(f"{plan}_{rows}_group_{group}", rows, 33, 300, plan=plan, group=group)
            more: dict[str, Any] = {"group": group, "zero": True, "padding": 3 + 5 * (group == 32)}
            yield case(
                f"{plan}_{rows}_zero_{group}", rows, 34, 400, plan=plan, bias=True, **more, **_SWIGLU, **_RESIDUAL
            )
        yield case(f"{plan}_{rows}_huge", rows, 16, 128, plan=plan, factor=1e4, **_NORM)  # squares beyond float16
        # The mean square is about as small as eps.
        yield case(f"{plan}_{rows}_tiny", rows, 16, 128, plan=plan, factor=1e-3, zero=True, **_NORM)
    for rows in (1, 3):
        yield case(f"one_by_one_{rows}", rows, 1, 1, **_NORM)
        yield case(f"wide_{rows}", rows, 20, 1160, zero=True, scale=torch.float32, **_NORM)
        yield case(f"half_scale_{rows}", rows, 16, 264, scale=torch.float16, padding=8, **_RESIDUAL)
        yield case(f"zeros_{rows}", rows, 16, 128, factor=0.0, zero=True, **_NORM)
        yield case(f"early_{rows}", rows, 16, 512, early=True, bias=True, **_SWIGLU)


def _model_cases() -> Iterator[Case]:
    for model in ("1b", "8b", "78b"):
        width, mlp, _, _, _, _ = MODELS[model]
        for rows in (1, 2, 16):
            for name, zero in (("", {}), ("_zero", {"zero": True})):
                yield Case(f"{model}_o_{rows}{name}", {"R": rows, "N": width, "K": width, **zero, **_RESIDUAL})
                yield Case(f"{model}_gate_up_{rows}{name}", {"R": rows, "N": 2 * mlp, "K": width, **zero, **_SWIGLU})
                yield Case(f"{model}_down_{rows}{name}", {"R": rows, "N": width, "K": mlp, **zero, **_RESIDUAL})
    for rows in (1, 16):
        yield Case(
            f"8b_gate_up_{rows}_group_32", {"R": rows, "N": 37888, "K": 3584, "group": 32, "zero": True, **_SWIGLU}
        )


SPEC = KernelSpec(
    name="gemv_4bit",
    used_by="every decoder with 4-bit weights: products of a step of up to 16 rows",
    reference=gemv_4bit_reference,
    plan=plan_gemv_4bit,
    launcher=gemv_4bit,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances=TOLERANCES,
)
