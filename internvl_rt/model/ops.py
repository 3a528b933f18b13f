"""The operations that the model is written against, as one frozen table.

`TORCH` holds the references, which are plain torch and run on any device. `ops_triton` makes tables of the kernels in
`kernels/`. An engine picks one table when it is built and hands it down; nothing that computes asks which one it is.

A layer of either tower is five moves:

  decoder: norm + linear + rotary + KV write, attention, linear + residual, norm + linear + SwiGLU, linear + residual
  ViT: linear, attention, linear + residual + norm, linear + GELU, linear + residual + norm

In a decode step each move of the decoder is one kernel, which has the norm in front; `mlp` is the last two of them,
or a mixture of experts. The ViT always has a thousand rows or more; its norms come last, so that residual, LayerScale
and norm are one pass over the rows. A product takes a linear of any kind (`linear.py`): a table has kernels for it, or
multiplies the weight out first.

`kernels/_contract.py` explains the dimension letters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from internvl_rt.kernels._kv_numbers import KV_FORMATS as KV_FORMATS
from internvl_rt.kernels._paged_attention import paged_attention_reference
from internvl_rt.kernels.copy_blocks import copy_blocks_reference
from internvl_rt.kernels.dequantise import dequantise_reference
from internvl_rt.kernels.embed_tokens import FIRST_VISUAL_ID as FIRST_VISUAL_ID
from internvl_rt.kernels.embed_tokens import embed_tokens_reference
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.patch_embed import normalise_tiles_reference, patch_embed_reference
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv_reference
from internvl_rt.kernels.resize_tiles import resize_tiles_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.route_experts import route_experts_reference
from internvl_rt.kernels.sample import sample_reference
from internvl_rt.kernels.swiglu import clamped_swiglu_reference, swiglu_reference
from internvl_rt.kernels.unshuffle_project import unshuffle_project_reference
from internvl_rt.kernels.vit_attention import vit_attention_reference
from internvl_rt.model.linear import (
    AnyLinear,
    Experts,
    GatedMlp,
    Linear,
    Linear4,
    Linear8,
    Norm,
    bias_of,
    qk_weights,
    round_inputs,
)
from internvl_rt.model.step_inputs import Batch, HostTokens, LayerCache, Rotary, Sampling

Activation = Literal["none", "gelu", "swiglu"]

normalise_tiles = normalise_tiles_reference  # tiles as the official code gives them to its model


@dataclass(frozen=True, eq=False, kw_only=True)
class Ops:
    """One implementation of every operation, and what it can do.

    captures_graphs: whether CUDA graphs can be captured, because no operation waits for the device
    resizes_on_device: whether pictures are cut into tiles on the model's device; else the CPU does it, to the same bits
    writes_to_host: whether `sample` in a graph writes to the host's memory; else a copy follows the graph
    row_multiple: logits are read fastest if each of their rows begins at a multiple of so many elements
    num_split_items(num_rows, num_kv_heads): how many items a split plan of decode attention has, which the KV cache
        fills; 0 where no plan is wanted

    The other fields are functions of plain tensors. Each is the reference or the launcher of the file in `kernels/`
    that has its name; that file explains it. The methods unpack weights and call these functions; `paged_attention`
    and `sample`, which are methods only, are the references here.
    A method may write its result into the `residual` that it is given.
    """

    name: str
    captures_graphs: bool
    resizes_on_device: bool
    writes_to_host: bool
    row_multiple: int
    num_split_items: Callable[[int, int], int]
    resize_tiles: Callable[[Tensor, int, int, int, bool], Tensor]
    patch_embed: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    gemm_epilogue: Callable[..., Tensor]
    swiglu: Callable[[Tensor], Tensor]
    vit_attention: Callable[[Tensor, int, int, Tensor | None, Tensor | None, float], Tensor]
    unshuffle_project: Callable[..., Tensor]
    embed_tokens: Callable[..., Tensor]
    qkv_rope_kv: Callable[..., Tensor]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]
    dequantise: Callable[..., Tensor]

    def prepare_linear(self, linear: AnyLinear) -> AnyLinear:
        """Returns a weight, once it is loaded, as this table multiplies it fastest: itself or another."""
        return linear

    def dense(self, linear: AnyLinear, dtype: torch.dtype) -> Tensor:
        """Returns W [N, K] of a linear of any kind; that of a dense one is in `dtype` already."""
        match linear:
            case Linear():
                return linear.weight_NK
            case Linear8():
                return self.dequantise(linear.weight_NK, linear.scale_NG, None, linear.num_inputs, dtype=dtype)
            case Linear4():
                numbers = linear.words_NW, linear.scale_NG, linear.zero_NG, linear.num_inputs
                return self.dequantise(*numbers, group=linear.group, dtype=dtype)

    def product(self, x: Tensor, linear: AnyLinear, bias_N: Tensor | None, **after: Any) -> Tensor:
        """Computes x W^T + b, and what else `gemm_epilogue` does, for a linear of any kind.

        The references round the inputs as the kind says. Other tables may leave them as they are.
        """
        if isinstance(linear, Linear8):
            x = round_inputs(x, linear)
        return self.gemm_epilogue(x, self.dense(linear, x.dtype), bias_N, **after)

    def check_cache(self, dtype: torch.dtype, device: torch.device) -> None:
        """Raises RequestError if this table cannot use a KV cache of this type, which torch's operations always can."""

    def embed_tiles(self, tiles: Tensor, patch: Linear, class_E: Tensor, position_UE: Tensor) -> Tensor:
        """Returns x_RE, patches first, of uint8 tiles [I, S, S, 3] or normalised floating-point tiles [I, 3, S, S]."""
        return self.patch_embed(tiles, patch.weight_NK, bias_of(patch), class_E, position_UE)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        if norm.bias_D is None:
            return self.rms_norm(x, norm.weight_D, norm.eps)
        return self.layer_norm(x, norm.weight_D, norm.bias_D, norm.eps)

    def linear(
        self,
        x: Tensor,
        linear: AnyLinear,
        *,
        norm: Norm | None = None,
        bias: bool = True,
        activation: Activation = "none",
        residual: Tensor | None = None,
        scale_N: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes activation(norm(x) W^T + b), or with a residual: residual + scale * (norm(x) W^T + b).

        bias: False leaves out b
        activation: for "swiglu" the rows of W are gate, then up
        scale_N: LayerScale, which only a product with a residual has
        out: memory for the result; its rows may have gaps between them
        """
        if norm is not None:
            x = self.norm(x, norm)  # `x` is the only name, so that each result is freed once the next one is computed
        is_gated = activation == "swiglu"
        x = self.product(
            x,
            linear,
            linear.bias_N if bias else None,
            activation="none" if is_gated else activation,
            residual=residual,
            scale_N=scale_N,
            out=None if is_gated else out,
        )
        if is_gated:
            x = self.swiglu(x)
        return x if out is None or x is out else out.copy_(x)

    def mlp(self, x_TD: Tensor, norm: Norm, mlp: GatedMlp | Experts) -> Tensor:
        """Computes the decoder's last two moves, x + MLP(norm(x))."""
        if isinstance(mlp, GatedMlp):
            return self.gated_mlp(x_TD, norm, mlp)
        return self.mix_experts(self.norm(x_TD, norm), mlp, residual_TD=x_TD)

    def gated_mlp(self, x_TD: Tensor, norm: Norm, mlp: GatedMlp) -> Tensor:
        """Computes x + SwiGLU(norm(x) W_gate_up^T) W_down^T."""
        y_TF = self.linear(x_TD, mlp.gate_up, norm=norm, activation="swiglu")
        return self.linear(y_TF, mlp.down, residual=x_TD)

    def mix_experts(self, x_TD: Tensor, experts: Experts, residual_TD: Tensor | None = None) -> Tensor:
        """Computes residual + sum of p_j MLP_j(x) over the experts j that each token has chosen.

        Of a rank they are those that are here. The references go through the experts one by one, on the host.
        """
        logits_TX = self.linear(x_TD, experts.router)
        here = {"first": experts.first_here, "count": experts.num_here}
        routing = route_experts_reference(
            logits_TX, experts.num_chosen, 1, renormalise=experts.renormalises, **here
        )  # in blocks of 1 pair: each has its expert
        num_X = torch.bincount(routing.block_expert_B[routing.block_expert_B >= 0])
        pairs_X = torch.split(routing.pair_W[: int(num_X.sum())], num_X.tolist())
        sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for index in num_X.nonzero().view(-1).tolist():
            pair_Q, mlp = pairs_X[index], experts.expert(index)
            token_Q = pair_Q // experts.num_chosen
            if experts.gate == "silu":
                h_QF = self.linear(x_TD[token_Q], mlp.gate_up, activation="swiglu")
            else:
                h_QF = clamped_swiglu_reference(self.linear(x_TD[token_Q], mlp.gate_up))
            y_QD = self.linear(h_QF, mlp.down)
            sum_TD.index_add_(0, token_Q, y_QD.float() * routing.weight_TJ.view(-1)[pair_Q, None])
        return sum_TD.to(x_TD.dtype) if residual_TD is None else residual_TD + sum_TD.to(x_TD.dtype)

    def linear_residual_norm(
        self, y: Tensor, linear: AnyLinear, residual: Tensor, scale_N: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """Computes x = residual + scale * (y W^T + b), and norm(x). Without a norm both results are x."""
        x = self.linear(y, linear, residual=residual, scale_N=scale_N)
        return x, x if norm is None else self.norm(x, norm)

    def norm_qkv_rope_kv(
        self,
        x_TD: Tensor,
        norm: Norm,
        qkv: AnyLinear,
        q_norm: Norm | None,
        k_norm: Norm | None,
        position_T: Tensor,
        rotary: Rotary,
        cache: LayerCache,
        slot_T: Tensor,
    ) -> Tensor:
        """Returns the rotated q_THC. Writes rotated keys and values of the tokens to their slots in the cache."""
        where = position_T, rotary.inv_freq_C, cache.k_cache_BGPC, cache.v_cache_BGPC, slot_T
        scales, qkv_TK = (cache.scale_BGP2, cache.static_scale_2), self.linear(x_TD, qkv, norm=norm)
        return self.qkv_rope_kv(qkv_TK, *qk_weights(q_norm, k_norm), *where, *scales, rope_scale=rotary.scale)

    def attend_tiles(
        self, qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None
    ) -> Tensor:
        """Computes y_RE of the ViT's attention. A patch attends to all patches of its tile."""
        return self.vit_attention(qkv_RK, num_tiles, head_dim, *qk_weights(q_norm, k_norm))

    def paged_attention(
        self,
        q_THC: Tensor,
        cache: LayerCache,
        batch: Batch,
        upcoming: tuple[AnyLinear, ...] = (),
        *,
        sinks_H: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Computes y_THC of the decoder's attention: a token attends to itself and to all before it in its sequence.

        upcoming: what the next moves multiply with, in order. A table may bring these weights nearer to where they will
        be needed while this move leaves the memory idle; the result is the same.
        sinks_H: a logit of each query head without a value, which has a share in its softmax
        window: how many tokens up to itself a token attends to; None: all. Blocks before those are not read.
        """
        decodes = torch.arange(batch.num_decodes, dtype=torch.int32, device=q_THC.device)
        where = batch.block_table_SN, torch.cat((decodes, batch.query_start_R1)), batch.seq_len_S
        operands = q_THC, cache.k_cache_BGPC, cache.v_cache_BGPC, *where, cache.scale_BGP2
        return paged_attention_reference(*operands, sinks_H=sinks_H, window=window)

    def merge_patches(
        self, x_RE: Tensor, num_tiles: int, norm: Norm, linear: AnyLinear, factor: int, version: Literal["v1", "v2"]
    ) -> Tensor:
        """Computes y_IMN = GELU(norm(z) W^T + b), where a row of z is factor * factor patches of the ViT."""
        weights = norm.weight_D, bias_of(norm), norm.eps, self.dense(linear, x_RE.dtype), bias_of(linear)
        return self.unshuffle_project(x_RE, num_tiles, *weights, factor, version)

    def sample(
        self, logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor, on_host: HostTokens | None = None
    ) -> None:
        """Draws a token from each row of logits, into `token_id_R` (int64): -1 if the row is not finite.

        on_host: where the tokens go besides.
        """
        token_id_R.copy_(sample_reference(logits_RV, *sampling))
        if on_host is not None:
            on_host.token_id_KR[int(on_host.row_1)][: len(token_id_R)].copy_(token_id_R)


TORCH = Ops(
    name="torch",
    captures_graphs=False,
    resizes_on_device=False,
    writes_to_host=False,
    row_multiple=1,
    num_split_items=lambda num_rows, num_kv_heads: 0,
    resize_tiles=resize_tiles_reference,
    patch_embed=patch_embed_reference,
    layer_norm=layer_norm_reference,
    rms_norm=rms_norm_reference,
    gemm_epilogue=gemm_epilogue_reference,
    swiglu=swiglu_reference,
    vit_attention=vit_attention_reference,
    unshuffle_project=unshuffle_project_reference,
    embed_tokens=embed_tokens_reference,
    qkv_rope_kv=qkv_rope_kv_reference,
    copy_blocks=copy_blocks_reference,
    dequantise=dequantise_reference,
)
