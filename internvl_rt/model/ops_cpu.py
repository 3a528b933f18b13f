"""A table for CPUs: the references, but with what torch has for CPUs where that is faster. No kernel of it is ours.

  * A product is oneDNN's, which is compiled for the processor at hand, in place of MKL's, but for many rows of float32
    where there is no AVX512. Where there is, weights are laid out anew for it when they are loaded.
  * What all layers of a step need is computed once: the rotation of its positions, its places in the cache, and which
    blocks the sequences that decode read.
  * Attention of the sequences that decode is one call of torch's attention, which takes each block of the cache as an
    item of a batch, where it lies. The parts of a sequence are then added up.

oneDNN adds up in an order that does not depend on how many threads compute; MKL, which multiplies in attention too, may
not. `bench/FACTS.md`, 47, has the measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.errors import RequestError
from internvl_rt.kernels._paged_attention import paged_attention_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import tile_tokens
from internvl_rt.model.linear import Linear, Norm, bias_of
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.processor import has_amx, has_avx512, multiplies, runs_onednn
from internvl_rt.model.step_inputs import Batch, LayerCache

T = TypeVar("T")

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x, W and b: x W^T + b

MKL_ROWS = 256  # with AVX2, up to so many rows of float32 oneDNN is faster than MKL; with more MKL is, by a quarter
PACKED_ROWS = 16  # the number of rows that packed weights are told to expect; the format is the same from 2 rows on
FEW_ROWS = 16  # of half precision that torch multiplies fast enough on a processor that cannot
COPIED = 4 << 20  # so many weights are copied at once, so many numbers of keys, and so many scores written


class Rotation(NamedTuple):
    """cos and sin of a step's angles, float32 [T, 1, C]; the sin of a head's first half is negated."""

    cos_T1C: Tensor
    sin_T1C: Tensor


class BlockReads(NamedTuple):
    """Which blocks of the cache S sequences read: the last one of each, and E entries of others, which are full.

    Behind the last token of a sequence is whatever was there before, perhaps NaN, so last blocks are copied.
    """

    last_S: Tensor
    is_behind_S1P1: Tensor  # bool
    bias_S11P: Tensor  # 0, and -inf behind a sequence's last token
    blocks: slice | Tensor  # of the entries: a range of the cache, or the number of each
    sequence_E: Tensor
    part_SN: Tensor  # where the parts of a sequence are: S of last blocks, then E, then one of nothing


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuOps(Ops):
    """Computes as `Ops` says, but no rows that pad a batch, which only CUDA graphs have.

    A table keeps what belongs to one step, so every engine has its own.

    packs: whether weights are laid out anew when they are loaded, as the processor's instructions take them
    attends_by_products: whether patches and prompts attend by products, which write scores, not by torch's attention
    """

    packs: bool
    attends_by_products: bool
    _of_step: dict[str, tuple[object, Any]] = field(default_factory=dict)  # see _once_a_step

    def prepare_linear(self, linear: Linear) -> Linear:
        if not self.packs:
            return linear
        return Linear(torch.ops.mkldnn._reorder_linear_weight(linear.weight_NK, PACKED_ROWS), linear.bias_N)

    def norm_qkv_rope_kv(
        self,
        x_TD: Tensor,
        norm: Norm,
        qkv: Linear,
        q_norm: Norm | None,
        k_norm: Norm | None,
        position_T: Tensor,
        inv_freq_C: Tensor,
        cache: LayerCache,
        slot_T: Tensor,
    ) -> Tensor:
        _, num_kv_heads, block_size, head_dim = cache.k_cache_BGPC.shape
        rotation = self._once_a_step("rotation", position_T, lambda: rotation_of(position_T, inv_freq_C))
        block_T, place_T = self._once_a_step("places", slot_T, lambda: (slot_T // block_size, slot_T % block_size))
        num_heads = qkv.num_outputs // head_dim - 2 * num_kv_heads
        heads = self.linear(self.norm(x_TD, norm), qkv).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        if q_norm is not None and k_norm is not None:
            q_THC, k_TGC, v_TGC = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
            q_THC, k_TGC = rotate(self.norm(q_THC, q_norm), rotation), rotate(self.norm(k_TGC, k_norm), rotation)
        else:
            turned = rotate(heads[:, : num_heads + num_kv_heads], rotation)
            q_THC, k_TGC, v_TGC = turned[:, :num_heads], turned[:, num_heads:], heads[:, num_heads + num_kv_heads :]
        cache.k_cache_BGPC[block_T, :, place_T] = k_TGC
        cache.v_cache_BGPC[block_T, :, place_T] = v_TGC
        return q_THC

    def attend_tiles(
        self, qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None
    ) -> Tensor:
        if not self.attends_by_products:
            return super().attend_tiles(qkv_RK, num_tiles, head_dim, q_norm, k_norm)
        q_RE, k_RE, v_RE = qkv_RK.chunk(3, dim=-1)
        if q_norm is not None and k_norm is not None:
            q_RE, k_RE = self.norm(q_RE, q_norm), self.norm(k_RE, k_norm)
        tokens_IUE = [tile_tokens(x_RE, num_tiles) for x_RE in (q_RE, k_RE, v_RE)]
        y_IUE = torch.empty_like(tokens_IUE[0])
        for y_UE, *of_tile in zip(y_IUE, *tokens_IUE, strict=True):
            heads_HUC = (x_UE.view(len(x_UE), -1, head_dim).transpose(0, 1) for x_UE in of_tile)
            y_UE.copy_(attend_by_products(*heads_HUC, is_causal=False).flatten(1))
        return torch.cat((y_IUE[:, :-1].flatten(0, 1), y_IUE[:, -1]))

    def paged_attention(
        self, q_THC: Tensor, cache: LayerCache, batch: Batch, upcoming: tuple[Linear, ...] = ()
    ) -> Tensor:
        n, num_seqs = batch.num_decodes, len(batch.seq_len_S)
        decoded_SHC = None
        if n > 0:
            reads = self._once_a_step(
                "reads", batch, lambda: plan_reads(batch, cache.k_cache_BGPC.shape[2], q_THC.dtype)
            )
            decoded_SHC = attend_blocks(q_THC[:n], cache, reads)
            if n == num_seqs:
                return decoded_SHC
        where = batch.block_table_SN[n:], batch.query_start_R1, batch.seq_len_S[n:]
        attend = partial(attend_by_products, is_causal=True) if self.attends_by_products else None
        y_THC = paged_attention_reference(q_THC, cache.k_cache_BGPC, cache.v_cache_BGPC, *where, attend=attend)
        if decoded_SHC is not None:
            y_THC[:n] = decoded_SHC
        return y_THC

    def merge_patches(
        self, x_RE: Tensor, num_tiles: int, norm: Norm, linear: Linear, factor: int, version: Literal["v1", "v2"]
    ) -> Tensor:
        weights = norm.weight_D, bias_of(norm), norm.eps
        x_IMK = unshuffle_norm_reference(x_RE, num_tiles, *weights, factor, version)
        return self.linear(x_IMK, linear, activation="gelu")

    def _once_a_step(self, name: str, of: object, compute: Callable[[], T]) -> T:
        """Computes something of an input of the step in its first layer, and returns it in the others."""
        known = self._of_step.get(name)
        if known is None or known[0] is not of:
            known = self._of_step[name] = of, compute()
        value: T = known[1]
        return value


def rotation_of(position_T: Tensor, inv_freq_C: Tensor) -> Rotation:
    angle_T1C = (position_T[:, None] * inv_freq_C)[:, None]
    cos_T1C, sin_T1C = angle_T1C.cos(), angle_T1C.sin()
    return Rotation(torch.cat((cos_T1C, cos_T1C), -1), torch.cat((-sin_T1C, sin_T1C), -1))


def rotate(x_THC: Tensor, rotation: Rotation) -> Tensor:
    """Rotates as `kernels/qkv_rope_kv.py` does, to the bit."""
    x = x_THC.float()
    turned = x.roll(x.shape[-1] // 2, -1).mul_(rotation.sin_T1C)
    return (x * rotation.cos_T1C).add_(turned).to(x_THC.dtype)


def attend_by_products(q_HTC: Tensor, k_GSC: Tensor, v_GSC: Tensor, *, is_causal: bool) -> Tensor:
    """Computes attention [T, H, C] of T tokens to S, by products that write scores, in float32.

    is_causal: a token attends to itself and to what is before it, and the last of T is the last of S
    """
    (num_heads, num_queries, head_dim), (num_groups, seq_len, _) = q_HTC.shape, k_GSC.shape
    q_GhTC = q_HTC.view(num_groups, -1, num_queries, head_dim)
    y_TGhC = q_HTC.new_empty(num_queries, num_groups, num_heads // num_groups, head_dim)
    size = max(1, COPIED * num_groups // (num_heads * seq_len))
    above_TT = q_HTC.new_full((min(size, num_queries),) * 2, -torch.inf, dtype=torch.float32).triu(1)
    for first in range(0, num_queries, size):
        rows = slice(first, min(first + size, num_queries))
        end = seq_len - num_queries + rows.stop if is_causal else seq_len
        for q_hTC, k_SC, v_SC, y_ThC in zip(q_GhTC, k_GSC, v_GSC, y_TGhC.unbind(1), strict=True):
            q_hTC = q_hTC[:, rows].float() * head_dim**-0.5
            # A weight that has gaps takes oneDNN a thousand times as long.
            scores_RS = onednn_product(q_hTC.reshape(-1, head_dim), k_SC[:end].float().contiguous(), None)
            if is_causal:
                num_new = rows.stop - first
                scores_RS.view(-1, num_new, end)[..., end - num_new :].add_(above_TT[:num_new, :num_new])
            torch.softmax(scores_RS, -1, out=scores_RS)
            y_RC = onednn_product(scores_RS.to(v_SC.dtype), v_SC[:end].t().contiguous(), None)
            y_ThC[rows] = y_RC.view_as(q_hTC).transpose(0, 1)
    return y_TGhC.flatten(1, 2)


def plan_reads(batch: Batch, block_size: int, dtype: torch.dtype) -> BlockReads:
    """Plans attention of the sequences that decode.

    If the full blocks make up at least half of the range in which they lie, and none has two readers, all blocks of the
    range are read where they are, and what is computed of others is not used.
    """
    n = batch.num_decodes
    lens_S, row_S = batch.seq_len_S[:n].long(), torch.arange(n)
    num_full_S = (lens_S - 1) // block_size
    table_SN = batch.block_table_SN[:n, : int(num_full_S.max()) + 1].long()
    is_full_SN = torch.arange(table_SN.shape[1]) < num_full_S[:, None]
    block_E, sequence_E = table_SN[is_full_SN], row_S.repeat_interleave(num_full_S)
    blocks: slice | Tensor = block_E
    entry_E = torch.arange(len(block_E))
    if len(block_E):
        first, last = (int(end) for end in block_E.aminmax())
        if last - first < 2 * len(block_E) and int(block_E.bincount().max()) == 1:
            blocks, entry_E = slice(first, last + 1), block_E - first
            sequence_E = torch.zeros(last + 1 - first, dtype=torch.int64).index_copy_(0, entry_E, sequence_E)
    part_SN = torch.full(table_SN.shape, n + len(sequence_E))
    part_SN[is_full_SN] = n + entry_E
    part_SN[row_S, num_full_S] = row_S
    is_behind_SP = torch.arange(block_size) >= (lens_S - num_full_S * block_size)[:, None]
    return BlockReads(
        last_S=table_SN[row_S, num_full_S],
        is_behind_S1P1=is_behind_SP[:, None, :, None],
        bias_S11P=torch.zeros(n, 1, 1, block_size, dtype=dtype).masked_fill_(is_behind_SP[:, None, None], -torch.inf),
        blocks=blocks,
        sequence_E=sequence_E,
        part_SN=part_SN,
    )


def attend_blocks(q_SHC: Tensor, cache: LayerCache, reads: BlockReads) -> Tensor:
    """Computes attention [S, H, C] of one new token of each sequence: of each block first, then of all together."""
    caches = cache.k_cache_BGPC, cache.v_cache_BGPC
    q_SGhC = q_SHC.view(len(q_SHC), caches[0].shape[1], -1, q_SHC.shape[2])
    last = (cache_BGPC[reads.last_S].masked_fill_(reads.is_behind_S1P1, 0) for cache_BGPC in caches)
    found = [_attend(q_SGhC, *last, attn_mask=reads.bias_S11P.expand(-1, 1, q_SGhC.shape[2], -1))]
    if isinstance(reads.blocks, slice):
        found.append(_attend(q_SGhC[reads.sequence_E], *(cache_BGPC[reads.blocks] for cache_BGPC in caches)))
    elif len(reads.blocks):
        size = max(1, COPIED // caches[0][0].numel())
        for blocks, rows in zip(torch.split(reads.blocks, size), torch.split(reads.sequence_E, size), strict=True):
            found.append(_attend(q_SGhC[rows], *(cache_BGPC[blocks] for cache_BGPC in caches)))
    parts, logsums = (torch.cat(each) for each in zip(*found, strict=True))
    weights = F.pad(logsums, (0, 0, 0, 0, 0, 1), value=-torch.inf)[reads.part_SN].softmax(1)
    parts = F.pad(parts, (0, 0, 0, 0, 0, 0, 0, 1))[reads.part_SN]
    return (weights[..., None] * parts).sum(1).flatten(1, 2).to(q_SHC.dtype)


# Returns attention and the logarithm of the sum of its weights; `scaled_dot_product_attention` returns the first alone.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def onednn_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
    return y


def float_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiplies in float32: many rows by MKL, which `linear` calls, if it is faster."""
    few = x.numel() <= MKL_ROWS * x.shape[-1]
    return onednn_product(x, weight_NK, bias_N) if few or has_avx512() else F.linear(x, weight_NK, bias_N)


def half_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiplies in half precision on a processor that cannot: many rows in float32, with copies of parts of W."""
    if x.numel() // x.shape[-1] <= FEW_ROWS:
        return F.linear(x, weight_NK, bias_N)
    x32, size = x.float(), max(1, COPIED // x.shape[-1])
    biases = [None] * -(-len(weight_NK) // size) if bias_N is None else torch.split(bias_N.float(), size)
    parts = zip(torch.split(weight_NK, size), biases, strict=True)
    return torch.cat([float_product(x32, weight.float(), bias).to(x.dtype) for weight, bias in parts], dim=-1)


def cpu_gemm_epilogue(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    *,
    product: Product,
    activation: Literal["none", "gelu"] = "none",
    residual: Tensor | None = None,
    scale_N: Tensor | None = None,
    out: Tensor | None = None,  # does not change the result, which is new
) -> Tensor:
    y = product(x, weight_NK, bias_N)
    if residual is not None:
        return y.add_(residual) if scale_N is None else torch.addcmul(residual, y, scale_N, out=y)
    return torch.ops.aten.gelu_(y) if activation == "gelu" else y


def cpu_swiglu(gate_up_T2F: Tensor) -> Tensor:
    """Computes SwiGLU; the gate is lost, because memory that the product has just filled is nearer than new memory."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF, inplace=True) * up_TF


def cpu_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight_D.shape, None, eps).to(x.dtype) * weight_D


def cpu_ops(device: torch.device, dtype: torch.dtype) -> CpuOps:
    """Makes a table for one engine. Raises RequestError for a device that oneDNN has no products for."""
    if device.type != "cpu" or not runs_onednn():
        raise RequestError(
            f"backend 'onednn' cannot run on {device}: it needs a CPU with AVX2 and a torch with oneDNN; choose 'torch'"
        )
    is_half = dtype != torch.float32
    product = float_product if not is_half else onednn_product if multiplies(dtype) else half_product
    own = {
        "name": "onednn",
        "gemm_epilogue": partial(cpu_gemm_epilogue, product=product),
        "rms_norm": cpu_rms_norm,
        "swiglu": cpu_swiglu,
    }
    as_in_torch = {one.name: getattr(TORCH, one.name) for one in fields(Ops)}
    return CpuOps(
        **(as_in_torch | own),
        packs=multiplies(dtype) and (is_half or has_avx512()),
        attends_by_products=multiplies(dtype) and has_avx512() and not has_amx(),
    )
