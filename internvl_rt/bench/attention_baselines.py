"""Attention as a user would run it instead: torch's with each of its backends, and FlashInfer if it is installed.

An `Alternative` also prepares what a user would have ready (for torch, keys and values without pages); this is not
timed. It raises for inputs that it cannot take; kernels.py then says so and goes on. Its result is compared with
the kernel's reference before it is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from internvl_rt.kernels.vit_attention import tile_tokens

Inputs = dict[str, Any]
Run = Callable[[], Any]
Prepare = Callable[[Inputs], tuple[Run, Callable[[Any], Tensor] | None]]

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
MATH_BYTES = 64 * 2**20  # of keys; the math backend repeats them for every query head and keeps all scores


@dataclass(frozen=True, slots=True)
class Alternative:
    """`prepare(inputs)` returns the call to time, and a function that turns its result into the kernel's (None: the
    results cannot be compared).
    """

    name: str
    prepare: Prepare
    slow_start: bool = False  # it compiles for seconds


def attention_alternatives(op: str) -> Iterator[Alternative]:
    for name, backend in BACKENDS.items():
        yield Alternative(name, partial(ATTENTION[op], backend=backend))
    if op in FLASHINFER and find_spec("flashinfer") is not None:
        yield Alternative("flashinfer", FLASHINFER[op], slow_start=True)


def same(y: Tensor) -> Tensor:
    return y


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _vit_attention(i: Inputs, backend: SDPBackend) -> tuple[Run, Callable[[Any], Tensor]]:
    qkv = tile_tokens(i["qkv_RK"], i["num_tiles"])

    def run() -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        if i["q_norm_E"] is not None:
            q, k = rms_norm(q, i["q_norm_E"], i["eps"]), rms_norm(k, i["k_norm_E"], i["eps"])
        q, k, v = (t.view(*t.shape[:2], -1, i["head_dim"]).transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return run, lambda y: torch.cat((y[:, :-1].flatten(0, 1), y[:, -1]))


def _without_pages(i: Inputs, backend: SDPBackend) -> tuple[Tensor, Tensor, int]:
    """Keys and values [S, G, tokens, C] of sequences; raises ValueError if their lengths differ."""
    _refuse_more(i)
    seq_len = int(i["seq_len_S"][0])
    if not bool((i["seq_len_S"] == seq_len).all()):
        raise ValueError("sequences of several lengths")
    blocks = i["block_table_SN"][:, : -(-seq_len // i["k_cache_BGPC"].shape[2])].long()
    if backend == SDPBackend.MATH and blocks.numel() * i["k_cache_BGPC"][0].nbytes > MATH_BYTES:
        raise ValueError("more keys than the plain backend has memory for")
    k, v = (
        cache_BGPC[blocks].transpose(1, 2).flatten(2, 3)[:, :, :seq_len].contiguous()
        for cache_BGPC in (i["k_cache_BGPC"], i["v_cache_BGPC"])
    )
    return k, v, seq_len


def _refuse_more(i: Inputs) -> None:
    """Raises ValueError for what the alternatives do not compute."""
    if i["scale_BGP2"] is not None:
        raise ValueError("keys and values in 8 bits with scales")
    if i["sinks_H"] is not None or i["window"] is not None:
        raise ValueError("attention sinks or a window")


def _decode_attention(i: Inputs, backend: SDPBackend) -> tuple[Run, Callable[[Any], Tensor]]:
    k, v, _ = _without_pages(i, backend)
    q = i["q_SHC"][:, :, None]

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run, lambda y: y[:, :, 0]


def _prefill_attention(i: Inputs, backend: SDPBackend) -> tuple[Run, Callable[[Any], Tensor]]:
    """A chunk after a cached prefix needs a causal mask aligned to the last key; `is_causal` aligns it to the first."""
    k, v, seq_len = _without_pages(i, backend)
    if len(k) != 1:
        raise ValueError("several sequences")
    q = i["q_THC"].transpose(0, 1)[None]
    length = q.shape[2]
    how: dict[str, Any] = {"is_causal": True}
    if length != seq_len and backend == SDPBackend.FLASH_ATTENTION:
        how = {"attn_mask": causal_lower_right(length, seq_len)}
    elif length != seq_len:
        mask = torch.ones(length, seq_len, dtype=torch.bool, device=q.device)
        how = {"attn_mask": mask.tril(seq_len - length)}

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)

    return run, lambda y: y[0].transpose(0, 1)


@cache
def _flashinfer_workspace(device: torch.device) -> Tensor:
    return torch.empty(128 * 2**20, dtype=torch.uint8, device=device)


def _flashinfer_decode(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """Uses matrix units, because the other kernel does not support every number of query heads to a kv head."""
    import flashinfer

    _refuse_more(i)
    q, (_, num_kv_heads, block_size, head_dim) = i["q_SHC"], i["k_cache_BGPC"].shape
    num_blocks_S = (i["seq_len_S"] + block_size - 1) // block_size
    indptr = F.pad(num_blocks_S.cumsum(0), (1, 0)).int()
    used = torch.arange(i["block_table_SN"].shape[1], device=q.device) < num_blocks_S[:, None]
    last_len = i["seq_len_S"] - (num_blocks_S - 1) * block_size
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _flashinfer_workspace(q.device), "HND", use_tensor_cores=True
    )
    sizes = q.shape[1], num_kv_heads, head_dim, block_size
    wrapper.plan(indptr, i["block_table_SN"][used], last_len.int(), *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
    return partial(wrapper.run, q, (i["k_cache_BGPC"], i["v_cache_BGPC"])), same


def _flashinfer_prefill(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """FlashInfer aligns its causal mask to the last key, as a chunk after a cached prefix needs."""
    import flashinfer

    k_SGNC, v_SGNC, _ = _without_pages(i, SDPBackend.FLASH_ATTENTION)
    if len(k_SGNC) != 1:
        raise ValueError("several sequences")
    k, v = (t[0].transpose(0, 1).contiguous() for t in (k_SGNC, v_SGNC))
    return partial(flashinfer.single_prefill_with_kv_cache, i["q_THC"], k, v, causal=True), same


ATTENTION: dict[str, Callable[..., tuple[Run, Callable[[Any], Tensor]]]] = {
    "vit_attention": _vit_attention,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
}
FLASHINFER: dict[str, Prepare] = {"decode_attention": _flashinfer_decode, "prefill_attention": _flashinfer_prefill}
