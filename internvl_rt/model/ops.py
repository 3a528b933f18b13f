"""The operations that the model is written against, as one frozen table of functions.

`TORCH` holds the references: plain torch, any device. `TRITON` holds the kernels of `kernels/`, for CUDA. An engine
picks one table when it is built and hands it down, and nothing below asks which one it is.

Both towers are moves of the same kind. The decoder's: norm + linear (+ rotary + KV write), attention, linear +
residual, norm + linear + SwiGLU, linear + residual; a decode step runs each as one kernel, the norm in front. The ViT,
which always has a thousand rows and more, has its norms behind: linear, attention, linear + residual + norm, linear +
GELU, linear + residual + norm, so that residual, LayerScale and norm are one pass over the rows.

Dimension letters: `kernels/_contract.py`. `TRITON` may write into `x` where a new `x` is returned for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from internvl_rt.kernels.copy_blocks import copy_blocks_reference
from internvl_rt.kernels.embed_tokens import embed_tokens_reference
from internvl_rt.kernels.gemm_epilogue import linear_gelu_reference, linear_reference, linear_residual_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.paged_attention import paged_attention_reference
from internvl_rt.kernels.patch_embed import patch_embed_reference
from internvl_rt.kernels.place_visual_tokens import place_visual_tokens_reference
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv_reference
from internvl_rt.kernels.resize_tiles import resize_tiles_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.sample import sample_reference
from internvl_rt.kernels.swiglu import swiglu_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import vit_attention_reference
from internvl_rt.model.step_inputs import Batch, Sampling

ROW_MULTIPLE = 16  # Triton asks of a stride whether it is a multiple of 16; for loads of 16 bytes 8 would be enough


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


def sampling_arguments(sampling: Sampling) -> dict[str, Tensor]:
    """By name, as the kernel and its reference take them."""
    return {field.name: getattr(sampling, field.name) for field in fields(sampling)}


def padded_rows(num_rows: int, width: int, like: Tensor) -> Tensor:
    """Memory for rows [num_rows, width], each of which begins at a multiple of ROW_MULTIPLE elements."""
    stride = -(-width // ROW_MULTIPLE) * ROW_MULTIPLE
    return torch.empty(num_rows, stride, dtype=like.dtype, device=like.device)[:, :width]


def bias_of(part: Linear | Norm) -> Tensor:
    """Of a part that always has one: the patch embedding, and the projector's norm, which is a LayerNorm."""
    bias = part.bias_N if isinstance(part, Linear) else part.bias_D
    assert bias is not None, "this part of every InternVL has a bias"
    return bias


def qk_weights(q_norm: Norm | None, k_norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weights of the norms on q and k, and their eps; no weights where there are no norms."""
    if q_norm is None or k_norm is None:
        return None, None, 0.0
    return q_norm.weight_D, k_norm.weight_D, q_norm.eps


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every operation, and what it can do.

    plans_splits: decode attention wants a split plan, which the KV cache makes
    captures_graphs: nothing waits for the device, so that CUDA graphs can be captured of it
    resizes_on_device: pictures are cut into tiles where the model runs; else on the CPU, to the same bits

    resize_tiles(image_HW3, columns, rows, size, thumbnail) -> tiles
    patch_embed(tiles, patch, class_E, position_UE) -> x_RE, patches first
    norm(x_RE, norm) -> n_RE
    vit_attention(qkv_RK, num_tiles, head_dim, q_norm or None, k_norm or None) -> y_RE
    linear(x, linear) -> y
    linear_gelu(x, linear) -> y
    linear_residual_norm(y_RK, linear, x_RE, scale_E, norm or None) -> new x_RE, n_RE; without a norm n_RE is x_RE
    unshuffle_norm(x_RE, num_tiles, norm, factor, version) -> y_IMK
    embed_tokens(token_id_T, drawn_R, embedding_VD) -> x_TD
    place_visual_tokens(x_TD, visual_XD, row_X), in place
    norm_qkv_rope_kv(x_TD, norm, qkv, q_norm or None, k_norm or None,
                     position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T) -> q_THC; writes k and v
    paged_attention(q_THC, k_cache_BGPC, v_cache_BGPC, batch) -> y_THC
    norm_linear(x, norm, linear, out or None) -> y, which is out where that is given; its rows may lie apart
    norm_linear_swiglu(x_TD, norm, gate_up) -> y_TF
    linear_residual(y, linear, x_TD) -> new x_TD
    sample(logits_RV, sampling, token_id_R); writes the last
    copy_blocks(pool_LKBGPC, source_N, destination_N), in place
    """

    name: str
    plans_splits: bool
    captures_graphs: bool
    resizes_on_device: bool
    resize_tiles: Callable[[Tensor, int, int, int, bool], Tensor]
    patch_embed: Callable[[Tensor, Linear, Tensor, Tensor], Tensor]
    norm: Callable[[Tensor, Norm], Tensor]
    vit_attention: Callable[[Tensor, int, int, Norm | None, Norm | None], Tensor]
    linear: Callable[[Tensor, Linear], Tensor]
    linear_gelu: Callable[[Tensor, Linear], Tensor]
    linear_residual_norm: Callable[[Tensor, Linear, Tensor, Tensor, Norm | None], tuple[Tensor, Tensor]]
    unshuffle_norm: Callable[[Tensor, int, Norm, int, Literal["v1", "v2"]], Tensor]
    embed_tokens: Callable[[Tensor, Tensor, Tensor], Tensor]
    place_visual_tokens: Callable[[Tensor, Tensor, Tensor], None]
    norm_qkv_rope_kv: Callable[
        [Tensor, Norm, Linear, Norm | None, Norm | None, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
    ]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
    norm_linear: Callable[[Tensor, Norm, Linear, Tensor | None], Tensor]
    norm_linear_swiglu: Callable[[Tensor, Norm, Linear], Tensor]
    linear_residual: Callable[[Tensor, Linear, Tensor], Tensor]
    sample: Callable[[Tensor, Sampling, Tensor], None]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]


def _norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.bias_D is None:
        return rms_norm_reference(x, norm.weight_D, norm.eps)
    return layer_norm_reference(x, norm.weight_D, norm.bias_D, norm.eps)


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return linear_reference(x, linear.weight_NK, linear.bias_N)


def _patch_embed(tiles: Tensor, patch: Linear, class_E: Tensor, position_UE: Tensor) -> Tensor:
    return patch_embed_reference(tiles, patch.weight_NK, bias_of(patch), class_E, position_UE)


def _vit_attention(qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
    return vit_attention_reference(qkv_RK, num_tiles, head_dim, *qk_weights(q_norm, k_norm))


def _linear_residual_norm(
    y_RK: Tensor, linear: Linear, x_RE: Tensor, scale_E: Tensor, norm: Norm | None
) -> tuple[Tensor, Tensor]:
    x_RE = linear_residual_reference(y_RK, linear.weight_NK, linear.bias_N, x_RE, scale_E)
    return x_RE, x_RE if norm is None else _norm(x_RE, norm)


def _unshuffle_norm(x_RE: Tensor, num_tiles: int, norm: Norm, factor: int, version: Literal["v1", "v2"]) -> Tensor:
    return unshuffle_norm_reference(x_RE, num_tiles, norm.weight_D, bias_of(norm), norm.eps, factor, version)


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
    return qkv_rope_kv_reference(qkv_TK, *weights, position_T, inv_freq_C, k_cache_BGPC, v_cache_BGPC, slot_T)


def _norm_linear(x: Tensor, norm: Norm, linear: Linear, out: Tensor | None) -> Tensor:
    y = _linear(_norm(x, norm), linear)
    return y if out is None else out.copy_(y)


def _sample(logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor) -> None:
    token_id_R.copy_(sample_reference(logits_RV, **sampling_arguments(sampling)))


TORCH = Ops(
    name="torch",
    plans_splits=False,
    captures_graphs=False,
    resizes_on_device=False,
    resize_tiles=resize_tiles_reference,
    patch_embed=_patch_embed,
    norm=_norm,
    vit_attention=_vit_attention,
    linear=_linear,
    linear_gelu=lambda x, linear: linear_gelu_reference(x, linear.weight_NK, linear.bias_N),
    linear_residual_norm=_linear_residual_norm,
    unshuffle_norm=_unshuffle_norm,
    embed_tokens=embed_tokens_reference,
    place_visual_tokens=place_visual_tokens_reference,
    norm_qkv_rope_kv=_norm_qkv_rope_kv,
    paged_attention=lambda q, k_cache, v_cache, batch: paged_attention_reference(
        q, k_cache, v_cache, batch.block_table_SN, batch.query_start_S1, batch.seq_len_S
    ),
    norm_linear=_norm_linear,
    norm_linear_swiglu=lambda x, norm, gate_up: swiglu_reference(_linear(_norm(x, norm), gate_up)),
    linear_residual=lambda y, linear, x: linear_residual_reference(y, linear.weight_NK, linear.bias_N, x, None),
    sample=_sample,
    copy_blocks=copy_blocks_reference,
)
