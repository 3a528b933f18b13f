"""A table for CPUs: the references, but with what torch has for CPUs where that is faster. No kernel of it is ours.

* Products are oneDNN's where that is faster than MKL, with weights laid out anew for it (`products_cpu.py`).
* Quantised weights are multiplied as they are, by torch's kernels, or in dense parts (`products_cpu_quantised.py`).
  Inputs are not rounded.
* What all layers of a step need is computed once: the rotation of its positions, its places in the cache, and which
  blocks the sequences that decode read.
* Attention does not copy the blocks of sequences that decode (`attention_cpu.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.errors import RequestError
from internvl_rt.kernels._kv_numbers import write_heads
from internvl_rt.kernels._paged_attention import attend_by_torch, paged_attention_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import tile_tokens
from internvl_rt.model.attention_cpu import attend_blocks, attend_by_products, plan_reads, products_are_faster
from internvl_rt.model.linear import AnyLinear, Linear, Norm, bias_of
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.processor import runs_onednn
from internvl_rt.model.products_cpu import Product, pack, packs, product_of
from internvl_rt.model.products_cpu_quantised import pack_quantised, quantised_product
from internvl_rt.model.step_inputs import Batch, LayerCache, Rotary

FEW_SCORES = 1 << 13  # of a head, which torch's attention has computed before oneDNN's products have begun

T = TypeVar("T")


class Rotation(NamedTuple):
    """cos and sin of a step's angles, float32 [T, 1, C]; the sin of a head's first half is negated."""

    cos_T1C: Tensor
    sin_T1C: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuOps(Ops):
    """Computes as `Ops` says, but no rows that pad a batch, which only CUDA graphs have.

    A table keeps what belongs to one step, so every engine has its own.

    dtype: what is computed in
    packs: whether dense weights are laid out anew when they are loaded
    attends_by_products: whether patches and prompts attend by products, which write scores, not by torch's attention
    """

    dtype: torch.dtype
    packs: bool
    attends_by_products: bool
    _of_step: dict[str, list[tuple[object, Any]]] = field(default_factory=dict)  # see _once_a_step

    def prepare_linear(self, linear: AnyLinear) -> AnyLinear:
        if not isinstance(linear, Linear):
            return pack_quantised(linear, self.dtype)
        return Linear(pack(linear.weight_NK), linear.bias_N) if self.packs else linear

    def product(self, x: Tensor, linear: AnyLinear, bias_N: Tensor | None, **after: Any) -> Tensor:
        if isinstance(linear, Linear):
            return self.gemm_epilogue(x, linear.weight_NK, bias_N, **after)
        return finish_product(quantised_product(x, linear, bias_N), **after)

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
        _, num_kv_heads, block_size, head_dim = cache.k_cache_BGPC.shape
        rotation = self._once_a_step("rotation", position_T, lambda: rotation_of(position_T, rotary))
        block_T, place_T = self._once_a_step("places", slot_T, lambda: (slot_T // block_size, slot_T % block_size))
        num_heads = qkv.num_outputs // head_dim - 2 * num_kv_heads
        heads = self.linear(self.norm(x_TD, norm), qkv).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        if q_norm is not None and k_norm is not None:
            q_THC, k_TGC, v_TGC = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
            q_THC, k_TGC = rotate(self.norm(q_THC, q_norm), rotation), rotate(self.norm(k_TGC, k_norm), rotation)
        else:
            turned = rotate(heads[:, : num_heads + num_kv_heads], rotation)
            q_THC, k_TGC, v_TGC = turned[:, :num_heads], turned[:, num_heads:], heads[:, num_heads + num_kv_heads :]
        if cache.scale_BGP2 is None:
            cache.k_cache_BGPC[block_T, :, place_T] = k_TGC.to(x_TD.dtype)
            cache.v_cache_BGPC[block_T, :, place_T] = v_TGC
        else:
            static = (None, None) if cache.static_scale_2 is None else cache.static_scale_2
            write_heads(cache.k_cache_BGPC, cache.scale_BGP2[..., 0], slot_T.long(), k_TGC, static[0])
            write_heads(cache.v_cache_BGPC, cache.scale_BGP2[..., 1], slot_T.long(), v_TGC, static[1])
        return q_THC.to(x_TD.dtype)

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
        self,
        q_THC: Tensor,
        cache: LayerCache,
        batch: Batch,
        upcoming: tuple[AnyLinear, ...] = (),
        *,
        sinks_H: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        n, num_seqs = batch.num_decodes, len(batch.seq_len_S)
        decoded_SHC = None
        if n > 0:
            sizes = cache.k_cache_BGPC.shape[2], q_THC.dtype
            reads = self._once_a_step(f"reads {window}", batch, lambda: plan_reads(batch, *sizes, window))
            decoded_SHC = attend_blocks(q_THC[:n], cache, reads, sinks_H)
            if n == num_seqs:
                return decoded_SHC
        where = batch.block_table_SN[n:], batch.query_start_R1, batch.seq_len_S[n:]
        attend = attend_prompt if self.attends_by_products else attend_by_torch
        operands = q_THC, cache.k_cache_BGPC, cache.v_cache_BGPC, *where, cache.scale_BGP2
        y_THC = paged_attention_reference(*operands, sinks_H=sinks_H, window=window, attend=attend)
        if decoded_SHC is not None:
            y_THC[:n] = decoded_SHC
        return y_THC

    def merge_patches(
        self, x_RE: Tensor, num_tiles: int, norm: Norm, linear: AnyLinear, factor: int, version: Literal["v1", "v2"]
    ) -> Tensor:
        weights = norm.weight_D, bias_of(norm), norm.eps
        x_IMK = unshuffle_norm_reference(x_RE, num_tiles, *weights, factor, version)
        return self.linear(x_IMK, linear, activation="gelu")

    def _once_a_step(self, name: str, of: object, compute: Callable[[], T]) -> T:
        """Computes something of an input of the step in its first layer, and returns it in the others.

        Layers with a window have inputs of their own, and alternate with the others: it is kept of the last two.
        """
        known = self._of_step.setdefault(name, [])
        for one, kept in known:
            if one is of:
                value: T = kept
                return value
        value = compute()
        self._of_step[name] = [(of, value), *known[:1]]
        return value


def attend_prompt(
    q_HTC: Tensor, k_GSC: Tensor, v_GSC: Tensor, sinks_H: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Computes causal attention [T, H, C] of the last T of a sequence's S tokens, by products if there are many."""
    if q_HTC.shape[1] * k_GSC.shape[1] <= FEW_SCORES:
        return attend_by_torch(q_HTC, k_GSC, v_GSC, sinks_H, window)
    return attend_by_products(q_HTC, k_GSC, v_GSC, sinks_H, window, is_causal=True)


def rotation_of(position_T: Tensor, rotary: Rotary) -> Rotation:
    angle_T1C = (position_T[:, None] * rotary.inv_freq_C)[:, None]
    cos_T1C, sin_T1C = angle_T1C.cos() * rotary.scale, angle_T1C.sin() * rotary.scale
    return Rotation(torch.cat((cos_T1C, cos_T1C), -1), torch.cat((-sin_T1C, sin_T1C), -1))


def rotate(x_THC: Tensor, rotation: Rotation) -> Tensor:
    """Rotates as `kernels/qkv_rope_kv.py` does, to the bit, and returns the heads in float32."""
    x = x_THC.float()
    turned = x.roll(x.shape[-1] // 2, -1).mul_(rotation.sin_T1C)
    return (x * rotation.cos_T1C).add_(turned)


def cpu_gemm_epilogue(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, product: Product, **after: Any) -> Tensor:
    return finish_product(product(x, weight_NK, bias_N), **after)


def finish_product(
    y: Tensor,
    *,
    activation: Literal["none", "gelu"] = "none",
    residual: Tensor | None = None,
    scale_N: Tensor | None = None,
    out: Tensor | None = None,  # does not change the result, which is new
) -> Tensor:
    """Computes what `gemm_epilogue` does after a product, whose memory it may use."""
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
    own = {
        "name": "onednn",
        "gemm_epilogue": partial(cpu_gemm_epilogue, product=product_of(dtype)),
        "rms_norm": cpu_rms_norm,
        "swiglu": cpu_swiglu,
    }
    as_in_torch = {one.name: getattr(TORCH, one.name) for one in fields(Ops)}
    how = {"dtype": dtype, "packs": packs(dtype), "attends_by_products": products_are_faster(dtype)}
    return CpuOps(**(as_in_torch | own | how))
