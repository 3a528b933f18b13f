"""The table of Triton kernels: `Ops` for CUDA devices (and, slowly, for Triton's interpreter)."""

from typing import Literal

import torch
from torch import Tensor

from internvl_rt.kernels.add_norm import add_norm
from internvl_rt.kernels.decode_attention import decode_attention
from internvl_rt.kernels.gemm_epilogue import linear, linear_gelu, linear_residual
from internvl_rt.kernels.layer_norm import layer_norm
from internvl_rt.kernels.patch_embed import patch_embed
from internvl_rt.kernels.place_visual_tokens import place_visual_tokens
from internvl_rt.kernels.prefill_attention import prefill_attention
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv
from internvl_rt.kernels.resize_tiles import resize_tiles
from internvl_rt.kernels.rms_norm import rms_norm
from internvl_rt.kernels.swiglu import swiglu
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm
from internvl_rt.kernels.vit_attention import vit_attention
from internvl_rt.ops import Batch, Linear, Norm, Ops, bias_of, qk_weights


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
    qkv_TK = _linear(_norm(x_TD, norm), qkv)
    weights = qk_weights(q_norm, k_norm)
    return qkv_rope_kv(qkv_TK, *weights, position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T)


def _paged_attention(q_THC: Tensor, k_cache_BGPC: Tensor, v_cache_BGPC: Tensor, batch: Batch) -> Tensor:
    """Sequences with one new token by the split kernel, the others behind them by the causal one."""
    y_THC, n = torch.empty_like(q_THC), batch.num_decodes
    if n > 0:
        assert batch.split_start_S1 is not None, "a cache for these kernels plans the splits"
        assert batch.split_W3 is not None, "a cache for these kernels plans the splits"
        decodes = batch.block_table_SN[:n], batch.seq_len_S[:n], batch.split_start_S1[: n + 1], batch.split_W3
        decode_attention(q_THC[:n], k_cache_BGPC, v_cache_BGPC, *decodes, out=y_THC[:n])
    if n < len(batch.seq_len_S):
        chunks = batch.block_table_SN[n:], batch.query_start_S1[n:], batch.seq_len_S[n:]
        prefill_attention(q_THC, k_cache_BGPC, v_cache_BGPC, *chunks, batch.max_query_len, out=y_THC)
    return y_THC


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
    place_visual_tokens=place_visual_tokens,
    norm_qkv_rope_kv=_norm_qkv_rope_kv,
    paged_attention=_paged_attention,
    norm_linear=lambda x, norm, part: _linear(_norm(x, norm), part),
    norm_linear_swiglu=lambda x, norm, gate_up: swiglu(_linear(_norm(x, norm), gate_up)),
    linear_residual=lambda y, part, x: linear_residual(y, part.weight_NK, part.bias_N, x, None, out=x),
)
