"""Bidirectional attention of a vision tower, read directly from the packed projection.

    o[i, u, h] = softmax(q[i, u, h] . k[i, :, h] / sqrt(C)) v[i, :, h]

Patch rows come first (see _contract): row i * L + l is patch l of tile i, and row I * L + i is tile i's class token.
A row holds (q | k | v), and each of the three is [H, C]. InternViT-6B first normalises q and k by RMS over the channels
of all heads together, not per head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._plans import AttentionPlan, check_attention_plan, choose_attention_plan
from internvl_rt.kernels._vit_attention_body import inverse_rms_kernel, vit_attention_kernel
from internvl_rt.kernels.layer_norm import MAX_WIDTH, row_warps
from internvl_rt.kernels.rms_norm import rms_norm_reference

HEAD_DIMS = (16, 32, 64, 128)  # blocks are powers of two, and matrix units take no inner dimension below 16


def vit_attention_reference(
    qkv_RK: Tensor,
    num_tiles: int,
    head_dim: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    *,
    plan: AttentionPlan | None = None,  # does not change the result
) -> Tensor:
    """Computes attention [R, E] of the packed projection [R, 3E]; R = num_tiles * (L + 1)."""
    q, k, v = qkv_RK.chunk(3, dim=-1)
    if q_norm_E is not None and k_norm_E is not None:
        q, k = rms_norm_reference(q, q_norm_E, eps), rms_norm_reference(k, k_norm_E, eps)
    q, k, v = (tile_tokens(t, num_tiles).unflatten(2, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    y_IUE = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return torch.cat((y_IUE[:, :-1].flatten(0, 1), y_IUE[:, -1]))


def tile_tokens(x_RE: Tensor, num_tiles: int) -> Tensor:
    """Returns rows whose patches come first, as [I, U, E] with the class token last."""
    num_patch_rows = len(x_RE) - num_tiles
    patches_ILE = x_RE[:num_patch_rows].view(num_tiles, num_patch_rows // max(num_tiles, 1), x_RE.shape[1])
    return torch.cat((patches_ILE, x_RE[num_patch_rows:, None]), dim=1)


def default_plan(head_dim: int, dtype: torch.dtype, target: Target) -> AttentionPlan:
    """Returns the plan where none was measured. With 64 channels a multiprocessor of sm_90 runs two programs."""
    if dtype == torch.float32:  # for tests only: no matrix units, and larger blocks would not fit the registers
        return AttentionPlan(32, 16, num_warps=8, num_stages=1)
    num_stages = 2 if head_dim == 128 and target.shared_bytes < 160 * 1024 else 3
    return AttentionPlan(128, 64, num_warps=8, num_stages=num_stages)


def plan_vit_attention(
    qkv_RK: Tensor,
    num_tiles: int,
    head_dim: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    *,
    plan: AttentionPlan | None = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the launches. `plan` None: the measured plan, or the default if none was measured."""
    num_rows, width = out.shape
    num_heads = width // head_dim
    num_patches = (num_rows - num_tiles) // max(num_tiles, 1)
    if plan is None:
        plan = choose_attention_plan(num_tiles, num_patches, num_heads, head_dim, qkv_RK.dtype, target)
        plan = plan or default_plan(head_dim, qkv_RK.dtype, target)
    # A thread holds 32 values of k and 32 of v; half of that where twice the shared memory would halve the programs on
    # a multiprocessor, and half with 16 warps, whose threads have half as many registers.
    class_block = (32 if target.shared_bytes >= 160 * 1024 else 16) * 32 * min(plan.num_warps, 8) // head_dim
    # A box of keys must not reach into another tile's rows; the copy engine (TMA) needs multiples of 16 bytes.
    whole_blocks = num_patches > 0 and num_patches % plan.block_n == 0
    aligned = qkv_RK.data_ptr() % 16 == 0 and qkv_RK.stride(0) * qkv_RK.itemsize % 16 == 0
    use_tma = target.capability in (90, 100, 103) and whole_blocks and aligned

    descriptors: dict[str, TensorDescriptor] = {}
    if use_tma and plan.host_descriptor:
        sizes, strides = [num_rows, 3 * width], [qkv_RK.stride(0), 1]
        descriptors["descriptor"] = TensorDescriptor(qkv_RK, sizes, strides, [plan.block_n, head_dim])
    launches: list[Launch] = []
    norms: dict[str, Tensor] = {}
    if q_norm_E is not None and k_norm_E is not None:
        inverse_rms_2R = torch.empty(2, num_rows, dtype=torch.float32, device=qkv_RK.device)
        norms = {"inverse_rms": inverse_rms_2R, "q_norm": q_norm_E, "k_norm": k_norm_E}
        launches.append(
            Launch(
                inverse_rms_kernel,
                (num_rows, 2, 1),
                {"qkv": qkv_RK, "inverse_rms": inverse_rms_2R, "qkv_stride": qkv_RK.stride(0), "eps": eps},
                {"E": width, "BLOCK": next_power_of_2(width)},
                num_warps=row_warps(width),
            )
        )
    launches.append(
        Launch(
            vit_attention_kernel,
            (num_tiles * num_heads * (cdiv(num_patches, plan.block_m) + 1), 1, 1),
            {
                "qkv": qkv_RK,
                "y": out,
                **descriptors,
                **norms,
                "qkv_stride": qkv_RK.stride(0),
                "y_stride": out.stride(0),
                "num_rows": num_rows,
                "num_patch_rows": num_rows - num_tiles,
                "scale_log2": math.log2(math.e) / math.sqrt(head_dim),
            },
            {
                **({} if descriptors else {"descriptor": None}),
                **({} if norms else dict.fromkeys(("inverse_rms", "q_norm", "k_norm"))),
                "L": num_patches,
                "H": num_heads,
                "C": head_dim,
                "BLOCK_M": plan.block_m,
                "BLOCK_N": plan.block_n,
                "CLASS_BLOCK": class_block,
                "CLASS_STAGES": plan.num_stages,
                "USE_TMA": use_tma,
                "PRECISION": "ieee" if qkv_RK.dtype == torch.float32 else None,
            },
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            descriptors=use_tma and not descriptors,
            matrix_units=True,
        )
    )
    return tuple(launches)


def vit_attention(
    qkv_RK: Tensor,
    num_tiles: int,
    head_dim: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    *,
    plan: AttentionPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `vit_attention_reference`, for rows at any stride, a head_dim of HEAD_DIMS, and both norms or neither.

    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("qkv_RK", qkv_RK.dtype, SPEC.tolerances)
    require(qkv_RK.ndim == 2, "qkv_RK", "two dimensions", qkv_RK.ndim)
    require_one_of("head_dim", head_dim, HEAD_DIMS)
    num_rows, width = qkv_RK.shape[0], qkv_RK.shape[1] // 3
    require(width > 0 and qkv_RK.shape[1] % (3 * head_dim) == 0, "qkv_RK", f"3 * H * {head_dim} columns", qkv_RK.shape)
    require_tensor("qkv_RK", qkv_RK, (num_rows, 3 * width), qkv_RK.dtype, qkv_RK.device)
    fits = num_rows == 0 if num_tiles == 0 else num_tiles > 0 and num_rows > 0 and num_rows % num_tiles == 0
    require(fits, "num_tiles", f"a divisor of {num_rows} rows", num_tiles)
    require((q_norm_E is None) == (k_norm_E is None), "k_norm_E", "both norms or neither", k_norm_E)
    if q_norm_E is not None and k_norm_E is not None:
        require(width <= MAX_WIDTH, "qkv_RK", f"with norms at most {MAX_WIDTH} channels of q", width)
        require_tensor("q_norm_E", q_norm_E, (width,), qkv_RK.dtype, qkv_RK.device)
        require_tensor("k_norm_E", k_norm_E, (width,), qkv_RK.dtype, qkv_RK.device)
    if out is None:
        out = torch.empty(num_rows, width, dtype=qkv_RK.dtype, device=qkv_RK.device)
    require_tensor("out", out, (num_rows, width), qkv_RK.dtype, qkv_RK.device)
    target = target_of(qkv_RK.device)
    if plan is not None:
        try:
            check_attention_plan(plan, head_dim, qkv_RK.itemsize, target)
        except ValueError as error:
            raise ValueError(f"plan: {error}") from None
    arguments = (qkv_RK, num_tiles, head_dim, q_norm_E, k_norm_E, eps)
    run(plan_vit_attention(*arguments, plan=plan, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes q and k of the kind that `fill` chooses; cuts the rows from a tensor with `padding` more columns of NaN.

    `plan` is used in 16 bits only; in float32, which has no matrix units, its blocks would not fit.
    """
    tiles, heads, channels = case["I"], case["H"], case["C"]
    rows, width = tiles * (case["L"] + 1), heads * channels
    qkv = torch.randn(rows, 3 * width + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
    qkv[:, 3 * width :] = math.nan
    fill = case.sizes.get("fill", "normal")
    if fill == "equal":  # all scores are equal
        qkv[:, width : 2 * width] = 0.5
    elif fill == "one_huge":  # every tile's second patch has a huge score
        qkv[:, :width] = 1.0
        qkv[1 : rows - tiles : max(case["L"], 1), width : 2 * width] = 500.0
    elif fill == "huge":
        qkv[:, : 3 * width] *= 1e4
    elif fill == "huge_qk":
        qkv[:, : 2 * width] *= 1e4
    norms = [1.0 + 0.5 * torch.rand(width, dtype=torch.float32, device=device).to(dtype) for _ in range(2)]
    q_norm, k_norm = norms if case.sizes.get("norms") else (None, None)
    qkv = qkv.to(dtype)[:, : 3 * width]
    return {
        "qkv_RK": qkv,
        "num_tiles": tiles,
        "head_dim": channels,
        "q_norm_E": q_norm,
        "k_norm_E": k_norm,
        "eps": 1e-6,
        "plan": case.sizes.get("plan") if dtype.itemsize == 2 else None,
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, width = case["L"] + 1, case["H"] * case["C"]
    return Cost(bytes=4 * case["I"] * tokens * width * dtype.itemsize, flops=4 * case["I"] * tokens**2 * width)


def _case(name: str, tiles: int, patches: int, heads: int, channels: int, **more: object) -> Case:
    return Case(name, {"I": tiles, "L": patches, "H": heads, "C": channels, **more})


_PLANS = {  # plans that a table may hold, far from the default
    "tall": AttentionPlan(256, 64, num_warps=16, num_stages=2),
    "wide": AttentionPlan(128, 128, num_warps=8, num_stages=2),
    "deep": AttentionPlan(64, 64, num_warps=4, num_stages=3),
    "host": AttentionPlan(128, 64, num_warps=8, num_stages=3, host_descriptor=True),
}

SPEC = KernelSpec(
    name="vit_attention",
    used_by="every vision tower: each layer",
    reference=vit_attention_reference,
    plan=plan_vit_attention,
    launcher=vit_attention,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(_case(f"patches_{patches}", 2, patches, 1, 16) for patches in (0, 1, 4, 15, 16, 17, 63, 64, 65, 127, 129)),
        *(_case(f"channels_{channels}", 2, 192, 1, channels) for channels in HEAD_DIMS),
        _case("one_row", 1, 0, 2, 16),
        _case("several_heads_and_tiles", 3, 64, 2, 32),
        _case("no_tiles", 0, 16, 2, 64),
        _case("strided", 2, 64, 1, 64, padding=24),
        _case("unaligned", 2, 64, 1, 64, padding=3),
        *(_case(fill, 1, 70, 1, 64, fill=fill) for fill in ("equal", "one_huge", "huge")),
        *(_case(f"norms_{patches}", 2, patches, 3, 32, norms=True) for patches in (17, 64)),
        _case("norms_huge", 1, 70, 3, 64, norms=True, fill="huge_qk", padding=8),
        _case("norms_no_tiles", 0, 16, 2, 128, norms=True),
        *(
            _case(f"plan_{name}_{length}", 1, length, 2, 64, plan=p)
            for name, p in _PLANS.items()
            for length in (130, 256)
        ),
        *(_case(f"plan_{name}_norms", 1, 256, 1, 128, norms=True, plan=_PLANS[name]) for name in ("tall", "host")),
    ),
    model_cases=tuple(
        _case(f"{name}_{tiles}_tiles", tiles, 1024, heads, channels, norms=norms)
        for name, heads, channels, norms in (("vit_300m", 16, 64, False), ("vit_6b", 25, 128, True))
        for tiles in (1, 13)
    ),
    tolerances={
        torch.float32: Tolerance(2e-5, 2e-5, 2e-6, "sums over keys in blocks, exp2 to 2 units in the last place"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "probabilities and output are rounded to 11 bits"),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, 5e-3, "probabilities and output are rounded to 8 bits"),
    },
)
