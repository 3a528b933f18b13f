"""The first part of a decode step's layer as one kernel: RMSNorm, the q, k, v product, rotary embedding, KV write.

It replaces `rms_norm`, a product and `qkv_rope_kv` (without norms per head) for at most 16 rows. A program computes
channels j and j + C / 2 of one head, for a few j, and so rotates them without another program's results. The 1B has
only 18 heads, but 72 to 288 such programs. `gemv` and `qkv_rope_kv` hold the formulas and explain the arguments.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_tensor
from internvl_rt.kernels._gemv_plan import GemvPlan, GemvWorkspace, choose_gemv_plan
from internvl_rt.kernels._gemv_qkv_body import gemv_qkv_kernel
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels.gemv import MODELS, TEST_PLANS, plan_product, require_operands
from internvl_rt.kernels.qkv_rope_kv import HEAD_DIMS, qkv_rope_kv_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference


def gemv_qkv_reference(
    x_RD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    num_heads: int,
    *,
    plan: GemvPlan | None = None,  # does not change the result
    early_trigger: bool = False,  # nor does this
) -> Tensor:
    """Returns rotated q [R, H, C]; writes k, v to the cache. Rows of the weight: H q heads | G k heads | G v heads."""
    qkv_RK = F.linear(rms_norm_reference(x_RD, norm_weight_D, eps), weight_KD, bias_K)
    caches = (k_cache_BGPC, v_cache_BGPC)
    return qkv_rope_kv_reference(qkv_RK, None, None, eps, position_T, inv_freq_C, *caches, slot_T)


def plan_gemv_qkv(
    x_RD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    num_heads: int,
    *,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the launch. A block of the weight's rows never contains rows of two heads."""
    num_blocks, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    rows, (n, k) = len(x_RD), weight_KD.shape
    plan = plan or choose_gemv_plan(rows, n, k, x_RD.dtype, target, normed=True)
    plan = replace(plan, block_n=min(plan.block_n, head_dim))
    num_tiles = cdiv(n, plan.block_n)
    how = (num_tiles, plan, workspace, programmatic_launch, early_trigger, target)
    common = plan_product(x_RD, weight_KD, norm_weight_D, eps, *how)
    common["args"] |= {
        "position": position_T,
        "inv_freq": inv_freq_C,
        "k_cache": k_cache_BGPC,
        "v_cache": v_cache_BGPC,
        "slot": slot_T,
        "q": out,
        "k_head": num_heads,
        "v_head": num_heads + num_kv_heads,
        "num_slots": num_blocks * block_size,
        "q_stride": out.stride(0),
        "q_head_stride": out.stride(1),
        "block_stride": k_cache_BGPC.stride(0),
        "group_stride": k_cache_BGPC.stride(1),
        "place_stride": k_cache_BGPC.stride(2),
    }
    common["constexprs"] |= {"P": block_size, "C": head_dim}
    common["args" if bias_K is not None else "constexprs"]["bias"] = bias_K
    return (Launch(gemv_qkv_kernel, **common),)


def gemv_qkv(
    x_RD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    num_heads: int,
    *,
    out: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
) -> Tensor:
    """Computes `gemv_qkv_reference` of up to 16 rows; slots (int32), caches as in `qkv_rope_kv`, the rest as in `gemv`.

    A row with slot -1, or a slot beyond the cache, only fills up a batch: it writes no k and v and gets zeros for q.
    Raises ValueError naming the argument that does not fit.
    """
    dtype, device = x_RD.dtype, x_RD.device
    (rows, _), (n, _) = require_operands(
        {"x_RD": x_RD, "weight_KD": weight_KD, "bias_K": bias_K, "norm_weight_D": norm_weight_D}, plan
    )
    require(k_cache_BGPC.ndim == 4, "k_cache_BGPC", "shape [B, G, P, C]", tuple(k_cache_BGPC.shape))
    num_blocks, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    require(head_dim in HEAD_DIMS, "k_cache_BGPC", f"a head dim of {HEAD_DIMS}", head_dim)
    require(num_kv_heads > 0 and block_size > 0, "k_cache_BGPC", "heads and places", tuple(k_cache_BGPC.shape))
    require(num_blocks * block_size < 2**31, "k_cache_BGPC", "slots that int32 holds", num_blocks * block_size)
    for name, cache in (("k_cache_BGPC", k_cache_BGPC), ("v_cache_BGPC", v_cache_BGPC)):
        require_tensor(name, cache, tuple(k_cache_BGPC.shape), dtype, device)
    strides = k_cache_BGPC.stride()
    require(v_cache_BGPC.stride() == strides, "v_cache_BGPC", f"strides {strides}", v_cache_BGPC.stride())
    require(num_heads > 0 and num_heads % num_kv_heads == 0, "num_heads", f"a multiple of {num_kv_heads}", num_heads)
    expected = (num_heads + 2 * num_kv_heads) * head_dim
    require(n == expected, "weight_KD", f"({num_heads} + 2 * {num_kv_heads}) * {head_dim} = {expected} rows", n)
    require_tensor("position_T", position_T, (rows,), torch.float32, device)
    require_tensor("inv_freq_C", inv_freq_C, (head_dim // 2,), torch.float32, device)
    require_tensor("slot_T", slot_T, (rows,), torch.int32, device)
    shape = (rows, num_heads, head_dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    require_tensor("out", out, shape, dtype, device)
    require(out.numel() == 0 or out.data_ptr() != x_RD.data_ptr(), "out", "memory of its own", "x_RD")
    operands = (x_RD, norm_weight_D, eps, weight_KD, bias_K, position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T)
    how: dict[str, Any] = {"plan": plan, "workspace": workspace, "programmatic_launch": programmatic_launch}
    how |= {"early_trigger": early_trigger, "out": out, "target": target_of(device)}
    run(plan_gemv_qkv(*operands, num_heads, **how))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes rows with random slots of a cache that has a block to spare and random values, so a stray write shows.

    x and weight are cut from tensors with `padding` more columns of NaN, and the cache has as many channels after each
    slot; `factor` scales x; `early` is as in `gemv`; the rows' positions are `step` apart from `first` on; the first
    `unslotted` have no slot.
    """
    rows, width, heads, groups, channels = (case[letter] for letter in "RDHGC")
    block_size, padding = case.sizes.get("P", 16), case.sizes.get("padding", 0)
    n = (heads + 2 * groups) * channels

    def matrix(height: int, factor: float) -> Tensor:
        values = torch.full((height, width + padding), torch.nan, dtype=dtype, device=device)
        values[:, :width] = factor * torch.randn(height, width, dtype=torch.float32, device=device)
        return values[:, :width]

    num_blocks = rows // block_size + 2
    pool = torch.randn(2, num_blocks, groups, block_size, channels + padding, dtype=torch.float32, device=device)
    caches = pool.to(dtype)[..., :channels]
    slot = torch.randperm(num_blocks * block_size, device=device)[:rows].int()
    slot[: case.sizes.get("unslotted", 0)] = -1
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    steps = torch.arange(rows, dtype=torch.float32, device=device)
    bias = torch.randn(n, dtype=torch.float32, device=device).to(dtype)
    return {
        "x_RD": matrix(rows, case.sizes.get("factor", 1.0)),
        "norm_weight_D": torch.randn(width, dtype=torch.float32, device=device).to(dtype),
        "eps": 1e-6,
        "weight_KD": matrix(n, width**-0.5),
        "bias_K": bias if case.sizes.get("bias", True) else None,
        "position_T": case.sizes.get("first", 0.0) + case.sizes.get("step", 1.0) * steps,
        "inv_freq_C": 1e6**-exponent,
        "k_cache_BGPC": caches[0],
        "v_cache_BGPC": caches[1],
        "slot_T": slot,
        "num_heads": heads,
        "plan": TEST_PLANS.get(case.sizes.get("plan", "")),
        **({"early_trigger": True} if case.sizes.get("early") else {}),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    rows, width, heads, groups, channels = (case[letter] for letter in "RDHGC")
    n = (heads + 2 * groups) * channels
    return Cost(bytes=dtype.itemsize * (n * width + rows * (width + n)), flops=2 * rows * n * width)


def _test_cases() -> Iterator[Case]:
    def case(name: str, rows: int, heads: int, groups: int, channels: int, width: int = 64, **more: object) -> Case:
        sizes = {"R": rows, "D": width, "H": heads, "G": groups, "C": channels}
        return Case(name, {**sizes, **more})

    yield case("two_chunks", 1, 1, 1, 32, 1100)
    yield case("early", 2, 1, 1, 32, 1100, plan="rows", early=True)
    for rows in (0, 1, 2, 3, 16):
        yield case(f"rows_{rows}", rows, 2, 1, 16)
    for channels in HEAD_DIMS:
        yield case(f"channels_{channels}", 3, 1, 1, channels, plan="matrix")
        yield case(f"stages_channels_{channels}", 3, 1, 1, channels, plan="stages")
    for plan, rows in (("rows", 2), ("matrix", 5), ("split", 3), ("stages", 5), ("split_stages", 3)):
        yield case(f"{plan}_heads", rows, 3, 3, 16, 130, plan=plan)
        yield case(f"{plan}_far", rows, 2, 1, 32, plan=plan, first=45000.0 + 1 / 256, step=1 / 256)
        yield case(f"{plan}_strided", rows, 2, 1, 32, 72, plan=plan, padding=8, bias=False)
        yield case(f"{plan}_unaligned", rows, 2, 1, 16, 67, plan=plan, padding=3)
        yield case(f"{plan}_unslotted", rows, 2, 1, 16, plan=plan, unslotted=rows - 1, P=1)
        yield case(f"{plan}_huge", rows, 2, 1, 16, plan=plan, factor=1e4)  # the squares do not fit float16
    yield case("graph_padding_alone", 2, 2, 1, 16, unslotted=2)


def _model_cases() -> Iterator[Case]:
    for model, (width, _, heads, groups, channels, _) in MODELS.items():
        for rows in (1, 2, 8, 16):
            sizes = {"R": rows, "D": width, "H": heads, "G": groups, "C": channels, "P": 64, "bias": model != "9b"}
            yield Case(f"{model}_{rows}", sizes)


SPEC = KernelSpec(
    name="gemv_qkv",
    used_by="decoders without norms on q and k (Qwen2, InternLM2, Llama): the head of each layer, up to 16 rows",
    reference=gemv_qkv_reference,
    plan=plan_gemv_qkv,
    launcher=gemv_qkv,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances={  # as in gemv, but a rotated value has the errors of the two values of a pair, each up to 6
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over 130 products in another order; sine and cosine to 2 ulp"),
        torch.float16: Tolerance(1e-3, 4e-3, 6e-4, "operands and result are each rounded to 11 bits"),
        torch.bfloat16: Tolerance(8e-3, 3.2e-2, 5e-3, "operands and result are each rounded to 8 bits"),
    },
    in_place=("k_cache_BGPC", "v_cache_BGPC"),
)
