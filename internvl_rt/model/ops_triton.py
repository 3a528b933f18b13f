"""Tables of Triton kernels: `Ops` for CUDA devices (and, slowly, for Triton's interpreter)."""

from dataclasses import dataclass
from typing import Any, Literal

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
from internvl_rt.model.ops import (
    Linear,
    Norm,
    Ops,
    bias_of,
    padded_rows,
    qk_weights,
    sampling_arguments,
)
from internvl_rt.model.step_inputs import Batch, Sampling

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


@dataclass(frozen=True, slots=True)
class Switches:
    """What the kernels can do with and without, so that each can be timed, and a fault can be told from its use."""

    programmatic_launch: bool = True  # kernels of decode steps start before the one before them has ended (sm_90 on)


class _FewRows:
    """The products and the attention of a decode step, and the wider ones of the same moves.

    They share memory between calls, so one of these serves one stream.
    """

    def __init__(self, switches: Switches) -> None:
        self._programmatic_launch = switches.programmatic_launch
        self._workspaces: dict[torch.device, GemvWorkspace] = {}
        self._counters: dict[torch.device, Tensor] = {}

    def norm_linear(self, x: Tensor, norm: Norm, part: Linear, out: Tensor | None) -> Tensor:
        if out is None:
            out = padded_rows(len(x), len(part.weight_NK), x)
        if _is_decode(x, norm):
            weights = part.weight_NK, part.bias_N, norm.weight_D
            return gemv(x, *weights, norm.eps, out=out, **self._shared(x.device))
        return linear(_norm(x, norm), part.weight_NK, part.bias_N, out=out)

    def norm_linear_swiglu(self, x: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        if _is_decode(x, norm):
            weights = gate_up.weight_NK, gate_up.bias_N, norm.weight_D
            return gemv(x, *weights, norm.eps, activation="swiglu", **self._shared(x.device))
        return swiglu(_linear(_norm(x, norm), gate_up))

    def linear_residual(self, y: Tensor, part: Linear, x: Tensor) -> Tensor:
        if _is_decode(y):
            return gemv(y, part.weight_NK, part.bias_N, None, 0.0, residual_RN=x, out=x, **self._shared(x.device))
        return linear_residual(y, part.weight_NK, part.bias_N, x, None, out=x)

    def norm_qkv_rope_kv(
        self,
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
            return gemv_qkv(x_TD, *weights, *where, num_heads, **self._shared(x_TD.device))
        return qkv_rope_kv(_linear(_norm(x_TD, norm), qkv), *qk_weights(q_norm, k_norm), *where)

    def paged_attention(self, q_THC: Tensor, k_cache_BGPC: Tensor, v_cache_BGPC: Tensor, batch: Batch) -> Tensor:
        """Sequences with one new token by the split kernel, the others behind them by the causal one."""
        y_THC, n = torch.empty_like(q_THC), batch.num_decodes
        caches = k_cache_BGPC, v_cache_BGPC
        if n > 0:
            assert batch.split_start_S1 is not None, "a cache for these kernels plans the splits"
            assert batch.split_W3 is not None, "a cache for these kernels plans the splits"
            decodes = batch.block_table_SN[:n], batch.seq_len_S[:n], batch.split_start_S1[: n + 1], batch.split_W3
            counters_SG = self._zero_counters(q_THC.device, n, k_cache_BGPC.shape[1])
            operands = (q_THC[:n], *caches, *decodes, counters_SG)
            decode_attention(*operands, programmatic_launch=self._programmatic_launch, out=y_THC[:n])
        if n < len(batch.seq_len_S):
            chunks = batch.block_table_SN[n:], batch.query_start_S1[n:], batch.seq_len_S[n:]
            prefill_attention(q_THC, *caches, *chunks, batch.max_query_len, out=y_THC)
        return y_THC

    def _shared(self, device: torch.device) -> dict[str, Any]:
        """What every product of few rows is launched with: how, and what its splits leave for the last of them."""
        workspace = self._workspaces.get(device)
        if workspace is None:
            workspace = self._workspaces[device] = build_gemv_workspace(device)
        return {"workspace": workspace, "programmatic_launch": self._programmatic_launch}

    def _zero_counters(self, device: torch.device, rows: int, kv_heads: int) -> Tensor | None:
        """How many splits of a row have arrived, for decode attention: zeros, which every call leaves as zeros.

        None where there are so many that the call must make its own.
        """
        if rows * kv_heads > MAX_COUNTERS:
            return None
        counters = self._counters.get(device)
        if counters is None:
            counters = self._counters[device] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
        return counters[: rows * kv_heads].view(rows, kv_heads)


def _is_decode(x: Tensor, norm: Norm | None = None) -> bool:
    """Whether the rows are few enough to be multiplied as fast as the weight is read; an RMSNorm goes in front."""
    return 0 < len(x) <= MAX_ROWS and (norm is None or norm.bias_D is None)


def _sample(logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor) -> None:
    sample(logits_RV, **sampling_arguments(sampling), out=token_id_R)


def triton_ops(switches: Switches = Switches()) -> Ops:
    """A table with memory of its own that its kernels share: for one stream, so one for each engine."""
    few = _FewRows(switches)
    return Ops(
        name="triton",
        plans_splits=True,
        captures_graphs=True,
        resizes_on_device=True,
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
        norm_qkv_rope_kv=few.norm_qkv_rope_kv,
        paged_attention=few.paged_attention,
        norm_linear=few.norm_linear,
        norm_linear_swiglu=few.norm_linear_swiglu,
        linear_residual=few.linear_residual,
        sample=_sample,
        copy_blocks=copy_blocks,
    )


TRITON = triton_ops()  # for whoever runs the kernels on one stream, without an engine
