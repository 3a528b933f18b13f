"""Rotates the packed q and k by their V2PE positions (rotary embedding) and writes k and v to their slots.

    angle[t, j] = position[t] * inv_freq[j]                     float32; positions may be fractions (V2PE)
    rotate(x)   = (x1 cos - x2 sin, x2 cos + x1 sin)            x1, x2: first and second half of a head's channels

Qwen3 normalises q and k by RMS per head before the rotation. The rotation runs in float32.
Slot s of the pool is place s % P of block s // P. A row with slot -1 only fills up the batch of a captured graph: its k
and v are not written, and its q is zero. A cache in 8 bits gets numbers and scales of k and v (_kv_numbers.py). What is
rotated may be scaled (YaRN). Source of the positions: V2PE, arXiv 2412.09616.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._kv_numbers import (
    KV_FORMATS,
    LARGEST,
    STORED_TOLERANCES,
    check_scales,
    head_scale,
    in_8_bits,
    to_numbers,
    write_heads,
)
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._rope import norm_heads, rope_row
from internvl_rt.kernels.rms_norm import rms_norm_reference

HEAD_DIMS = (16, 32, 64, 128)  # half of it must be a power of two and at least 16 bytes


def _rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    """Returns the heads in float32."""
    first, second = x_THC.float().chunk(2, dim=-1)
    return torch.cat((first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C), dim=-1)


def qkv_rope_kv_reference(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    scale_BGP2: Tensor | None = None,
    static_scale_2: Tensor | None = None,
    *,
    rope_scale: float = 1.0,
) -> Tensor:
    """Returns rotated q [T, H, C] of packed rows (H q heads | G k heads | G v heads); writes k and v to the cache.

    `position_T` must be float32: half precision cannot tell neighbouring positions apart. `inv_freq_C` is [C / 2]. In
    float64, for tests, the two may be float64 as well; their product is still computed in float32.
    scale_BGP2: the scales of a cache in 8 bits, which are written too. static_scale_2: float32, one scale for all keys
    and one for all values, in place of those of each token. rope_scale: by which q and k are multiplied.
    """
    if position_T.dtype != torch.float32 and not position_T.dtype == qkv_TK.dtype == torch.float64:
        raise ValueError(f"position_T must be float32, got {position_T.dtype}")
    _, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    heads = qkv_TK.unflatten(1, (-1, head_dim))
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q_THC, k_TGC, v_TGC = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if q_norm_C is not None and k_norm_C is not None:
        q_THC, k_TGC = rms_norm_reference(q_THC, q_norm_C, eps), rms_norm_reference(k_TGC, k_norm_C, eps)
    angle_T1C = (position_T.float()[:, None] * inv_freq_C.float())[:, None]
    cos_T1C, sin_T1C = angle_T1C.cos() * rope_scale, angle_T1C.sin() * rope_scale
    if not slot_T.is_meta:  # a meta tensor does not say which rows have a slot
        has_slot_T = slot_T >= 0
        slot = slot_T[has_slot_T].long()
        k_TGC, v_TGC = _rotate(k_TGC, cos_T1C, sin_T1C)[has_slot_T], v_TGC[has_slot_T]
        if scale_BGP2 is None:
            k_cache_BGPC[slot // block_size, :, slot % block_size] = k_TGC.to(k_cache_BGPC.dtype)
            v_cache_BGPC[slot // block_size, :, slot % block_size] = v_TGC
        else:
            static = (None, None) if static_scale_2 is None else static_scale_2
            write_heads(k_cache_BGPC, scale_BGP2[..., 0], slot, k_TGC, static[0])
            write_heads(v_cache_BGPC, scale_BGP2[..., 1], slot, v_TGC, static[1])
    return _rotate(q_THC, cos_T1C, sin_T1C).to(qkv_TK.dtype).masked_fill_(slot_T[:, None, None] < 0, 0)


# Not specialised: one kernel serves all models with this head dim, and index tensors at any address.
@triton.jit(do_not_specialize=["H", "G", "num_slots", "position", "slot", "static_scale"])
def _qkv_rope_kv_kernel(
    qkv, q_norm, k_norm, position, inv_freq, k_cache, v_cache, slot, q, H, G, num_slots, eps,
    qkv_stride, q_stride, q_head_stride, block_stride, group_stride, place_stride,
    scale, static_scale, scale_block_stride, scale_group_stride, rope_scale,
    P: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Rotates BLOCK_H q and k heads of a token, or copies BLOCK_H of its v heads.

    The halves of a head are separate blocks, so that a channel and its partner are in the same thread.
    scale: of a cache in 8 bits, whose numbers are at most LARGEST; k and v are rounded once, from float32.
    """
    HALF: tl.constexpr = C // 2
    token = tl.program_id(0).to(tl.int64)
    turned_blocks = tl.cdiv(H + G, BLOCK_H)
    is_v = tl.program_id(1) >= turned_blocks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head += tl.where(is_v, H + G - turned_blocks * BLOCK_H, 0)
    inside = head < tl.where(is_v, H + 2 * G, H + G)
    channel = tl.arange(0, HALF)[None, :]
    source = qkv + token * qkv_stride + (head * C)[:, None] + channel
    first = tl.load(source, mask=inside[:, None], other=0.0)
    second = tl.load(source + HALF, mask=inside[:, None], other=0.0)

    place = tl.load(slot + token).to(tl.int64)
    has_slot = (place >= 0) & (place < num_slots)
    in_cache = place // P * block_stride + place % P * place_stride
    if scale is not None:
        in_scale = place // P * scale_block_stride + place % P * 2
    if is_v:
        in_v = in_cache + (head - H - G).to(tl.int64) * group_stride
        inside &= has_slot
        if scale is not None:
            x1, x2 = first.to(tl.float32), second.to(tl.float32)
            of_head = scale + in_scale + (head - H - G).to(tl.int64) * scale_group_stride
            _write(v_cache + in_v, of_head, static_scale, 1, x1, x2, inside, channel, HALF, LARGEST)
        else:
            target = (v_cache + in_v)[:, None] + channel
    else:
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        if q_norm is not None:
            x1, x2 = norm_heads(x1, x2, tl.where(head < H, q_norm, k_norm)[:, None] + channel, C, eps)
        y1, y2 = rope_row(x1, x2, tl.load(position + token), inv_freq, channel)
        if rope_scale is not None:
            y1, y2 = y1 * rope_scale, y2 * rope_scale
        first = tl.where(has_slot, y1, 0.0).to(first.dtype)
        second = tl.where(has_slot, y2, 0.0).to(second.dtype)
        in_q = token * q_stride + head.to(tl.int64) * q_head_stride
        in_k = in_cache + (head - H).to(tl.int64) * group_stride
        if scale is not None:
            of_head = scale + in_scale + (head - H).to(tl.int64) * scale_group_stride
            is_k = inside & (head >= H) & has_slot
            _write(k_cache + in_k, of_head, static_scale, 0, y1, y2, is_k, channel, HALF, LARGEST)
            target = (q + in_q)[:, None] + channel
            tl.store(target, first, mask=(inside & (head < H))[:, None])
            tl.store(target + HALF, second, mask=(inside & (head < H))[:, None])
        else:
            target = tl.where(head < H, q + in_q, k_cache + in_k)[:, None] + channel
            inside &= (head < H) | has_slot
    if scale is None:
        tl.store(target, first, mask=inside[:, None])
        tl.store(target + HALF, second, mask=inside[:, None])


@triton.jit
def _write(
    heads, scales, static_scale, index: tl.constexpr, first, second, inside, channel, HALF: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Writes numbers and scales of heads, given as float32 halves. `index`: 0 for keys, 1 for values."""
    scale = head_scale(first, second, static_scale, index, LARGEST)
    tl.store(scales + index, scale.to(tl.bfloat16), mask=inside)
    dtype: tl.constexpr = heads.dtype.element_ty
    rows = heads[:, None] + channel
    tl.store(rows, to_numbers(first, scale[:, None], dtype, LARGEST), mask=inside[:, None])
    tl.store(rows + HALF, to_numbers(second, scale[:, None], dtype, LARGEST), mask=inside[:, None])


def plan_qkv_rope_kv(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    scale_BGP2: Tensor | None = None,
    static_scale_2: Tensor | None = None,
    *,
    rope_scale: float = 1.0,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    num_blocks, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    turned_heads = out.shape[1] + num_kv_heads
    # A thread has at most 16 channels of each half; its two heads share the computation of the angles.
    block_heads = min(2048 // head_dim, next_power_of_2(turned_heads))
    given: dict[str, Tensor | float | None] = {"q_norm": q_norm_C, "k_norm": k_norm_C, "scale": scale_BGP2}
    given |= {"static_scale": static_scale_2, "rope_scale": None if rope_scale == 1 else rope_scale}
    given |= {"scale_block_stride": None, "scale_group_stride": None}
    if scale_BGP2 is not None:
        given |= {"scale_block_stride": scale_BGP2.stride(0), "scale_group_stride": scale_BGP2.stride(1)}
    return (
        Launch(
            _qkv_rope_kv_kernel,
            (len(out), cdiv(turned_heads, block_heads) + cdiv(num_kv_heads, block_heads), 1),
            {
                "qkv": qkv_TK,
                **{name: value for name, value in given.items() if value is not None},
                "position": position_T,
                "inv_freq": inv_freq_C,
                "k_cache": k_cache_BGPC,
                "v_cache": v_cache_BGPC,
                "slot": slot_T,
                "q": out,
                "H": out.shape[1],
                "G": num_kv_heads,
                "num_slots": num_blocks * block_size,
                "eps": eps,
                "qkv_stride": qkv_TK.stride(0),
                **{"q_stride": out.stride(0), "q_head_stride": out.stride(1)},
                **dict(zip(("block_stride", "group_stride", "place_stride"), k_cache_BGPC.stride(), strict=False)),
            },
            {
                **{name: None for name, value in given.items() if value is None},  # at compile time
                **{"P": block_size, "C": head_dim, "BLOCK_H": block_heads, "LARGEST": LARGEST.get(k_cache_BGPC.dtype)},
            },
            num_warps=2,
        ),
    )


def qkv_rope_kv(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    scale_BGP2: Tensor | None = None,
    static_scale_2: Tensor | None = None,
    *,
    rope_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `qkv_rope_kv_reference` for rows at any stride, distinct slots (int32) and caches with the same strides.

    A slot beyond the cache counts as none: the slots are on the GPU, so the host cannot check them and raise. A cache
    in 8 bits is float8_e4m3fn or int8 and has `scale_BGP2`, bfloat16; below compute capability 8.9 it must be int8.
    Raises ValueError naming the argument that does not fit.
    """
    dtype, device = qkv_TK.dtype, qkv_TK.device
    require_one_of("qkv_TK", dtype, SPEC.tolerances)
    require(k_cache_BGPC.ndim == 4, "k_cache_BGPC", "shape [B, G, P, C]", tuple(k_cache_BGPC.shape))
    num_blocks, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    require(head_dim in HEAD_DIMS, "k_cache_BGPC", f"a head dim of {HEAD_DIMS}", head_dim)
    require(num_kv_heads > 0 and block_size > 0, "k_cache_BGPC", "heads and places", tuple(k_cache_BGPC.shape))
    require(num_blocks * block_size < 2**31, "k_cache_BGPC", "slots that int32 holds", num_blocks * block_size)
    cache_dtype = check_scales(k_cache_BGPC, scale_BGP2, static_scale_2, dtype, device)
    require_tensor("k_cache_BGPC", k_cache_BGPC, tuple(k_cache_BGPC.shape), cache_dtype, device)
    require_tensor("v_cache_BGPC", v_cache_BGPC, tuple(k_cache_BGPC.shape), cache_dtype, device)
    strides, others = k_cache_BGPC.stride(), v_cache_BGPC.stride()
    require(others == strides, "v_cache_BGPC", f"strides {strides}", others)
    require(qkv_TK.ndim == 2, "qkv_TK", "rows [T, K]", tuple(qkv_TK.shape))
    num_tokens, width = qkv_TK.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    fits = width % head_dim == 0 and num_heads > 0 and num_heads % num_kv_heads == 0
    require(fits, "qkv_TK", f"(H + 2 * {num_kv_heads}) * {head_dim} columns, H a multiple of {num_kv_heads}", width)
    require_tensor("qkv_TK", qkv_TK, (num_tokens, width), dtype, device)
    require((q_norm_C is None) == (k_norm_C is None), "k_norm_C", "both norms or neither", k_norm_C)
    for name, norm_C in (("q_norm_C", q_norm_C), ("k_norm_C", k_norm_C)):
        if norm_C is not None:
            require_tensor(name, norm_C, (head_dim,), dtype, device)
    require_tensor("position_T", position_T, (num_tokens,), torch.float32, device)
    require_tensor("inv_freq_C", inv_freq_C, (head_dim // 2,), torch.float32, device)
    require_tensor("slot_T", slot_T, (num_tokens,), torch.int32, device)
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=dtype, device=device) if out is None else out
    require_tensor("out", out, (num_tokens, num_heads, head_dim), dtype, device)
    inputs = (qkv_TK, q_norm_C, k_norm_C, eps, position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T)
    scales, target = (scale_BGP2, static_scale_2), target_of(device)
    run(plan_qkv_rope_kv(*inputs, *scales, rope_scale=rope_scale, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float | None]:
    """Makes tokens with random slots of a cache that has a block to spare and random values, so a stray write shows.

    `far` positions are one unit in the last place apart; `unslotted` tokens in the middle have slot -1; `padding` NaN
    columns follow each row, `cache_padding` channels each slot. `cache` is the format of one in 8 bits, with random
    numbers and scales; `static` gives it a scale for all tokens, with which some numbers are too large.
    """
    tokens, heads, groups, channels, block_size = (case[letter] for letter in "THGCP")
    width, padding = (heads + 2 * groups) * channels, case.sizes.get("padding", 0)
    qkv = torch.randn(tokens, width + padding, dtype=torch.float32, device=device)
    qkv *= case.sizes.get("factor", 1.0)
    qkv[:, width:] = torch.nan
    norms = [1.0 + 0.5 * torch.rand(channels, dtype=torch.float32, device=device).to(dtype) for _ in "qk"]
    q_norm, k_norm = norms if case.sizes.get("norms") else (None, None)
    num_blocks = tokens // block_size + 2
    shape = (2, num_blocks, groups, block_size, channels + case.sizes.get("cache_padding", 0))
    caches = torch.randn(shape, dtype=torch.float32, device=device).to(dtype)
    scale = static = None
    if "cache" in case.sizes:
        caches = (100 * caches).to(KV_FORMATS[case["cache"]])
        scale = torch.rand(num_blocks, groups, block_size, 2, dtype=torch.float32, device=device).bfloat16()
        if case.sizes.get("static"):
            static = torch.tensor([2.0, 1.3]).to(device) / LARGEST[caches.dtype]
    caches = caches[..., :channels]
    slot = torch.randperm(num_blocks * block_size, device=device)[:tokens].int()
    unslotted = case.sizes.get("unslotted", 0)
    slot[(tokens - unslotted) // 2 :][:unslotted] = -1
    steps = torch.arange(tokens, dtype=torch.float32, device=device)
    return {
        "qkv_TK": qkv.to(dtype)[:, :width],
        "q_norm_C": q_norm,
        "k_norm_C": k_norm,
        "eps": 1e-6,
        "position_T": 45000 + (1 + steps) / 256 if case.sizes.get("far") else 1.25 * steps,
        "inv_freq_C": 1e6 ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels),
        "k_cache_BGPC": caches[0],
        "v_cache_BGPC": caches[1],
        "slot_T": slot,
        "scale_BGP2": scale,
        "static_scale_2": static,
        **({"rope_scale": case["rope_scale"]} if "rope_scale" in case.sizes else {}),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, heads, groups, channels = (case[letter] for letter in "THGC")
    row_bytes = (2 * heads + 2 * groups) * channels * dtype.itemsize + 8
    row_bytes += 2 * groups * (channels + 2 if "cache" in case.sizes else channels * dtype.itemsize)
    return Cost(bytes=tokens * row_bytes + 2 * channels, flops=3 * tokens * (heads + groups) * channels)


def _case(name: str, tokens: int, heads: int, groups: int, channels: int, block_size: int = 16, **more: object) -> Case:
    return Case(name, {"T": tokens, "H": heads, "G": groups, "C": channels, "P": block_size, **more})


def _cases_of(cache: str) -> Iterator[Case]:
    """Returns the test cases of a cache in 8 bits."""
    how = in_8_bits(cache)
    yield from (_case(f"{cache}_channels_{channels}", 5, 4, 2, channels, **how) for channels in HEAD_DIMS)
    yield _case(f"{cache}_more_heads_than_a_block", 2, 28, 4, 128, 64, **how)
    yield _case(f"{cache}_graph_padding", 9, 4, 2, 32, unslotted=4, **how)
    yield _case(f"{cache}_strided", 5, 4, 2, 32, padding=24, cache_padding=16, **how)
    yield _case(f"{cache}_unaligned", 5, 4, 2, 32, padding=3, cache_padding=1, **how)
    yield _case(f"{cache}_norms", 4, 4, 2, 64, norms=True, far=True, **how)
    yield _case(f"{cache}_tiny", 4, 4, 2, 64, factor=1e-6, **how)
    yield _case(f"{cache}_zero", 3, 2, 2, 64, factor=0.0, **how)
    yield _case(f"{cache}_static", 5, 4, 2, 64, static=True, **how)
    yield _case(f"{cache}_scaled", 5, 4, 2, 64, rope_scale=1.35, **how)


SPEC = KernelSpec(
    name="qkv_rope_kv",
    used_by="every decoder: each layer of a prompt's chunk; decoders with norms on q and k (Qwen3) in every step",
    reference=qkv_rope_kv_reference,
    plan=plan_qkv_rope_kv,
    launcher=qkv_rope_kv,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(_case(f"channels_{channels}", 5, 4, 2, channels) for channels in HEAD_DIMS),
        *(_case(f"tokens_{tokens}", tokens, 2, 1, 32) for tokens in (0, 1, 15, 16, 17)),
        *(_case(f"heads_{heads}_{groups}", 2, heads, groups, 64) for heads, groups in ((1, 1), (14, 2), (9, 9))),
        _case("more_heads_than_a_block", 2, 28, 4, 128, 64),
        *(_case(f"blocks_of_{block_size}", 9, 2, 2, 16, block_size) for block_size in (1, 5, 64)),
        *(_case(f"far_{channels}", 6, 2, 1, channels, far=True) for channels in (64, 128)),
        *(_case(f"graph_padding_{n}", rows, 4, 2, 32, unslotted=n) for rows, n in ((9, 4), (3, 3))),
        _case("strided", 5, 4, 2, 32, padding=24, cache_padding=8),
        _case("scaled", 5, 4, 2, 64, rope_scale=1.35),
        _case("unaligned", 5, 4, 2, 32, padding=3, cache_padding=1),
        *(_case(f"norms_{channels}", 4, 4, 2, channels, norms=True) for channels in HEAD_DIMS),
        _case("norms_huge", 3, 2, 2, 64, norms=True, factor=1e4, padding=8, far=True),  # the squares do not fit float16
        _case("norms_zero", 3, 2, 2, 64, norms=True, factor=0.0, unslotted=1),
        *(case for name in KV_FORMATS for case in _cases_of(name)),
    ),
    model_cases=(
        *(
            _case(f"{name}_{tokens}_tokens{suffix}", tokens, heads, groups, channels, 64, norms=norms, **more)
            for name, heads, groups, channels, norms in (
                ("1b", 14, 2, 64, False),
                ("2b", 12, 2, 128, False),
                ("8b", 28, 4, 128, False),
                ("9b", 32, 2, 128, False),
                ("14b_and_38b", 40, 8, 128, False),
                ("78b", 64, 8, 128, False),
                ("3_5_8b", 32, 8, 128, True),
            )
            for tokens in (1, 64, 3392)  # a decode step of one sequence, one of a batch, and the prompt of 13 tiles
            for suffix, more in (("", {}), *((f"_{cache}", in_8_bits(cache)) for cache in KV_FORMATS))
            if not suffix or name in ("1b", "8b", "3_5_8b")
        ),
        *(_case(f"gpt_oss_{tokens}_tokens", tokens, 64, 8, 64, 64, rope_scale=1.3465736) for tokens in (1, 3392)),
    ),
    tolerances={
        torch.float32: Tolerance(2e-6, 2e-6, 3e-7, "sine and cosine are right to 1.2e-7, pairs up to 6 wide"),
        # With norms, quotient and product are rounded too. A rotated value has the errors of two values of up to 6.
        torch.float16: Tolerance(1e-3, 4e-3, 6e-4, "values are rounded to 11 bits, up to three times"),
        torch.bfloat16: Tolerance(8e-3, 3.2e-2, 5e-3, "values are rounded to 8 bits, up to three times"),
    },
    in_place=("k_cache_BGPC", "v_cache_BGPC", "scale_BGP2"),
    stored=STORED_TOLERANCES,
)
