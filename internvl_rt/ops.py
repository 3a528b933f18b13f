"""The operations that the model is written against, as one frozen table of functions.

`TORCH` holds the references: plain torch, any device. A table of Triton launchers is another value of the same type;
an engine picks one table when it is built and hands it down, and nothing below asks which one it is.

Both towers are the same five moves: norm + linear (decoder: + rotary + KV write), attention, linear + residual,
norm + linear + activation, linear + residual. Dimension letters: `kernels/_contract.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels.gemm_epilogue import linear_gelu_reference, linear_residual_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.paged_attention import paged_attention_reference
from internvl_rt.kernels.patch_embed import patch_embed_reference
from internvl_rt.kernels.place_visual_tokens import place_visual_tokens_reference
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.swiglu import swiglu_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import vit_attention_reference


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b."""

    weight_NK: Tensor
    bias_N: Tensor | None


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm with a bias; RMSNorm without one."""

    weight_D: Tensor
    bias_D: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every operation.

    patch_embed(tiles, patch, class_E, position_UE) -> x_RE, patches first
    norm_linear(x, norm, linear) -> y
    norm_linear_gelu(x, norm, linear) -> y
    norm_linear_swiglu(x_TD, norm, gate_up) -> y_TF
    linear_residual(x, linear, residual, scale_N or None) -> y
    vit_attention(qkv_RK, num_tiles, head_dim, q_norm or None, k_norm or None) -> y_RE
    unshuffle_norm_linear_gelu(x_RE, num_tiles, norm, linear, factor, version) -> y_IMD
    linear(x, linear) -> y
    place_visual_tokens(x_TD, visual_XD, row_X), in place
    norm_qkv_rope_kv(x_TD, norm, qkv, q_norm or None, k_norm or None,
                     position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T) -> q_THC; writes k and v
    paged_attention(q_THC, k_cache_BGPC, v_cache_BGPC, block_table_SN, query_start_S1, seq_len_S) -> y_THC
    """

    name: str
    patch_embed: Callable[[Tensor, Linear, Tensor, Tensor], Tensor]
    norm_linear: Callable[[Tensor, Norm, Linear], Tensor]
    norm_linear_gelu: Callable[[Tensor, Norm, Linear], Tensor]
    norm_linear_swiglu: Callable[[Tensor, Norm, Linear], Tensor]
    linear_residual: Callable[[Tensor, Linear, Tensor, Tensor | None], Tensor]
    vit_attention: Callable[[Tensor, int, int, Norm | None, Norm | None], Tensor]
    unshuffle_norm_linear_gelu: Callable[[Tensor, int, Norm, Linear, int, Literal["v1", "v2"]], Tensor]
    linear: Callable[[Tensor, Linear], Tensor]
    place_visual_tokens: Callable[[Tensor, Tensor, Tensor], None]
    norm_qkv_rope_kv: Callable[
        [Tensor, Norm, Linear, Norm | None, Norm | None, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
    ]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.bias_D is None:
        return rms_norm_reference(x, norm.weight_D, norm.eps)
    return layer_norm_reference(x, norm.weight_D, norm.bias_D, norm.eps)


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight_NK, linear.bias_N)


def _patch_embed(tiles: Tensor, patch: Linear, class_E: Tensor, position_UE: Tensor) -> Tensor:
    assert patch.bias_N is not None, "the patch embedding of InternViT has a bias"
    return patch_embed_reference(tiles, patch.weight_NK, patch.bias_N, class_E, position_UE)


def _norm_linear_gelu(x: Tensor, norm: Norm, linear: Linear) -> Tensor:
    return linear_gelu_reference(_norm(x, norm), linear.weight_NK, linear.bias_N)


def _vit_attention(qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
    if q_norm is None or k_norm is None:
        return vit_attention_reference(qkv_RK, num_tiles, head_dim, None, None, 0.0)
    return vit_attention_reference(qkv_RK, num_tiles, head_dim, q_norm.weight_D, k_norm.weight_D, q_norm.eps)


def _unshuffle_norm_linear_gelu(
    x_RE: Tensor, num_tiles: int, norm: Norm, linear: Linear, factor: int, version: Literal["v1", "v2"]
) -> Tensor:
    assert norm.bias_D is not None, "the projector's norm is a LayerNorm"
    y_IMK = unshuffle_norm_reference(x_RE, num_tiles, norm.weight_D, norm.bias_D, norm.eps, factor, version)
    return linear_gelu_reference(y_IMK, linear.weight_NK, linear.bias_N)


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
    q_norm_C = None if q_norm is None else q_norm.weight_D
    k_norm_C = None if k_norm is None else k_norm.weight_D
    qkv_TK = _linear(_norm(x_TD, norm), qkv)
    return qkv_rope_kv_reference(
        qkv_TK, q_norm_C, k_norm_C, norm.eps, position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T
    )


TORCH = Ops(
    name="torch",
    patch_embed=_patch_embed,
    norm_linear=lambda x, norm, linear: _linear(_norm(x, norm), linear),
    norm_linear_gelu=_norm_linear_gelu,
    norm_linear_swiglu=lambda x, norm, gate_up: swiglu_reference(_linear(_norm(x, norm), gate_up)),
    linear_residual=lambda x, linear, residual, scale: linear_residual_reference(
        x, linear.weight_NK, linear.bias_N, residual, scale
    ),
    vit_attention=_vit_attention,
    unshuffle_norm_linear_gelu=_unshuffle_norm_linear_gelu,
    linear=_linear,
    place_visual_tokens=place_visual_tokens_reference,
    norm_qkv_rope_kv=_norm_qkv_rope_kv,
    paged_attention=paged_attention_reference,
)
