"""Causal attention of a batch of sequences of any lengths over a paged KV cache: of prefill chunks and decodes alike.

    o[t, h] = softmax(q[t, h] . k[: p + 1, g] / sqrt(C)) v[: p + 1, g]      g = h // (H / G)

t is the query at index p of its sequence. The last `query_len` of a sequence's `seq_len` tokens are this step's
queries; their keys and values are in the cache already. Slots beyond a sequence's length are never read.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_by_torch(q_HLC: Tensor, k_GSC: Tensor, v_GSC: Tensor) -> Tensor:
    """Computes causal attention [L, H, C] of the last L of a sequence's S tokens."""
    num_queries, seq_len = q_HLC.shape[1], k_GSC.shape[1]
    whole = num_queries == seq_len
    mask = None
    if not whole and num_queries > 1:  # a prefill chunk that follows a cached prefix
        mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q_HLC.device).tril(seq_len - num_queries)
    q, k, v = q_HLC[None], k_GSC[None], v_GSC[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)[0].transpose(0, 1)


def paged_attention_reference(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    *,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend_by_torch,
) -> Tensor:
    """Computes attention [T, H, C]. The integers are int32; a row of the table is read up to its sequence's length.

    attend: computes what `attend_by_torch` does
    """
    block_size = k_cache_BGPC.shape[2]
    out_THC = torch.zeros_like(q_THC)
    starts, lengths = query_start_S1.tolist(), seq_len_S.tolist()
    for row, seq_len in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if first == last or seq_len == 0:  # a row that pads the batch
            continue
        blocks = block_table_SN[row, : -(-seq_len // block_size)].long()
        k_GLC, v_GLC = (
            cache_BGPC.transpose(0, 1)[:, blocks].flatten(1, 2)[:, :seq_len]
            for cache_BGPC in (k_cache_BGPC, v_cache_BGPC)
        )
        out_THC[first:last] = attend(q_THC[first:last].transpose(0, 1), k_GLC, v_GLC)
    return out_THC
