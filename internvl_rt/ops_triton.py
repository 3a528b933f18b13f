"""The table of Triton kernels: `Ops` for CUDA devices (and, slowly, for Triton's interpreter)."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from internvl_rt.kernels._gemv_plan import MAX_ROWS, GemvWorkspace, build_gemv_workspace
from internvl_rt.kernels.add_norm import add_norm
from internvl_rt.kernels.copy_blocks import copy_blocks
from internvl_rt.kernels.decode_attention import decode_attention
from internvl_rt.kernels.embed_tokens import embed_tokens
from internvl_rt.kernels.gemm_epilogue import linear, linear_gelu, linear_residual
from internvl_rt.kernels.gemv import gemv
from internvl_rt.kernels.gemv_qkv import gemv_qkv
from internvl_rt.kernels.layer_norm import layer_norm
from internvl_rt.kernels.patch_embed import patch_embed
from internvl_rt.kernels.place_visual_tokens import place_visual_tokens
from internvl_rt.kernels.prefill_attention import prefill_attention
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv
from internvl_rt.kernels.resize_tiles import resize_tiles
from internvl_rt.kernels.rms_norm import rms_norm
from internvl_rt.kernels.sample import sample
from internvl_rt.kernels.swiglu import swiglu
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm
from internvl_rt.kernels.vit_attention import vit_attention
from internvl_rt.ops import Batch, Linear, Norm, Ops, Sampling, bias_of, qk_weights, sampling_arguments

MAX_COUNTERS = 1 << 16  # 1024 sequences of 64 kv heads


def _norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.bias_D is None:
        return rms_norm(x, norm.weight_D, norm.eps)
    return layer_norm(x, norm.weight_D, norm.bias_D, norm.eps)


def _linear(x: Tensor, part: Linear) -> Tensor:
    return linear(x, part.weight_NK, part.bias_N)


def _patch_embed(tiles: Tensor, patch: Linear, class_E: Tensor, position_UE: Tensor) -> Tensor:
    return patch_embed(tiles, patch.weight_NK, bias_of(patch), class_E, position_UE)


def _vit_attention(qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
    return vit_attention(qkv_RK, num_tiles, head_dim, *qk_weights(q_norm, k_norm))


def _linear_residual_norm(
    y_RK: Tensor, part: Linear, x_RE: Tensor, scale_E: Tensor, norm: Norm | None
) -> tuple[Tensor, Tensor]:
    """The product alone, then bias, LayerScale, residual and norm in one pass over the rows."""
    if norm is None:
        x_RE = linear_residual(y_RK, part.weight_NK, part.bias_N, x_RE, scale_E, out=x_RE)
        return x_RE, x_RE
    product_RE = linear(y_RK, part.weight_NK, None)
    normed_RE = add_norm(x_RE, product_RE, part.bias_N, scale_E, norm.weight_D, norm.bias_D, norm.eps, out=product_RE)
    return x_RE, normed_RE


def _unshuffle_norm(x_RE: Tensor, num_tiles: int, norm: Norm, factor: int, version: Literal["v1", "v2"]) -> Tensor:
    return unshuffle_norm(x_RE, num_tiles, norm.weight_D, bias_of(norm), norm.eps, factor, version)


@cache
def _workspace(device: torch.device) -> GemvWorkspace:
    """What split products leave for the last of them: one for each device, since steps follow each other."""
    return build_gemv_workspace(device)


@cache
def _counters(device: torch.device) -> Tensor:
    """How many splits of a row have arrived, for decode attention: zeros, which every call leaves as zeros."""
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def _is_decode(x: Tensor, norm: Norm | None = None) -> bool:
    """Whether the rows are few enough to be multiplied as fast as the weight is read; an RMSNorm goes in front."""
    return 0 < len(x) <= MAX_ROWS and (norm is None or norm.bias_D is None)


def _norm_linear(x: Tensor, norm: Norm, part: Linear) -> Tensor:
    if _is_decode(x, norm):
        return gemv(x, part.weight_NK, part.bias_N, norm.weight_D, norm.eps, workspace=_workspace(x.device))
    return _linear(_norm(x, norm), part)


def _norm_linear_swiglu(x: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
    if _is_decode(x, norm):
        weights = gate_up.weight_NK, gate_up.bias_N, norm.weight_D
        return gemv(x, *weights, norm.eps, activation="swiglu", workspace=_workspace(x.device))
    return swiglu(_linear(_norm(x, norm), gate_up))


def _linear_residual(y: Tensor, part: Linear, x: Tensor) -> Tensor:
    if _is_decode(y):
        workspace = _workspace(x.device)
        return gemv(y, part.weight_NK, part.bias_N, None, 0.0, residual_RN=x, out=x, workspace=workspace)
    return linear_residual(y, part.weight_NK, part.bias_N, x, None, out=x)


def _norm_qkv_rope_kv(
    x_TD: Tensor,
    norm: Norm,
    qkv: Linear,
    q_norm: Norm | None,
    k_norm: Norm | None,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
) -> Tensor:
    where = position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T
    if q_norm is None and _is_decode(x_TD, norm):
        head_dim = k_cache_BGPC.shape[3]
        num_heads = len(qkv.weight_NK) // head_dim - 2 * k_cache_BGPC.shape[1]
        weights = norm.weight_D, norm.eps, qkv.weight_NK, qkv.bias_N
        return gemv_qkv(x_TD, *weights, *where, num_heads, workspace=_workspace(x_TD.device))
    return qkv_rope_kv(_linear(_norm(x_TD, norm), qkv), *qk_weights(q_norm, k_norm), *where)


def _paged_attention(q_THC: Tensor, k_cache_BGPC: Tensor, v_cache_BGPC: Tensor, batch: Batch) -> Tensor:
    """Sequences with one new token by the split kernel, the others behind them by the causal one."""
    y_THC, n = torch.empty_like(q_THC), batch.num_decodes
    if n > 0:
        assert batch.split_start_S1 is not None, "a cache for these kernels plans the splits"
        assert batch.split_W3 is not None, "a cache for these kernels plans the splits"
        decodes = batch.block_table_SN[:n], batch.seq_len_S[:n], batch.split_start_S1[: n + 1], batch.split_W3
        num_counters, shape_SG = n * k_cache_BGPC.shape[1], (n, k_cache_BGPC.shape[1])
        fits = num_counters <= MAX_COUNTERS  # else the call makes its own
        counters_SG = _counters(q_THC.device)[:num_counters].view(shape_SG) if fits else None
        decode_attention(q_THC[:n], k_cache_BGPC, v_cache_BGPC, *decodes, counters_SG, out=y_THC[:n])
    if n < len(batch.seq_len_S):
        chunks = batch.block_table_SN[n:], batch.query_start_S1[n:], batch.seq_len_S[n:]
        prefill_attention(q_THC, k_cache_BGPC, v_cache_BGPC, *chunks, batch.max_query_len, out=y_THC)
    return y_THC


def _sample(logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor) -> None:
    sample(logits_RV, **sampling_arguments(sampling), out=token_id_R)


TRITON = Ops(
    name="triton",
    resize_tiles=resize_tiles,
    patch_embed=_patch_embed,
    norm=_norm,
    vit_attention=_vit_attention,
    linear=_linear,
    linear_gelu=lambda x, part: linear_gelu(x, part.weight_NK, part.bias_N),
    linear_residual_norm=_linear_residual_norm,
    unshuffle_norm=_unshuffle_norm,
    embed_tokens=embed_tokens,
    place_visual_tokens=place_visual_tokens,
    norm_qkv_rope_kv=_norm_qkv_rope_kv,
    paged_attention=_paged_attention,
    norm_linear=_norm_linear,
    norm_linear_swiglu=_norm_linear_swiglu,
    linear_residual=_linear_residual,
    sample=_sample,
    copy_blocks=copy_blocks,
)
