"""What each kernel computes, in a few vectorised lines of torch: its own roundings, its own order of sums.

The interpreter takes 5 to 500 ms for a test case, these functions less than one. `EMULATED[operation](**inputs)` gives
what the launcher would write: the arguments that it writes in place, in the order of the spec, then its result.
`tests/kernels/test_emulated.py` compares them with the kernels.

Sums in float32 of 16-bit operands are torch's own, in whatever order: that moves a result by about 1e-7 of its terms.
Sums of float32 operands are one chain of fused multiply-adds over K. In gemv, where K is parted among warps and splits,
that is more error than the kernel makes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels import _rope
from internvl_rt.kernels._gemv_plan import choose_gemv_plan
from internvl_rt.kernels._launch import Target
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.vit_attention import tile_tokens

TARGET = Target(90, 132, interpreted=True)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As float32 holds it after a rounding to `dtype`."""
    return x.to(dtype).float()


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To the nearest; what gemv does to its operands."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, start: Tensor | None = None) -> Tensor:
    """start + x weight^T in float32, of operands that are of `dtype`."""
    x, weight = x.float(), weight.float()
    if dtype != torch.float32:
        sums = x @ weight.mT
        return sums if start is None else sums + start
    sums = torch.zeros(1) if start is None else start
    x64, weight64 = x.double(), weight.double()
    for k in range(x.shape[-1]):
        sums = (x64[..., :, None, k] * weight64[..., None, :, k] + sums.double()).float()
    return sums.expand(*x.shape[:-1], weight.shape[-2])


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> list[Tensor]:
    return [rms_norm_reference(x, weight_D, eps)]  # torch rounds where the kernel does


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> list[Tensor]:
    return [_normed_row(x.float(), weight_D, bias_D, eps).to(x.dtype)]


def _normed_row(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Centred twice, as float32 loses a large mean's last bits."""
    x = x - x.mean(-1, keepdim=True)
    return layer_norm_reference(x, weight_D.float(), bias_D.float(), eps)


def _swiglu(gate_up_T2F: Tensor) -> list[Tensor]:
    gate, up = gate_up_T2F.float().chunk(2, dim=-1)
    silu = gate / (1 + (-gate).exp())
    return [(rounded(silu, gate_up_T2F.dtype) * up).to(gate_up_T2F.dtype)]


def _add_norm(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
) -> list[Tensor]:
    update = y_RD.float()
    if bias_D is not None:
        update = update + bias_D.float()
    if scale_D is not None:
        update = update * scale_D.float()
    x = (x_RD.float() + update).to(x_RD.dtype)
    if norm_bias_D is None:
        return [x, *_rms_norm(x, weight_D, eps)]
    return [x, *_layer_norm(x, weight_D, norm_bias_D, eps)]


def _unshuffle_norm(
    x_RE: Tensor, num_tiles: int, weight_D: Tensor, bias_D: Tensor, eps: float, factor: int, version: str
) -> list[Tensor]:
    num_patch_rows, width = len(x_RE) - num_tiles, x_RE.shape[1]
    side = math.isqrt(num_patch_rows // max(num_tiles, 1)) // factor
    x = x_RE[:num_patch_rows].reshape(num_tiles, side, factor, side, factor, width).transpose(2, 3)
    x = x.transpose(1, 2) if version == "v1" else x
    return _layer_norm(x.reshape(num_tiles, side * side, factor * factor * width), weight_D, bias_D, eps)


def _gemm_epilogue(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale_N: Tensor | None,
    rows: Tensor | None,
    plan: Any,
) -> list[Tensor]:
    """A torch product, as cuBLAS rounds it, is rounded before the epilogue; with a residual alone, behind it."""
    dtype = x.dtype
    y = product(x, weight_NK, dtype)
    if bias_N is not None:
        y = y + bias_N.float()
    apart = bias_N is not None or scale_N is not None
    if plan == "cublas" and (residual is None or apart):
        y = rounded(y, dtype)
    if activation == "gelu":
        y = 0.5 * y * (1 + torch.erf(y * math.sqrt(0.5)))
    if scale_N is not None:
        y = y * scale_N.float()
    if residual is not None:
        y = y + residual.float()
    if rows is not None:
        y = torch.zeros_like(y).index_copy_(0, rows, y)
    return [y.to(dtype)]


def _patch_embed(
    tiles: Tensor, weight_EK: Tensor, bias_E: Tensor, class_E: Tensor, position_UE: Tensor
) -> list[Tensor]:
    dtype = weight_EK.dtype
    pixels = tiles.float()
    if tiles.dtype == torch.uint8:
        scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD])[:, None, None]
        shift = torch.tensor([-m / std for m, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])[:, None, None]
        pixels = pixels.permute(0, 3, 1, 2) * scale + shift
    num_tiles, channels, side, _ = pixels.shape
    patch = math.isqrt(weight_EK.shape[1] // channels)
    grid = side // patch
    patches = rounded(pixels, dtype).reshape(num_tiles, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    x_RK = patches.reshape(num_tiles * grid * grid, weight_EK.shape[1])
    x_RE = product(x_RK, weight_EK, dtype, bias_E.float()) + position_UE[1:].float().repeat(num_tiles, 1)
    class_IE = (class_E.float() + position_UE[0].float()).expand(num_tiles, -1)
    return [torch.cat((x_RE, class_IE)).to(dtype)]


def _few_rows(x_RK: Tensor, weight_NK: Tensor, norm_weight_K: Tensor | None, eps: float, plan: Any) -> Tensor:
    """The float32 sums of gemv and gemv_qkv: on matrix units x times the norm's weight is rounded to what they take."""
    dtype = x_RK.dtype
    plan = plan or choose_gemv_plan(len(x_RK), *weight_NK.shape, dtype, TARGET)
    x = x_RK.float()
    if norm_weight_K is None:
        return product(x, weight_NK, dtype)
    a = x * norm_weight_K.float()
    if plan.matrix and dtype != torch.float32:
        a = rounded_to_tf32(a) if dtype == torch.float16 else rounded(a, dtype)
    rstd = 1 / (x.square().sum(-1, keepdim=True) / x.shape[1] + eps).sqrt()
    return product(a, weight_NK, dtype) * rstd


def _gemv(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    activation: str,
    residual_RN: Tensor | None,
    plan: Any,
) -> list[Tensor]:
    y = _few_rows(x_RK, weight_NK, norm_weight_K, eps, plan)
    if bias_N is not None:
        y = y + bias_N.float()
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = gate / (1 + (-gate).exp()) * up
    if residual_RN is not None:
        y = y + residual_RN.float()
    return [y.to(x_RK.dtype)]


def fused_multiply_add(x: Tensor, y: Tensor | float, z: Tensor | float) -> Tensor:
    """Float32, rounded once."""
    x, y, z = (torch.as_tensor(each, dtype=torch.float64) for each in (x, y, z))
    return (x * y + z).float()


def sin_cos(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' own, by their own coefficients."""
    n = (angle * _rope.INVERSE_PI_2.value).round()
    r = angle
    for part in (_rope.PI_2_A, _rope.PI_2_B, _rope.PI_2_C, _rope.PI_2_D):
        r = fused_multiply_add(n, -torch.tensor(part.value), r)
    z, sine, cosine = r * r, _rope.S2.value, _rope.C2.value
    for s, c in ((_rope.S1, _rope.C1), (_rope.S0, _rope.C0)):
        sine, cosine = fused_multiply_add(z, sine, s.value), fused_multiply_add(z, cosine, c.value)
    sine = fused_multiply_add(sine * z, r, r)
    cosine = fused_multiply_add(fused_multiply_add(cosine, z, -0.5), z, 1.0)
    quarter = n.long() & 3
    odd = quarter % 2 == 1
    sin, cos = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where(quarter >= 2, -sin, sin), torch.where((quarter == 1) | (quarter == 2), -cos, cos)


def _turned(x_RHC: Tensor, position_T: Tensor, inv_freq_C: Tensor) -> Tensor:
    sin, cos = sin_cos((position_T[:, None] * inv_freq_C)[:, None])
    first, second = x_RHC.chunk(2, dim=-1)
    turned = fused_multiply_add(first, cos, -(second * sin)), fused_multiply_add(second, cos, first * sin)
    return torch.cat(turned, dim=-1)


def _written(cache_BGPC: Tensor, slot_T: Tensor, x_TGC: Tensor) -> Tensor:
    cache, used = cache_BGPC.clone(), slot_T >= 0
    slot = slot_T[used].long()
    cache[slot // cache.shape[2], :, slot % cache.shape[2]] = x_TGC[used].to(cache.dtype)
    return cache


def _rotated_and_written(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, inv_freq: Tensor, caches: Sequence[Tensor], slot: Tensor
) -> list[Tensor]:
    q, k = _turned(q, position, inv_freq), _turned(k, position, inv_freq)
    q = q.masked_fill(slot[:, None, None] < 0, 0).to(caches[0].dtype)
    return [_written(caches[0], slot, k), _written(caches[1], slot, v), q]


def _gemv_qkv(
    x_RD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
    num_heads: int,
    plan: Any,
) -> list[Tensor]:
    y = _few_rows(x_RD, weight_KD, norm_weight_D, eps, plan)
    if bias_K is not None:
        y = y + bias_K.float()
    _, groups, _, channels = k_cache_BGPC.shape
    q, k, v = y.unflatten(1, (-1, channels)).tensor_split((num_heads, num_heads + groups), dim=1)
    return _rotated_and_written(q, k, v, position_T, inv_freq_C, (k_cache_BGPC, v_cache_BGPC), slot_T)


def _qkv_rope_kv(
    qkv_TK: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    eps: float,
    position_T: Tensor,
    inv_freq_C: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    slot_T: Tensor,
) -> list[Tensor]:
    _, groups, _, channels = k_cache_BGPC.shape
    heads = qkv_TK.unflatten(1, (-1, channels))
    num_heads = heads.shape[1] - 2 * groups
    q, k, v = heads.tensor_split((num_heads, num_heads + groups), dim=1)
    if q_norm_C is not None and k_norm_C is not None:
        q, k = rms_norm_reference(q, q_norm_C, eps), rms_norm_reference(k, k_norm_C, eps)
    caches = (k_cache_BGPC, v_cache_BGPC)
    return _rotated_and_written(q.float(), k.float(), v, position_T, inv_freq_C, caches, slot_T)


def online_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale_log2: float,
    blocks: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    k_scale: Tensor | None = None,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum and weighted value of q [..., M, C] over keys [..., N, C], block by block; weights in `dtype`."""
    top, total, acc = state or (
        torch.full(q.shape[:-1], -math.inf), torch.zeros(q.shape[:-1]), torch.zeros(*q.shape[:-1], v.shape[-1])
    )  # fmt: skip
    for begin, end in blocks:
        score = product(q, k[..., begin:end, :], dtype)
        if k_scale is not None:
            score = score * k_scale[..., None, begin:end]
        if visible is not None:
            score = score.masked_fill(~visible[..., begin:end], -math.inf)
        new_top = torch.maximum(top, score.amax(-1) * scale_log2)
        shrink, p = (top - new_top).exp2(), (score * scale_log2 - new_top[..., None]).exp2()
        total = total * shrink + p.sum(-1)
        acc = product(rounded(p, dtype), v[..., begin:end, :].mT, dtype, acc * shrink[..., None])
        top = new_top
    return top, total, acc


def _blocks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def _vit_attention(
    qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm_E: Tensor | None, k_norm_E: Tensor | None, eps: float
) -> list[Tensor]:
    """The class token's key comes first, in float32; its own query meets no matrix unit."""
    dtype = qkv_RK.dtype
    q, k, v = (
        tile_tokens(part, num_tiles).unflatten(2, (-1, head_dim)).transpose(1, 2).float()
        for part in qkv_RK.chunk(3, dim=-1)
    )  # [I, H, U, C], the class token last
    scale_log2 = math.log2(math.e) / math.sqrt(head_dim)
    class_q, k_scale = q[:, :, -1:], None
    if q_norm_E is not None and k_norm_E is not None:
        inverse = [
            1 / (part.transpose(1, 2).flatten(2).square().mean(-1) + eps).sqrt()[:, None] for part in (q, k)
        ]  # [I, 1, U]
        weight_H1C = (q_norm_E.float() * k_norm_E.float()).view(-1, 1, head_dim)
        class_q = class_q * weight_H1C * inverse[0][..., -1:, None]
        q, k_scale = rounded(q * inverse[0][..., None] * weight_H1C, dtype), inverse[1]
    class_scale = 1.0 if k_scale is None else k_scale[..., -1:]
    top = (q @ k[:, :, -1:].mT)[..., 0] * (class_scale * scale_log2)
    state = (top, torch.ones_like(top), v[:, :, -1:].expand_as(q))
    num_patches = q.shape[2] - 1
    blocks = _blocks(0, num_patches, 16 if dtype == torch.float32 else 64)
    _, total, acc = online_softmax(q, k, v, None, scale_log2, blocks, dtype, k_scale, state)
    score = class_q @ k.mT * (scale_log2 * math.log(2))
    class_y = (score if k_scale is None else score * k_scale[:, :, None]).softmax(-1) @ v
    y = torch.cat(((acc * (1 / total)[..., None])[:, :, :-1], class_y), dim=2).transpose(1, 2).flatten(2)
    return [torch.cat((y[:, :-1].flatten(0, 1), y[:, -1])).to(dtype)]


def _keys_of_row(cache_BGPC: Tensor, table_N: Tensor, seq_len: int, group: int) -> Tensor:
    """[H, seq_len, C], each kv head as often as query heads share it."""
    blocks = table_N[: -(-seq_len // cache_BGPC.shape[2])].long()
    return cache_BGPC[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len].repeat_interleave(group, dim=0).float()


def _prefill_attention(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    max_query_len: int,
) -> list[Tensor]:
    dtype, (_, heads, channels) = q_THC.dtype, q_THC.shape
    out, group = torch.empty_like(q_THC, memory_format=torch.contiguous_format), heads // k_cache_BGPC.shape[1]
    starts = query_start_S1.tolist()
    for row, seq_len in enumerate(seq_len_S.tolist()):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        k, v = (_keys_of_row(cache, block_table_SN[row], seq_len, group) for cache in (k_cache_BGPC, v_cache_BGPC))
        visible = torch.ones(last - first, seq_len, dtype=torch.bool).tril(seq_len - (last - first))
        blocks = _blocks(0, seq_len, 32 if dtype == torch.float32 else 64)
        scale = math.log2(math.e) / math.sqrt(channels)
        q = q_THC[first:last].transpose(0, 1)
        _, total, acc = online_softmax(q, k, v, visible, scale, blocks, dtype)
        out[first:last] = (acc * (1 / total)[..., None]).transpose(0, 1).to(dtype)
    return [out]


def _decode_attention(
    q_SHC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    split_start_S1: Tensor,
    split_W3: Tensor,
) -> list[Tensor]:
    dtype, (_, heads, channels) = q_SHC.dtype, q_SHC.shape
    out, group = torch.zeros_like(q_SHC, memory_format=torch.contiguous_format), heads // k_cache_BGPC.shape[1]
    starts, block_size = split_start_S1.tolist(), k_cache_BGPC.shape[2]
    scale = math.log2(math.e) / math.sqrt(channels)
    for row, seq_len in enumerate(seq_len_S.tolist()):
        if seq_len == 0:
            continue
        k, v = (_keys_of_row(cache, block_table_SN[row], seq_len, group) for cache in (k_cache_BGPC, v_cache_BGPC))
        parts = []
        for _, first, end in split_W3[starts[row] : starts[row + 1]].tolist():
            blocks = _blocks(first * block_size, min(end * block_size, seq_len), 32 if dtype == torch.float32 else 64)
            parts.append(online_softmax(q_SHC[row, :, None], k, v, None, scale, blocks, dtype))
        tops, totals, accs = (torch.stack(each) for each in zip(*parts, strict=True))
        share = (tops - tops.amax(0)).exp2()
        value = (accs * share[..., None]).sum(0) * (1 / (totals * share).sum(0))[..., None]
        out[row] = value[:, 0].to(dtype)
    return [out]


EMULATED: dict[str, Callable[..., list[Tensor]]] = {
    "add_norm": _add_norm,
    "decode_attention": _decode_attention,
    "gemm_epilogue": _gemm_epilogue,
    "gemv": _gemv,
    "gemv_qkv": _gemv_qkv,
    "layer_norm": _layer_norm,
    "patch_embed": _patch_embed,
    "prefill_attention": _prefill_attention,
    "qkv_rope_kv": _qkv_rope_kv,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "unshuffle_norm": _unshuffle_norm,
    "vit_attention": _vit_attention,
}
