"""What a user would run instead of a kernel: torch's own operations, its compiler, and libraries if they are installed.

attention_baselines.py does the same for attention.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.bench.attention_baselines import (
    ATTENTION,
    Alternative,
    Inputs,
    Prepare,
    Run,
    attention_alternatives,
    rms_norm,
    same,
)
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.kernels.copy_blocks import copy_blocks_reference
from internvl_rt.kernels.dequantise import dequantise_reference
from internvl_rt.kernels.embed_tokens import embed_tokens_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from internvl_rt.kernels.route_experts import Routing, sort_pairs_reference
from internvl_rt.kernels.swiglu import clamped_swiglu_reference, swiglu_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.unshuffle_project import unshuffle_project_reference

COMPILED = ("layer_norm", "rms_norm", "add_norm", "unshuffle_norm", "swiglu", "qkv_rope_kv")
PRODUCTS = ("gemm_epilogue", "gemm_fp8", "gemv", "gemv_4bit", "gemv_8bit", "gemv_qkv")


def alternatives(op: str) -> Iterator[Alternative]:
    """The alternatives to the operation of this name; those that compile come last."""
    if op in ATTENTION:
        yield from attention_alternatives(op)
    else:
        yield Alternative("cublas + element-wise" if op in PRODUCTS else "torch eager", _eager(op))
    if op == "gemm_epilogue":
        yield Alternative("cublas alone", _product_alone)
    for package, prepare in LIBRARIES.get(op, {}).items():
        if find_spec(package) is not None:
            yield Alternative(package, prepare, slow_start=True)
    if op in COMPILED:
        yield Alternative("torch.compile", partial(_compiled, op), slow_start=True)


def _eager(op: str) -> Prepare:
    """Returns what a user would write; for an operation without an entry of its own that is its reference."""
    return EAGER[op] if op in EAGER else _plain(discover_specs()[op].reference)


def _plain(function: Callable[..., Tensor]) -> Callable[[Inputs], tuple[Run, Callable[[Any], Tensor]]]:
    """An alternative that takes the same arguments as the kernel."""
    return lambda inputs: (partial(function, **inputs), same)


def _compiled(op: str, inputs: Inputs) -> tuple[Run, Callable[[Any], Tensor] | None]:
    """Compiles the whole function or raises: after a graph break, or too many shapes, parts of it would run eagerly."""
    run, as_reference = EAGER[op](inputs)
    assert isinstance(run, partial)
    return partial(_compile(run.func), *run.args, **run.keywords), as_reference


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    """Call this before compiling another shape: after some shapes torch runs a function eagerly instead."""
    _compile.cache_clear()
    torch.compiler.reset()


# Norms and element-wise operations


def _add_norm(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
) -> Tensor:
    update = y_RD if bias_D is None else y_RD + bias_D
    x_RD.add_(update if scale_D is None else scale_D * update)
    if norm_bias_D is None:
        return rms_norm(x_RD, weight_D, eps)
    return layer_norm_reference(x_RD, weight_D, norm_bias_D, eps)


def _rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, position_T: Tensor, inv_freq_C: Tensor, k_cache: Tensor, v_cache: Tensor,
    block_T: Tensor, place_T: Tensor,
) -> Tensor:  # fmt: skip
    angle = (position_T[:, None] * inv_freq_C)[:, None]
    cos, sin = (torch.cat((t, t), dim=-1).to(q.dtype) for t in (angle.cos(), angle.sin()))

    def rotated(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    k_cache[block_T, :, place_T] = rotated(k)
    v_cache[block_T, :, place_T] = v
    return rotated(q)


def _rope(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, num_heads: int, where: tuple[Tensor, ...]
) -> Tensor:
    num_kv_heads, head_dim = where[2].shape[1], where[2].shape[3]
    q, k, v = torch.split(qkv.view(len(qkv), -1, head_dim), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    return _rotate_and_write(q, k, v, *where)


def _where(i: Inputs) -> tuple[Tensor, ...]:
    slot, block_size = i["slot_T"].long(), i["k_cache_BGPC"].shape[2]
    if bool((slot < 0).any()):
        raise ValueError("rows without a slot")
    if i.get("scale_BGP2") is not None:
        raise ValueError("a cache in 8 bits")
    caches = i["k_cache_BGPC"], i["v_cache_BGPC"]
    return (i["position_T"], i["inv_freq_C"], *caches, slot // block_size, slot % block_size)


def _qkv_rope_kv(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    _, num_kv_heads, _, head_dim = i["k_cache_BGPC"].shape
    num_heads = i["qkv_TK"].shape[1] // head_dim - 2 * num_kv_heads
    norms = i["q_norm_C"], i["k_norm_C"], i["eps"]
    return partial(_rope, i["qkv_TK"], *norms, num_heads, _where(i)), same


# Products


def _gemm_epilogue(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    x, weight, bias, residual, scale, rows = (i[n] for n in ("x", "weight_NK", "bias_N", "residual", "scale_N", "rows"))
    out = None if rows is None else x.new_empty(len(x), len(weight))

    def run() -> Any:
        y = F.linear(x, weight, bias)
        if out is not None:
            return out.index_copy_(0, rows, y)
        if residual is not None:
            return residual + y if scale is None else torch.addcmul(residual, y, scale)
        return F.gelu(y) if i["activation"] == "gelu" else y

    return run, same


def _product_alone(i: Inputs) -> tuple[Run, None]:
    """A kernel's epilogue costs what the kernel takes longer than this product."""
    return partial(F.linear, i["x"], i["weight_NK"], i["bias_N"]), None


def _gemv(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    def run() -> Any:
        x, norm = i["x_RK"], i["norm_weight_K"]
        y = F.linear(x if norm is None else rms_norm(x, norm, i["eps"]), i["weight_NK"], i["bias_N"])
        if i["activation"] == "swiglu":
            y = swiglu_reference(y)
        return y if i["residual_RN"] is None else i["residual_RN"] + y

    return run, same


def _gemv_4bit(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """A dense weight, which shows what 4 bits save."""
    numbers = i["words_NW"], i["scale_NG"], i["zero_NG"], i["x_RK"].shape[1]
    return _gemv({**i, "weight_NK": dequantise_reference(*numbers, group=i["group"], dtype=i["x_RK"].dtype)})


def _gemv_8bit(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """A dense weight, which shows what 8 bits save."""
    numbers_NK = i["weight_NK"]
    dense_NK = dequantise_reference(numbers_NK, i["scale_NG"], None, numbers_NK.shape[1], dtype=i["x_RK"].dtype)
    return _gemv({**i, "weight_NK": dense_NK})


def _gemm_fp8(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """Dense operands, which show what FP8 saves."""
    numbers_NK = i["weight_NK"]
    dense_NK = dequantise_reference(numbers_NK, i["scale_NG"], None, numbers_NK.shape[1], dtype=i["dtype"])
    x_RK = (i["numbers_RK"].float() * i["scale_R"][:, None]).to(i["dtype"])

    def run() -> Any:
        y = F.linear(x_RK, dense_NK, i["bias_N"])
        return y if i["residual_RN"] is None else i["residual_RN"] + y

    return run, same


def _gemv_qkv(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    where = _where(i)

    def run() -> Any:
        qkv = F.linear(rms_norm(i["x_RD"], i["norm_weight_D"], i["eps"]), i["weight_KD"], i["bias_K"])
        return _rope(qkv, None, None, i["eps"], i["num_heads"], where)

    return run, same


# Rows, pictures, tokens


def _embed_tokens(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    return partial(embed_tokens_reference, **i), same


def _copy_blocks(i: Inputs) -> tuple[Run, None]:
    ids = i["source_N"].long(), i["destination_N"].long()
    return partial(copy_blocks_reference, i["pool_LKBGPC"], *ids), None


def _patch_embed(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    tiles, weight, position = i["tiles"], i["weight_EK"], i["position_UE"]
    if tiles.dtype != torch.uint8:
        raise ValueError("pixels that are normalised already")
    patch = round((weight.shape[1] // 3) ** 0.5)
    mean, std = (torch.tensor(v, device=tiles.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    kernel = weight.reshape(-1, 3, patch, patch)

    def run() -> Any:
        pixels = ((tiles.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(weight.dtype)
        x = F.conv2d(pixels, kernel, i["bias_E"], stride=patch).flatten(2).transpose(1, 2)
        return torch.cat((i["class_E"].expand(len(x), 1, -1), x), dim=1) + position

    return run, lambda y: torch.cat((y[:, 1:].flatten(0, 1), y[:, 0]))


def _resize_tiles(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    """Uses torch's own bicubic, which differs from Pillow's in single bits."""
    columns, rows, size = i["columns"], i["rows"], i["size"]

    def stretched(height: int, width: int) -> Tensor:
        pixels = i["image_HW3"].permute(2, 0, 1)[None].float()
        y = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        return y[0].round_().clamp_(0, 255).to(torch.uint8)

    def run() -> Any:
        canvas = stretched(rows * size, columns * size).view(3, rows, size, columns, size)
        tiles = canvas.permute(1, 3, 2, 4, 0).reshape(rows * columns, size, size, 3)
        if not i["thumbnail"]:
            return tiles
        return torch.cat((tiles, stretched(size, size).permute(1, 2, 0)[None]))

    return run, same


def _sample(i: Inputs) -> tuple[Run, None]:
    """Samples by a sort, as most engines do, without penalties; its random numbers are not the kernel's."""
    columns = (i[name][:, None] for name in ("temperature_R", "top_k_R", "top_p_R", "min_p_R"))
    temperature, top_k, top_p, min_p = columns
    vocab = i["logits_RV"].shape[1]
    top_k = torch.where(top_k > 0, top_k, vocab)
    rank = torch.arange(vocab, device=top_k.device)

    def run() -> Any:
        logits, token = i["logits_RV"].float().sort(dim=1, descending=True)
        p = torch.softmax(logits / temperature.clamp_min(1e-5), dim=1)
        kept = (rank < top_k) & (p.cumsum(1) - p < top_p) & (p >= min_p * p[:, :1])
        noise = torch.empty_like(p).exponential_(1.0)
        place = torch.where(temperature[:, 0] > 0, (p * kept / noise).argmax(1), 0)
        return token.gather(1, place[:, None])[:, 0]

    return run, None


def _route_experts(i: Inputs) -> tuple[Run, Callable[[Any], Any]]:
    """Of equal logits torch's topk takes any."""
    first, count = i["first"], i["count"]
    count = i["logits_TX"].shape[1] - first if count is None else count

    def run() -> Any:
        weight, expert_id = torch.softmax(i["logits_TX"], 1, dtype=torch.float32).topk(i["num_chosen"])
        if i["renormalise"]:
            weight /= weight.sum(1, keepdim=True)
        return Routing(expert_id, weight, *sort_pairs_reference(expert_id, i["block"], first, count))

    return run, same


def _grouped(i: Inputs, num_columns: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns the pairs by expert, and torch's product of their rows with their experts' dense weights."""
    block = len(i["pair_W"]) // len(i["block_expert_B"])
    expert_W = i["block_expert_B"].repeat_interleave(block)
    used, weight = i["pair_W"] >= 0, i["weight"]
    ends = torch.bincount(expert_W[used], minlength=i["num_experts"]).cumsum(0).int()
    if i["scale_NG"] is not None:
        scales = i["scale_NG"], i["zero_NG"], num_columns
        weight = dequantise_reference(weight, *scales, group=i["group"], dtype=dtype)
    weight_XKN = weight.unflatten(0, (i["num_experts"], -1)).mT
    bias_QN = None if i.get("bias_N") is None else i["bias_N"].view(i["num_experts"], -1)[expert_W[used].long()]

    def product(x: Tensor) -> Tensor:
        y = torch._grouped_mm(x, weight_XKN, offs=ends)
        return y if bias_QN is None else y + bias_QN

    return i["pair_W"][used].long(), product


def _expert_gate_up(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    x_TD, chosen = i["x_TD"], i["num_chosen"]
    pair_Q, product = _grouped(i, x_TD.shape[1], x_TD.dtype)
    out = x_TD.new_zeros(len(x_TD) * chosen, len(i["weight"]) // i["num_experts"] // 2)
    activation = clamped_swiglu_reference if i.get("gate") == "clamped" else swiglu_reference
    return lambda: out.index_copy_(0, pair_Q, activation(product(x_TD[pair_Q // chosen]))), same


def _expert_down(i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    y_QF, weight_TJ, residual = i["y_QF"], i["weight_TJ"], i["residual_TD"]
    pair_Q, product = _grouped(i, y_QF.shape[1], y_QF.dtype)
    part_QD = y_QF.new_zeros(len(y_QF), len(i["weight"]) // i["num_experts"])

    def run() -> Any:
        part_TJD = part_QD.index_copy_(0, pair_Q, product(y_QF[pair_Q])).unflatten(0, weight_TJ.shape)
        x = (part_TJD * weight_TJ[..., None]).sum(1)
        return (x if residual is None else residual + x).to(y_QF.dtype)

    return run, same


# Libraries that may be installed


def _liger(op: str, i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    if op == "swiglu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        gate, up = (half.contiguous() for half in i["gate_up_T2F"].chunk(2, dim=-1))
        return partial(LigerSiLUMulFunction.apply, gate, up), same
    if op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return partial(LigerLayerNormFunction.apply, i["x"], i["weight_D"], i["bias_D"], i["eps"]), same
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return partial(LigerRMSNormFunction.apply, i["x"], i["weight_D"], i["eps"], 0.0, "llama", False), same


def _flashinfer(op: str, i: Inputs) -> tuple[Run, Callable[[Any], Tensor]]:
    import flashinfer

    if op == "swiglu":
        return partial(flashinfer.silu_and_mul, i["gate_up_T2F"]), same
    return partial(flashinfer.rmsnorm, i["x"], i["weight_D"], i["eps"]), same


EAGER: dict[str, Prepare] = {
    "layer_norm": _plain(layer_norm_reference),
    "rms_norm": _plain(rms_norm),
    "add_norm": _plain(_add_norm),
    "unshuffle_norm": _plain(unshuffle_norm_reference),
    "unshuffle_project": _plain(unshuffle_project_reference),
    "swiglu": _plain(swiglu_reference),
    "qkv_rope_kv": _qkv_rope_kv,
    "expert_down": _expert_down,
    "expert_gate_up": _expert_gate_up,
    "gemm_epilogue": _gemm_epilogue,
    "gemm_fp8": _gemm_fp8,
    "gemv": _gemv,
    "gemv_4bit": _gemv_4bit,
    "gemv_8bit": _gemv_8bit,
    "gemv_qkv": _gemv_qkv,
    "embed_tokens": _embed_tokens,
    "copy_blocks": _copy_blocks,
    "patch_embed": _patch_embed,
    "resize_tiles": _resize_tiles,
    "route_experts": _route_experts,
    "sample": _sample,
}
LIBRARIES: dict[str, dict[str, Prepare]] = {
    "layer_norm": {"liger_kernel": partial(_liger, "layer_norm")},
    "rms_norm": {"liger_kernel": partial(_liger, "rms_norm"), "flashinfer": partial(_flashinfer, "rms_norm")},
    "swiglu": {"liger_kernel": partial(_liger, "swiglu"), "flashinfer": partial(_flashinfer, "swiglu")},
}
