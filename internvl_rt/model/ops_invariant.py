"""Tables of the Triton kernels with which results do not depend, to the bit, on what else is computed with them.

A product, and attention, add up in an order that follows from the blocks in which they are computed. `ops_triton` takes
the fastest blocks for a number of rows, or lets a library choose. Here one choice serves every number of rows, so a
token gets the same bits alone and beside others, in whatever chunks its prompt is computed:

  * a product is the fused kernel with one tiling; every element is one sum over K
  * attention of the decoder is one kernel, for prompts and decodes, in which one program reads all keys of a query
  * attention of the ViT has one plan for any number of tiles

All other kernels compute each row by itself.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from internvl_rt.kernels._expert_plan import BLOCKS
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels._plans import choose_attention_plan
from internvl_rt.kernels._prefill_plan import SplitRule
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue
from internvl_rt.kernels.prefill_attention import prefill_attention
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm
from internvl_rt.kernels.vit_attention import vit_attention
from internvl_rt.model.linear import AnyLinear, Experts
from internvl_rt.model.ops import Ops
from internvl_rt.model.ops_triton import TritonOps, triton_ops
from internvl_rt.model.step_inputs import Batch, LayerCache

TILING = "low"  # of `kernels/_plans.py`: the one with the fewest rows, since decode steps have few
NOT_SPLIT = SplitRule(min_keys=1, num_splits=1)
TILES_OF_PLAN = 13  # the number of tiles whose measured plan serves all


@dataclass(frozen=True, eq=False, kw_only=True)
class InvariantOps(TritonOps):
    """Calls the same kernels for any number of rows."""

    _starts: dict[torch.device, Tensor] = field(default_factory=dict)  # 0, 1, 2, ...: where each decode's query is

    linear = Ops.linear
    gated_mlp = Ops.gated_mlp
    linear_residual_norm = Ops.linear_residual_norm
    norm_qkv_rope_kv = Ops.norm_qkv_rope_kv

    def mix_experts(self, x_TD: Tensor, experts: Experts, residual_TD: Tensor | None = None) -> Tensor:
        """Computes `Ops.mix_experts` in blocks of one size."""
        return self._mix(x_TD, experts, self.linear(x_TD, experts.router), BLOCKS[0], residual_TD)

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
        """Computes `Ops.paged_attention`. A sequence that decodes is a prompt of one token."""
        y_THC, n = torch.empty_like(q_THC), batch.num_decodes
        caches, scale_BGP2 = (cache.k_cache_BGPC, cache.v_cache_BGPC), cache.scale_BGP2
        how: dict[str, Any] = {"splits": NOT_SPLIT, "sinks_H": sinks_H, "window": window, "out": y_THC}
        if n > 0:
            rows = batch.block_table_SN[:n], self._query_starts(n, q_THC.device), batch.seq_len_S[:n]
            prefill_attention(q_THC, *caches, *rows, 1, scale_BGP2, **how)
        if n < len(batch.seq_len_S):
            rows = batch.block_table_SN[n:], batch.query_start_R1, batch.seq_len_S[n:]
            prefill_attention(q_THC, *caches, *rows, batch.max_query_len, scale_BGP2, **how)
        return y_THC

    def _query_starts(self, num_decodes: int, device: torch.device) -> Tensor:
        known = self._starts.get(device)
        if known is None or len(known) <= num_decodes:
            known = self._starts[device] = torch.arange(2 * num_decodes + 1, dtype=torch.int32, device=device)
        return known[: num_decodes + 1]


def invariant_ops(device: torch.device) -> InvariantOps:
    """Makes a table for one stream of a device. Raises RequestError for a device on which the kernels cannot run."""
    base = triton_ops(device)
    fields = {name: value for name, value in vars(base).items() if not name.startswith("_")}
    return replace(
        InvariantOps(**fields),
        name="triton, batch invariant",
        num_split_items=lambda num_rows, num_kv_heads: 0,
        gemm_epilogue=partial(gemm_epilogue, plan=TILING),
        vit_attention=_attend_tiles,
        unshuffle_project=_project,
    )


def _project(
    x_RE: Tensor,
    num_tiles: int,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor,
    factor: int,
    version: Literal["v1", "v2"],
) -> Tensor:
    x_IMK = unshuffle_norm(x_RE, num_tiles, norm_weight_K, norm_bias_K, eps, factor, version)
    return gemm_epilogue(x_IMK, weight_NK, bias_N, activation="gelu", plan=TILING)


def _attend_tiles(
    qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm_E: Tensor | None, k_norm_E: Tensor | None, eps: float
) -> Tensor:
    num_patches, num_heads = len(qkv_RK) // max(num_tiles, 1) - 1, qkv_RK.shape[1] // (3 * head_dim)
    sizes = TILES_OF_PLAN, num_patches, num_heads, head_dim
    plan = choose_attention_plan(*sizes, qkv_RK.dtype, target_of(qkv_RK.device))
    return vit_attention(qkv_RK, num_tiles, head_dim, q_norm_E, k_norm_E, eps, plan=plan)
