"""Tables of the Triton kernels, for CUDA devices. They run in Triton's interpreter too, slowly."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from internvl_rt.errors import RequestError
from internvl_rt.kernels._expert_plan import choose_block
from internvl_rt.kernels._fp8_rows import MAX_WIDTH
from internvl_rt.kernels._fp8_rows import MIN_CAPABILITY as FP8_CAPABILITY
from internvl_rt.kernels._gemv_plan import MAX_ROWS, build_gemv_workspace
from internvl_rt.kernels._kv_numbers import MIN_CAPABILITY
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels._prefill_plan import PrefillWorkspace, build_prefill_workspace
from internvl_rt.kernels._split_plan import num_split_items
from internvl_rt.kernels.add_norm import add_norm
from internvl_rt.kernels.copy_blocks import copy_blocks
from internvl_rt.kernels.decode_attention import decode_attention
from internvl_rt.kernels.dequantise import dequantise
from internvl_rt.kernels.embed_tokens import embed_tokens
from internvl_rt.kernels.expert_down import expert_down
from internvl_rt.kernels.expert_gate_up import expert_gate_up
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue
from internvl_rt.kernels.gemm_fp8 import gemm_fp8
from internvl_rt.kernels.gemv import gemv
from internvl_rt.kernels.gemv_4bit import gemv_4bit
from internvl_rt.kernels.gemv_8bit import gemv_8bit
from internvl_rt.kernels.gemv_qkv import gemv_qkv
from internvl_rt.kernels.layer_norm import layer_norm
from internvl_rt.kernels.patch_embed import patch_embed
from internvl_rt.kernels.prefill_attention import prefill_attention
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv
from internvl_rt.kernels.quantise_rows import quantise_rows
from internvl_rt.kernels.resize_tiles import resize_tiles
from internvl_rt.kernels.rms_norm import rms_norm
from internvl_rt.kernels.rms_norm_fp8 import rms_norm_fp8
from internvl_rt.kernels.route_experts import route_experts
from internvl_rt.kernels.sample import sample
from internvl_rt.kernels.swiglu import swiglu
from internvl_rt.kernels.swiglu_fp8 import swiglu_fp8
from internvl_rt.kernels.unshuffle_project import unshuffle_project
from internvl_rt.kernels.vit_attention import vit_attention
from internvl_rt.model.linear import BLOCK, AnyLinear, Experts, GatedMlp, Linear, Linear4, Linear8, Norm
from internvl_rt.model.ops import Activation, Ops
from internvl_rt.model.step_inputs import Batch, HostTokens, LayerCache, Rotary, Sampling

# Up to so many rows a weight is multiplied by the kernels for few rows, a quantised one in pieces of MAX_ROWS. Each of
# them reads it, which takes less time than to write it multiplied out and to read that; by predictions, not measured.
MOST_ROWS = {Linear: MAX_ROWS, Linear8: 2 * MAX_ROWS, Linear4: 4 * MAX_ROWS}
MAX_COUNTERS = 1 << 16  # 1024 sequences of 64 kv heads


@dataclass(frozen=True, slots=True)
class Switches:
    """Features of the kernels that can be turned off, to time them and to find out whether they cause a fault.

    programmatic_launch: kernels of a decode step start before the previous one has ended (sm_90 on).

    The others are EXPERIMENTS, which stay off until a GPU has measured them. None changes a result.

    prefetch_keys: decode attention brings its first keys and values to L2 while the previous kernel runs.
    prefetch_weights: programs of decode attention that have no keys to read bring the weights of the next two products
        to L2: of `o` and `gate_up`, up to L2_PREFETCH_BYTES. That leaves no room for those of the next layer's `qkv`.
    early_trigger: the kernel after one of a decode step may start as soon as all programs of that one have, and more of
        a weight is loaded before the wait for the previous kernel.
    tokens_to_host: the kernel that draws tokens in a graph writes them to the host's memory too, so that no copy has to
        follow it.
    """

    programmatic_launch: bool = True
    prefetch_keys: bool = False
    prefetch_weights: bool = False
    early_trigger: bool = False
    tokens_to_host: bool = False


EXPERIMENTS = ("prefetch_keys", "prefetch_weights", "early_trigger", "tokens_to_host")


@dataclass(frozen=True, eq=False, kw_only=True)
class TritonOps(Ops):
    """Calls the kernels as `Ops` says, and fused kernels in their place where there are any.

    The fused kernels share memory between calls. Therefore a table serves one stream, and every engine has its own.
    """

    switches: Switches
    _shared: dict[torch.device, dict[str, Any]] = field(default_factory=dict)  # see _shared_arguments
    _counters: dict[torch.device, Tensor] = field(default_factory=dict)  # see _zero_counters
    _prefill: dict[torch.device, PrefillWorkspace] = field(default_factory=dict)  # see _prefill_workspace

    def check_cache(self, dtype: torch.dtype, device: torch.device) -> None:
        """Raises RequestError for FP8 on a GPU without its conversions."""
        has, least = target_of(device).capability, MIN_CAPABILITY["fp8"]
        if dtype == torch.float8_e4m3fn and has < least:
            raise RequestError(
                f"a KV cache in FP8 needs compute capability {least / 10}, but {device} has {has / 10}; choose "
                "kv_cache_dtype 'int8', which takes as little memory"
            )

    def linear(
        self,
        x: Tensor,
        linear: AnyLinear,
        *,
        norm: Norm | None = None,
        bias: bool = True,
        activation: Activation = "none",
        residual: Tensor | None = None,
        scale_N: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes `Ops.linear`. A product of the decoder is one kernel when it has few rows.

        The decoder's products have an RMSNorm or a residual, or are summands. The vision tower has the plain ones and
        those with GELU or LayerScale, always of many rows.
        """
        out = residual if out is None else out
        is_decoder = residual is not None and scale_N is None if norm is None else norm.bias_D is None
        is_decoder = is_decoder or linear.join == "add"
        most_rows = MAX_ROWS if is_fp8_product(linear, x) else MOST_ROWS[type(linear)]
        if not (is_decoder and bias and activation != "gelu" and 0 < len(x) <= most_rows):
            rest: dict[str, Any] = {"residual": residual, "scale_N": scale_N, "out": out, "activation": activation}
            if is_fp8_product(linear, x):
                return self._fp8_product(self._round(x, norm, linear), linear, x.dtype, bias=bias, **rest)
            return Ops.linear(self, x, linear, norm=norm, bias=bias, **rest)
        if len(x) <= MAX_ROWS:
            return self._few_rows(x, linear, norm, activation, residual, out)
        if out is None:
            out = x.new_empty(len(x), linear.num_outputs // (2 if activation == "swiglu" else 1))
        for start in range(0, len(x), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            self._few_rows(x[rows], linear, norm, activation, None if residual is None else residual[rows], out[rows])
        return out

    def _few_rows(
        self,
        x: Tensor,
        linear: AnyLinear,
        norm: Norm | None,
        activation: Activation,
        residual: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """Computes `linear` of at most MAX_ROWS rows by the kernel for its kind."""
        after = linear.bias_N, *((None, 0.0) if norm is None else (norm.weight_D, norm.eps))
        how: dict[str, Any] = {"activation": activation, "residual_RN": residual, "out": out}
        how |= self._shared_arguments(x.device)
        match linear:
            case Linear():
                return gemv(x, linear.weight_NK, *after, **how)
            case Linear8():
                return gemv_8bit(x, linear.weight_NK, linear.scale_NG, *after, **how)
            case Linear4():
                weight = linear.words_NW, linear.scale_NG, linear.zero_NG
                return gemv_4bit(x, *weight, *after, group=linear.group, **how)

    def product(self, x: Tensor, linear: AnyLinear, bias_N: Tensor | None, **after: Any) -> Tensor:
        """Computes `Ops.product`. With a weight that is multiplied out, rounded inputs would gain nothing."""
        return self.gemm_epilogue(x, self.dense(linear, x.dtype), bias_N, **after)

    def gated_mlp(self, x_TD: Tensor, norm: Norm, mlp: GatedMlp) -> Tensor:
        """Computes `Ops.gated_mlp`. Between two FP8 products of many rows, SwiGLU rounds its result itself."""
        gate_up, down = mlp.gate_up, mlp.down
        if not (len(x_TD) > MAX_ROWS and is_fp8_product(gate_up, x_TD) and is_fp8_product(down, x_TD)) or down.join:
            return Ops.gated_mlp(self, x_TD, norm, mlp)
        gate_up_T2F = self._fp8_product(self._round(x_TD, norm, gate_up), gate_up, x_TD.dtype)
        scale_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
        rounded = RoundedRows(swiglu_fp8(gate_up_T2F, scale_T, down.input_scale_1), scale_T)
        return self._fp8_product(rounded, down, x_TD.dtype, residual=x_TD, out=x_TD)

    def mix_experts(self, x_TD: Tensor, experts: Experts, residual_TD: Tensor | None = None) -> Tensor:
        """Computes `Ops.mix_experts` without the host: experts are chosen, and sorted by, on the device."""
        if len(x_TD) <= MAX_ROWS:
            logits_TX = self._few_rows(x_TD, experts.router, None, "none", None, None)
        else:
            logits_TX = self.linear(x_TD, experts.router)
        block = choose_block(len(x_TD), experts.num_chosen, experts.router.num_outputs)
        return self._mix(x_TD, experts, logits_TX, block, residual_TD)

    def _mix(self, x_TD: Tensor, experts: Experts, logits_TX: Tensor, block: int, residual_TD: Tensor | None) -> Tensor:
        """Computes `mix_experts`, given the router's logits. block: how many pairs are computed together."""
        chosen, first, held = experts.num_chosen, experts.first_here, experts.num_here
        how: dict[str, Any] = {"programmatic_launch": self.switches.programmatic_launch}
        which: dict[str, Any] = {"renormalise": experts.renormalises, "first": first, "count": held}
        routing = route_experts(logits_TX, chosen, block, **which, **how)
        pairs, how["num_experts"] = (routing.pair_W, routing.block_expert_B), held
        gate_up, group = _numbers_of(experts.all_gate_up)
        how["bias_N"] = experts.all_gate_up.bias_N
        y_QF = expert_gate_up(x_TD, *gate_up, *pairs, chosen, group=group, gate=experts.gate, **how)
        down, how["group"] = _numbers_of(experts.all_down)
        how |= {"first": first, "bias_N": experts.all_down.bias_N, "residual_TD": residual_TD, "out": residual_TD}
        return expert_down(y_QF, *down, routing.expert_id_TJ, routing.weight_TJ, *pairs, **how)

    def _round(self, x_RK: Tensor, norm: Norm | None, linear: Linear8) -> "RoundedRows":
        """Rounds rows, or their norm, to FP8, each by its largest value or all by the linear's static scale."""
        scale_R = x_RK.new_empty(len(x_RK), dtype=torch.float32)
        if norm is not None and norm.bias_D is None:
            numbers_RK = rms_norm_fp8(x_RK, norm.weight_D, norm.eps, scale_R, linear.input_scale_1)
        else:
            x_RK = x_RK if norm is None else self.norm(x_RK, norm)
            numbers_RK = quantise_rows(x_RK, scale_R, linear.input_scale_1)
        return RoundedRows(numbers_RK, scale_R)

    def _fp8_product(
        self,
        rows: "RoundedRows",
        linear: Linear8,
        dtype: torch.dtype,
        *,
        bias: bool = True,
        activation: Activation = "none",
        residual: Tensor | None = None,
        scale_N: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes `linear` of rows in FP8."""
        is_last = activation == "none" and scale_N is None
        added: dict[str, Any] = {"residual_RN": residual, "out": out} if is_last else {}
        bias_N = linear.bias_N if bias else None
        y = gemm_fp8(*rows, linear.weight_NK, linear.scale_NG, bias_N, dtype=dtype, **added)
        if scale_N is not None:
            assert residual is not None, "only a product with a residual has LayerScale"
            return torch.addcmul(residual, y, scale_N, out=out)
        y = self.swiglu(y) if activation == "swiglu" else torch.ops.aten.gelu_(y) if activation == "gelu" else y
        return y if out is None or is_last else out.copy_(y)

    def linear_residual_norm(
        self, y: Tensor, linear: AnyLinear, residual: Tensor, scale_N: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """Computes `Ops.linear_residual_norm`. Everything but the product is one pass over the rows."""
        if norm is None:
            return Ops.linear_residual_norm(self, y, linear, residual, scale_N, norm)
        product = self.linear(y, linear, bias=False)
        weights = norm.weight_D, norm.bias_D, norm.eps
        return residual, add_norm(residual, product, linear.bias_N, scale_N, *weights, out=product)

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
        """Computes `Ops.norm_qkv_rope_kv`. It is one kernel for few rows without norms on q and k, unless the cache is
        in 8 bits or what is rotated is scaled.
        """
        is_fused = q_norm is None and norm.bias_D is None and cache.scale_BGP2 is None and rotary.scale == 1
        if not (isinstance(qkv, Linear) and is_fused and 0 < len(x_TD) <= MAX_ROWS):
            where = position_T, rotary, cache, slot_T
            return Ops.norm_qkv_rope_kv(self, x_TD, norm, qkv, q_norm, k_norm, *where)
        _, num_kv_heads, _, head_dim = cache.k_cache_BGPC.shape
        num_heads = qkv.num_outputs // head_dim - 2 * num_kv_heads
        weights = norm.weight_D, norm.eps, qkv.weight_NK, qkv.bias_N
        places = position_T, rotary.inv_freq_C, cache.k_cache_BGPC, cache.v_cache_BGPC, slot_T
        return gemv_qkv(x_TD, *weights, *places, num_heads, **self._shared_arguments(x_TD.device))

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
        """Computes `Ops.paged_attention`. Sequences that decode have their own kernel, whose work is split.

        Upcoming weights are prefetched for a few rows only. With more rows cuBLAS multiplies, in its own order.
        """
        y_THC, n, switches = torch.empty_like(q_THC), batch.num_decodes, self.switches
        caches = cache.k_cache_BGPC, cache.v_cache_BGPC
        if n > 0:
            assert batch.split_start_S1 is not None, "a cache for these kernels plans the splits"
            assert batch.split_W3 is not None, "a cache for these kernels plans the splits"
            decodes = batch.block_table_SN[:n], batch.seq_len_S[:n], batch.split_start_S1[: n + 1], batch.split_W3
            counters_SG = self._zero_counters(q_THC.device, n, caches[0].shape[1])
            prefetches = switches.prefetch_weights and len(q_THC) <= MAX_ROWS
            decode_attention(
                *(q_THC[:n], *caches, *decodes, cache.scale_BGP2, counters_SG),
                sinks_H=sinks_H,
                window=window,
                upcoming=[linear.weight_NK for linear in upcoming if isinstance(linear, Linear)] if prefetches else (),
                programmatic_launch=switches.programmatic_launch,
                prefetch_keys=switches.prefetch_keys,
                early_trigger=switches.early_trigger,
                out=y_THC[:n],
            )
        if n < len(batch.seq_len_S):
            chunks = batch.block_table_SN[n:], batch.query_start_R1, batch.seq_len_S[n:]
            operands = (q_THC, *caches, *chunks, batch.max_query_len, cache.scale_BGP2)
            workspace = self._prefill_workspace(q_THC.device)
            prefill_attention(*operands, sinks_H=sinks_H, window=window, workspace=workspace, out=y_THC)
        return y_THC

    def sample(
        self, logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor, on_host: HostTokens | None = None
    ) -> None:
        host_KR, host_row_1 = on_host or (None, None)
        sample(logits_RV, *sampling, out=token_id_R, host_KR=host_KR, host_row_1=host_row_1)

    def _shared_arguments(self, device: torch.device) -> dict[str, Any]:
        """Returns the arguments that all products of few rows share. The parts of a product meet in the workspace."""
        if device not in self._shared:
            self._shared[device] = {
                "workspace": build_gemv_workspace(device),
                "programmatic_launch": self.switches.programmatic_launch,
                "early_trigger": self.switches.early_trigger,
            }
        return self._shared[device]

    def _zero_counters(self, device: torch.device, rows: int, kv_heads: int) -> Tensor | None:
        """Returns counters of the finished parts of a row in decode attention: zeros before and after every call.

        Returns None where so many are needed that the call must make its own.
        """
        if rows * kv_heads > MAX_COUNTERS:
            return None
        if device not in self._counters:
            self._counters[device] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
        return self._counters[device][: rows * kv_heads].view(rows, kv_heads)

    def _prefill_workspace(self, device: torch.device) -> PrefillWorkspace:
        """Returns the memory in which prefill attention adds up what programs find that share a block of queries."""
        if device not in self._prefill:
            self._prefill[device] = build_prefill_workspace(device)
        return self._prefill[device]


def _numbers_of(linear: AnyLinear) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], int]:
    """Returns what a weight consists of, its scales and its zeros, and how many columns share a scale."""
    match linear:
        case Linear():
            return (linear.weight_NK, None, None), BLOCK
        case Linear8():
            return (linear.weight_NK, linear.scale_NG, None), BLOCK
        case Linear4():
            return (linear.words_NW, linear.scale_NG, linear.zero_NG), linear.group


class RoundedRows(NamedTuple):
    """Rows in FP8: x[r] = numbers[r] * scale[r], about."""

    numbers_RK: Tensor
    scale_R: Tensor


def is_fp8_product(linear: AnyLinear, x: Tensor) -> TypeGuard[Linear8]:
    """Says whether a product of many rows is one of FP8 numbers: the linear's file allows it, and the GPU has them."""
    if not isinstance(linear, Linear8) or linear.inputs == "full" or linear.weight_NK.dtype != torch.float8_e4m3fn:
        return False
    fits = x.ndim == 2 and linear.num_inputs <= MAX_WIDTH
    return fits and target_of(x.device).capability >= FP8_CAPABILITY


def triton_ops(device: torch.device, switches: Switches = Switches()) -> TritonOps:
    """Makes a table for one stream of a device. Raises RequestError for a device on which the kernels cannot run."""
    try:
        target = target_of(device)
    except ValueError as error:
        raise RequestError(f"backend 'triton' cannot run here: {error}; choose 'torch'") from error
    return TritonOps(
        name="triton",
        captures_graphs=True,
        resizes_on_device=True,
        writes_to_host=switches.tokens_to_host,
        row_multiple=16,  # Triton loads 16 bytes at once only from rows whose stride is a multiple of 16
        num_split_items=partial(num_split_items, num_sms=target.num_sms),
        resize_tiles=resize_tiles,
        patch_embed=patch_embed,
        layer_norm=layer_norm,
        rms_norm=rms_norm,
        gemm_epilogue=gemm_epilogue,
        swiglu=swiglu,
        vit_attention=vit_attention,
        unshuffle_project=unshuffle_project,
        embed_tokens=embed_tokens,
        qkv_rope_kv=qkv_rope_kv,
        copy_blocks=copy_blocks,
        dequantise=dequantise,
        switches=switches,
    )
