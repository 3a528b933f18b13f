"""Rotary embedding of packed q, k, v at V2PE positions, and the write of k and v to their slots.

    angle[t, j] = position[t] * inv_freq[j]                     float32; positions may be fractions (V2PE)
    rotate(x)   = (x1 cos - x2 sin, x2 cos + x1 sin)            x1, x2: first and second half of a head's channels

Qwen3 normalises q and k by RMS per head before the rotation. The rotation runs in float32.
Slot s of the pool is place s % P of block s // P. Source of the positions: V2PE, arXiv 2412.09616.
"""

import torch
from torch import Tensor

from internvl_rt.kernels.rms_norm import rms_norm_reference


def _rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    first, second = x_THC.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C), dim=-1)
    return rotated.to(x_THC.dtype)


def qkv_rope_kv_reference(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
) -> Tensor:
    """Rotated queries [T, H, C] of packed rows (H q heads | G k heads | G v heads); writes k and v to the cache.

    `position_T` must be float32: half precision cannot tell neighbouring positions apart. `inv_freq_C` is [C / 2].
    """
    if position_T.dtype != torch.float32:
        raise ValueError(f"position_T must be float32, got {position_T.dtype}")
    _, num_kv_heads, block_size, head_dim = k_cache_BGPC.shape
    heads = qkv_TK.view(len(qkv_TK), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q_THC, k_TGC, v_TGC = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if q_norm_C is not None and k_norm_C is not None:
        q_THC, k_TGC = rms_norm_reference(q_THC, q_norm_C, eps), rms_norm_reference(k_TGC, k_norm_C, eps)
    angle_T1C = (position_T[:, None] * inv_freq_C)[:, None]
    cos_T1C, sin_T1C = angle_T1C.cos(), angle_T1C.sin()
    block_T, offset_T = slot_T.long() // block_size, slot_T.long() % block_size
    k_cache_BGPC[block_T, :, offset_T] = _rotate(k_TGC, cos_T1C, sin_T1C)
    v_cache_BGPC[block_T, :, offset_T] = v_TGC
    return _rotate(q_THC, cos_T1C, sin_T1C)
