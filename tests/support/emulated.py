"""Computes what each kernel computes in a few vectorised lines of torch, with the kernel's roundings and order of sums.

The interpreter takes 5 to 500 ms for a test case, these functions less than 1 ms. `EMULATED[operation](**inputs)`
returns what the launcher would write: the arguments that it writes in place, in the order of the spec, then its
result. `tests/kernels/test_emulated.py` compares these functions with the kernels.

Torch adds 16-bit operands in float32 in its own order, which changes a result by about 1e-7 of its terms. Float32
operands are added in one chain of fused multiply-adds over K; gemv divides K among warps and splits, so its own error
is smaller than the emulated one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_rt.kernels._fp8_rows import quantise
from internvl_rt.kernels._kv_numbers import write_heads
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.route_experts import route_experts_reference
from support.emulated_arithmetic import fused_multiply_add, product, rounded, sin_cos
from support.emulated_attention import decode_attention, prefill_attention, vit_attention
from support.emulated_experts import expert_down, expert_gate_up
from support.emulated_few_rows import few_rows, gemm_fp8, gemv, gemv_4bit, gemv_8bit


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> list[Tensor]:
    return [rms_norm_reference(x, weight_D, eps)]  # the reference rounds at the same places as the kernel


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> list[Tensor]:
    return [_normed_row(x.float(), weight_D, bias_D, eps).to(x.dtype)]


def _normed_row(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Subtracts the mean twice, as the first float32 mean of large values lacks its last bits."""
    x = x - x.mean(-1, keepdim=True)
    return layer_norm_reference(x, weight_D.float(), bias_D.float(), eps)


def _swiglu(gate_up_T2F: Tensor) -> list[Tensor]:
    gate, up = gate_up_T2F.float().chunk(2, dim=-1)
    silu = gate / (1 + (-gate).exp())
    return [(rounded(silu, gate_up_T2F.dtype) * up).to(gate_up_T2F.dtype)]


def _in_fp8(y: Tensor, scale_R: Tensor, static_scale_1: Tensor | None) -> list[Tensor]:
    numbers, scale = quantise(y, static_scale_1)
    return [scale_R.copy_(scale), numbers]


def _rms_norm_fp8(
    x_RD: Tensor, weight_D: Tensor, eps: float, scale_R: Tensor, static_scale_1: Tensor | None
) -> list[Tensor]:
    return _in_fp8(*_rms_norm(x_RD, weight_D, eps), scale_R, static_scale_1)


def _swiglu_fp8(gate_up_T2F: Tensor, scale_T: Tensor, static_scale_1: Tensor | None) -> list[Tensor]:
    return _in_fp8(*_swiglu(gate_up_T2F), scale_T, static_scale_1)


def _add_norm(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
) -> list[Tensor]:
    update = y_RD.float()
    if bias_D is not None:
        update = update + bias_D.float()
    if scale_D is not None:
        update = update * scale_D.float()
    x = (x_RD.float() + update).to(x_RD.dtype)
    if norm_bias_D is None:
        return [x, *_rms_norm(x, weight_D, eps)]
    return [x, *_layer_norm(x, weight_D, norm_bias_D, eps)]


def _merged(x_RE: Tensor, num_tiles: int, factor: int, version: str) -> Tensor:
    """Returns the visual tokens [I, M, factor^2 * E] without a norm."""
    num_patch_rows, width = len(x_RE) - num_tiles, x_RE.shape[1]
    side = math.isqrt(num_patch_rows // max(num_tiles, 1)) // factor
    x = x_RE[:num_patch_rows].reshape(num_tiles, side, factor, side, factor, width).transpose(2, 3)
    x = x.transpose(1, 2) if version == "v1" else x
    return x.reshape(num_tiles, side * side, factor * factor * width)


def _route_experts(logits_TX: Tensor, num_chosen: int, block: int, *, renormalise: bool, **window: Any) -> list[Tensor]:
    """Adds the exponentials of the chosen in their order in float32, those of all exactly.

    The exponential is numpy's, as in the interpreter, because weights are not rounded to 16 bits.
    """
    routing = route_experts_reference(logits_TX, num_chosen, block, renormalise=renormalise, **window)
    x = logits_TX.float()
    share = torch.from_numpy(np.exp((x - x.amax(1, keepdim=True)).numpy()))
    chosen = share.gather(1, routing.expert_id_TJ.long())
    total = torch.zeros(len(x), 1)
    for each in chosen.split(1, dim=1):
        total = total + each
    weight_TJ = chosen / (total if renormalise else share.double().sum(1, keepdim=True).float())
    return [*routing._replace(weight_TJ=weight_TJ)]


def _unshuffle_norm(
    x_RE: Tensor, num_tiles: int, weight_D: Tensor, bias_D: Tensor, eps: float, factor: int, version: str
) -> list[Tensor]:
    return _layer_norm(_merged(x_RE, num_tiles, factor, version), weight_D, bias_D, eps)


def _unshuffle_project(
    x_RE: Tensor,
    num_tiles: int,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor,
    factor: int,
    version: str,
    plan: Any,
) -> list[Tensor]:
    """Normalises as x * rstd + shift, and in float32 subtracts the larger part of the mean from x before."""
    dtype, x_IMK = x_RE.dtype, _merged(x_RE, num_tiles, factor, version)
    if plan == "apart":
        (x_IMK,) = _layer_norm(x_IMK, norm_weight_K, norm_bias_K, eps)
        return _gemm_epilogue(x_IMK, weight_NK, bias_N, "gelu", None, None, None, "cublas")
    x = x_IMK.float()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rest = centred.mean(-1, keepdim=True)
    rstd = 1 / ((centred - rest).square().mean(-1, keepdim=True) + eps).sqrt()
    if dtype == torch.float32:
        x, shift = centred, -rest * rstd
    else:
        shift = -(mean + rest) * rstd
    normed = fused_multiply_add(fused_multiply_add(x, rstd, shift), norm_weight_K.float(), norm_bias_K.float())
    y = product(normed.to(dtype), weight_NK, dtype) + bias_N.float()
    return [(0.5 * y * (1 + torch.erf(y * math.sqrt(0.5)))).to(dtype)]


def _gemm_epilogue(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale_N: Tensor | None,
    rows: Tensor | None,
    plan: Any,
) -> list[Tensor]:
    """Rounds a cuBLAS product before the epilogue, but after the sum if the epilogue adds only a residual."""
    dtype = x.dtype
    y = product(x, weight_NK, dtype)
    if bias_N is not None:
        y = y + bias_N.float()
    apart = bias_N is not None or scale_N is not None
    if plan in ("cublas", "cublas_twice") and (residual is None or apart):
        y = rounded(y, dtype)
    if activation == "gelu":
        y = 0.5 * y * (1 + torch.erf(y * math.sqrt(0.5)))
    if scale_N is not None:
        y = y * scale_N.float()
    if residual is not None:
        y = y + residual.float()
    if rows is not None:
        y = torch.zeros_like(y).index_copy_(0, rows, y)
    return [y.to(dtype)]


def _patch_embed(
    tiles: Tensor, weight_EK: Tensor, bias_E: Tensor, class_E: Tensor, position_UE: Tensor
) -> list[Tensor]:
    dtype = weight_EK.dtype
    pixels = tiles.float()
    if tiles.dtype == torch.uint8:
        scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD])[:, None, None]
        shift = torch.tensor([-m / std for m, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])[:, None, None]
        pixels = pixels.permute(0, 3, 1, 2) * scale + shift
    num_tiles, channels, side, _ = pixels.shape
    patch = math.isqrt(weight_EK.shape[1] // channels)
    grid = side // patch
    patches = rounded(pixels, dtype).reshape(num_tiles, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    x_RK = patches.reshape(num_tiles * grid * grid, weight_EK.shape[1])
    x_RE = product(x_RK, weight_EK, dtype, bias_E.float()) + position_UE[1:].float().repeat(num_tiles, 1)
    class_IE = (class_E.float() + position_UE[0].float()).expand(num_tiles, -1)
    return [torch.cat((x_RE, class_IE)).to(dtype)]


def _turned(x_RHC: Tensor, position_T: Tensor, inv_freq_C: Tensor) -> Tensor:
    sin, cos = sin_cos((position_T[:, None] * inv_freq_C)[:, None])
    first, second = x_RHC.chunk(2, dim=-1)
    turned = fused_multiply_add(first, cos, -(second * sin)), fused_multiply_add(second, cos, first * sin)
    return torch.cat(turned, dim=-1)


def _written(cache_BGPC: Tensor, slot_T: Tensor, x_TGC: Tensor) -> Tensor:
    cache, used = cache_BGPC.clone(), slot_T >= 0
    slot = slot_T[used].long()
    cache[slot // cache.shape[2], :, slot % cache.shape[2]] = x_TGC[used].to(cache.dtype)
    return cache


def _rotated_and_written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    inv_freq: Tensor,
    caches: Sequence[Tensor],
    slot: Tensor,
    scale: float = 1.0,
) -> list[Tensor]:
    q, k = (_turned(x, position, inv_freq) * scale for x in (q, k))
    q = q.masked_fill(slot[:, None, None] < 0, 0).to(caches[0].dtype)
    return [_written(caches[0], slot, k), _written(caches[1], slot, v), q]


def _gemv_qkv(
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
    plan: Any,
    early_trigger: bool = False,  # changes no bit
) -> list[Tensor]:
    y = few_rows(x_RD, weight_KD, norm_weight_D, eps, plan)
    if bias_K is not None:
        y = y + bias_K.float()
    _, groups, _, channels = k_cache_BGPC.shape
    q, k, v = y.unflatten(1, (-1, channels)).tensor_split((num_heads, num_heads + groups), dim=1)
    return _rotated_and_written(q, k, v, position_T, inv_freq_C, (k_cache_BGPC, v_cache_BGPC), slot_T)


def _qkv_rope_kv(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    scale_BGP2: Tensor | None,
    static_scale_2: Tensor | None,
    rope_scale: float = 1.0,
) -> list[Tensor]:
    _, groups, _, channels = k_cache_BGPC.shape
    heads = qkv_TK.unflatten(1, (-1, channels))
    num_heads = heads.shape[1] - 2 * groups
    q, k, v = heads.tensor_split((num_heads, num_heads + groups), dim=1)
    if q_norm_C is not None and k_norm_C is not None:
        q, k = rms_norm_reference(q, q_norm_C, eps), rms_norm_reference(k, k_norm_C, eps)
    caches = (k_cache_BGPC, v_cache_BGPC)
    if scale_BGP2 is None:
        return _rotated_and_written(q.float(), k.float(), v, position_T, inv_freq_C, caches, slot_T, rope_scale)
    q, k = (_turned(x.float(), position_T, inv_freq_C) * rope_scale for x in (q, k))
    used = slot_T >= 0
    static = (None, None) if static_scale_2 is None else static_scale_2
    for index, (cache, x) in enumerate(zip(caches, (k, v), strict=True)):
        write_heads(cache, scale_BGP2[..., index], slot_T[used].long(), x[used], static[index])
    return [*caches, scale_BGP2, q.masked_fill(~used[:, None, None], 0).to(qkv_TK.dtype)]


EMULATED: dict[str, Callable[..., list[Tensor]]] = {
    "add_norm": _add_norm,
    "decode_attention": decode_attention,
    "expert_down": expert_down,
    "expert_gate_up": expert_gate_up,
    "gemm_epilogue": _gemm_epilogue,
    "gemm_fp8": gemm_fp8,
    "gemv": gemv,
    "gemv_4bit": gemv_4bit,
    "gemv_8bit": gemv_8bit,
    "gemv_qkv": _gemv_qkv,
    "layer_norm": _layer_norm,
    "patch_embed": _patch_embed,
    "prefill_attention": prefill_attention,
    "qkv_rope_kv": _qkv_rope_kv,
    "rms_norm": _rms_norm,
    "rms_norm_fp8": _rms_norm_fp8,
    "route_experts": _route_experts,
    "swiglu": _swiglu,
    "swiglu_fp8": _swiglu_fp8,
    "unshuffle_norm": _unshuffle_norm,
    "unshuffle_project": _unshuffle_project,
    "vit_attention": vit_attention,
}
