"""Attention on a CPU, by what torch and oneDNN have for it.

Sequences that decode attend in one call of torch's attention, which takes each block of the cache as an item of a
batch, where it lies. The parts of a sequence are then added up. Patches and prompts attend by torch's attention or by
products, whichever is faster on the processor.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._kv_numbers import dequantise_heads
from internvl_rt.kernels._paged_attention import first_seen
from internvl_rt.model.processor import has_amx, has_avx512, multiplies
from internvl_rt.model.products_cpu import onednn_product
from internvl_rt.model.step_inputs import Batch, LayerCache

AT_ONCE = 4 << 20  # so many numbers of keys are copied at once, or scores written


class BlockReads(NamedTuple):
    """Which blocks of the cache S sequences read: R edges, of which they see a part, and E entries of others.

    The edges are the last block of each sequence, then those in which a window begins before the last block. Behind the
    last token of a sequence, and before its window, is whatever was there before, perhaps NaN, so edges are copied.
    """

    edge_R: Tensor
    edge_sequence_R: Tensor
    is_outside_R1P1: Tensor  # bool
    bias_R11P: Tensor  # 0, and -inf outside what a sequence sees
    blocks: slice | Tensor  # of the entries: a range of the cache, or the number of each
    sequence_E: Tensor
    part_SN: Tensor  # where the parts of a sequence are: R of edges, then E, then one of nothing


def plan_reads(batch: Batch, block_size: int, dtype: torch.dtype, window: int | None = None) -> BlockReads:
    """Plans attention of the sequences that decode, each to the last `window` of its tokens.

    If the full blocks make up at least half of the range in which they lie, and none has two readers, all blocks of the
    range are read where they are, and what is computed of others is not used.
    """
    n = batch.num_decodes
    lens_S, row_S = batch.seq_len_S[:n].long(), torch.arange(n)
    num_full_S = (lens_S - 1) // block_size
    first_S = torch.zeros_like(lens_S) if window is None else (lens_S - window).clamp_min_(0)
    table_SN = batch.block_table_SN[:n, : int(num_full_S.max()) + 1].long()
    first_full_S = -(-first_S // block_size)
    index_N = torch.arange(table_SN.shape[1])
    is_full_SN = (index_N >= first_full_S[:, None]) & (index_N < num_full_S[:, None])
    begun_B = ((first_S % block_size > 0) & (first_full_S <= num_full_S)).nonzero().flatten()
    edge_sequence_R = torch.cat((row_S, begun_B))
    edge_index_R = torch.cat((num_full_S, first_full_S[begun_B] - 1))
    block_E, sequence_E = table_SN[is_full_SN], row_S.repeat_interleave(is_full_SN.sum(1))
    blocks: slice | Tensor = block_E
    entry_E = torch.arange(len(block_E))
    if len(block_E):
        first, last = (int(end) for end in block_E.aminmax())
        if last - first < 2 * len(block_E) and int(block_E.bincount().max()) == 1:
            blocks, entry_E = slice(first, last + 1), block_E - first
            sequence_E = torch.zeros(last + 1 - first, dtype=torch.int64).index_copy_(0, entry_E, sequence_E)
    num_edges = len(edge_sequence_R)
    part_SN = torch.full(table_SN.shape, num_edges + len(sequence_E))
    part_SN[is_full_SN] = num_edges + entry_E
    part_SN[edge_sequence_R, edge_index_R] = torch.arange(num_edges)
    token_RP = edge_index_R[:, None] * block_size + torch.arange(block_size)
    lens_R1, first_R1 = lens_S[edge_sequence_R, None], first_S[edge_sequence_R, None]
    is_outside_RP = (token_RP >= lens_R1) | (token_RP < first_R1)
    bias_R11P = torch.zeros(num_edges, 1, 1, block_size, dtype=dtype)
    return BlockReads(
        edge_R=table_SN[edge_sequence_R, edge_index_R],
        edge_sequence_R=edge_sequence_R,
        is_outside_R1P1=is_outside_RP[:, None, :, None],
        bias_R11P=bias_R11P.masked_fill_(is_outside_RP[:, None, None], -torch.inf),
        blocks=blocks,
        sequence_E=sequence_E,
        part_SN=part_SN,
    )


def attend_blocks(q_SHC: Tensor, cache: LayerCache, reads: BlockReads, sinks_H: Tensor | None = None) -> Tensor:
    """Computes attention [S, H, C] of one new token of each sequence: of each block first, then of all together.

    A head's sink is one part more, whose values are zeros.
    """
    dtype, blocks_E = q_SHC.dtype, reads.blocks
    q_SGhC = q_SHC.view(len(q_SHC), cache.k_cache_BGPC.shape[1], -1, q_SHC.shape[2])
    edges = (x_RGPC.masked_fill_(reads.is_outside_R1P1, 0) for x_RGPC in _read(cache, reads.edge_R, dtype))
    bias_R1hP = reads.bias_R11P.expand(-1, 1, q_SGhC.shape[2], -1)
    found = [_attend(q_SGhC[reads.edge_sequence_R], *edges, attn_mask=bias_R1hP)]
    if isinstance(blocks_E, slice) and cache.scale_BGP2 is not None:
        blocks_E = torch.arange(blocks_E.start, blocks_E.stop)  # because numbers in 8 bits are copied in any case
    if isinstance(blocks_E, slice):
        found.append(_attend(q_SGhC[reads.sequence_E], *_read(cache, blocks_E, dtype)))
    elif len(blocks_E):
        size = max(1, AT_ONCE // cache.k_cache_BGPC[0].numel())
        for blocks, rows in zip(torch.split(blocks_E, size), torch.split(reads.sequence_E, size), strict=True):
            found.append(_attend(q_SGhC[rows], *_read(cache, blocks, dtype)))
    if len(found) == 1 and len(reads.edge_R) == len(q_SHC) and sinks_H is None:
        ((y_SGhC, _),) = found
        y_SHC: Tensor = y_SGhC.flatten(1, 2)
        return y_SHC
    parts, logsums = (torch.cat(each) for each in zip(*found, strict=True))
    logsums = F.pad(logsums, (0, 0, 0, 0, 0, 1), value=-torch.inf)[reads.part_SN]
    if sinks_H is not None:
        sinks_S1Gh = sinks_H.to(logsums.dtype).view(1, 1, *logsums.shape[2:]).expand(len(q_SHC), -1, -1, -1)
        logsums = torch.cat((logsums, sinks_S1Gh), dim=1)
    weights = logsums.softmax(1)[:, : reads.part_SN.shape[1]]
    parts = F.pad(parts, (0, 0, 0, 0, 0, 0, 0, 1))[reads.part_SN]
    return (weights[..., None] * parts).sum(1).flatten(1, 2).to(q_SHC.dtype)


def _read(cache: LayerCache, blocks: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns keys and values of blocks in the type of the model."""
    k, v = cache.k_cache_BGPC[blocks], cache.v_cache_BGPC[blocks]
    if cache.scale_BGP2 is None:
        return k, v
    k_scale, v_scale = cache.scale_BGP2[blocks].unbind(-1)
    return dequantise_heads(k, k_scale, dtype), dequantise_heads(v, v_scale, dtype)


# Returns attention and the logarithm of the sum of its weights; `scaled_dot_product_attention` returns the first alone.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def products_are_faster(dtype: torch.dtype) -> bool:
    """Says whether attention by products is faster than torch's, which uses AMX but, on some processors, no AVX512."""
    return multiplies(dtype) and has_avx512() and not has_amx()


def attend_by_products(
    q_HTC: Tensor,
    k_GSC: Tensor,
    v_GSC: Tensor,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    *,
    is_causal: bool,
) -> Tensor:
    """Computes attention [T, H, C] of T tokens to S, by products that write scores, in float32.

    is_causal: a token attends to itself and to what is before it, and the last of T is the last of S
    sinks_H, window: as in `paged_attention_reference`; only causal attention has a window
    """
    (num_heads, num_queries, head_dim), (num_groups, seq_len, _) = q_HTC.shape, k_GSC.shape
    q_GhTC = q_HTC.view(num_groups, -1, num_queries, head_dim)
    y_TGhC = q_HTC.new_empty(num_queries, num_groups, num_heads // num_groups, head_dim)
    size = max(1, AT_ONCE * num_groups // (num_heads * seq_len))
    for first in range(0, num_queries, size):
        rows = slice(first, min(first + size, num_queries))
        end = seq_len - num_queries + rows.stop if is_causal else seq_len
        keys = slice(first_seen(end, rows.stop - first, window), end)
        v_GCS = v_GSC[:, keys].transpose(1, 2).contiguous()
        sinks_Gh = [None] * num_groups if sinks_H is None else sinks_H.float().view(num_groups, -1)
        for q_hTC, k_SC, v_CS, y_ThC, sinks_h in zip(q_GhTC, k_GSC, v_GCS, y_TGhC.unbind(1), sinks_Gh, strict=True):
            y_hTC = _attend_group(q_hTC[:, rows], k_SC[keys], v_CS, sinks_h, window, is_causal)
            y_ThC[rows] = y_hTC.transpose(0, 1)
    return y_TGhC.flatten(1, 2)


def _attend_group(
    q_hTC: Tensor, k_SC: Tensor, v_CS: Tensor, sinks_h: Tensor | None, window: int | None, is_causal: bool
) -> Tensor:
    """Computes attention [h, T, C] of the heads that share keys and values."""
    head_dim, (num_new, seq_len) = k_SC.shape[1], (q_hTC.shape[1], len(k_SC))
    q_RC = (q_hTC.float() * head_dim**-0.5).reshape(-1, head_dim)
    scores_RS = onednn_product(q_RC, k_SC.float().contiguous(), None)
    if is_causal:
        later_TT = scores_RS.new_full((num_new, num_new), -torch.inf).triu_(1)
        scores_RS.view(-1, num_new, seq_len)[..., seq_len - num_new :].add_(later_TT)
    if window is not None and seq_len > window:
        width = seq_len - window  # of the columns that the last row does not see, and perhaps others before it
        earlier_TS = scores_RS.new_full((num_new, width), -torch.inf).tril_(seq_len - num_new - window)
        scores_RS.view(-1, num_new, seq_len)[..., :width].add_(earlier_TS)
    if sinks_h is None:
        torch.softmax(scores_RS, -1, out=scores_RS)
    else:
        sink_R1 = sinks_h.repeat_interleave(num_new)[:, None]
        top_R1 = torch.maximum(scores_RS.amax(-1, keepdim=True), sink_R1)
        scores_RS.sub_(top_R1).exp_()
        scores_RS.div_(scores_RS.sum(-1, keepdim=True).add_((sink_R1 - top_R1).exp_()))
    return onednn_product(scores_RS.to(v_CS.dtype), v_CS, None).view_as(q_hTC)
