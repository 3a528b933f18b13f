"""The language model: embeddings and a paged KV cache to logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.ops import Linear, Norm, Ops
from internvl_rt.model.step_inputs import LayerCache, StepInputs


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    norm1: Norm
    qkv: Linear  # rows: all q heads, all k heads, all v heads
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    norm2: Norm
    gate_up: Linear  # rows: gate, up
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding_VD: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    lm_head: Linear


def rotary_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """inv_freq[j] = theta^(-2j / C) for j < C / 2, float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_theta**exponent


def run_layers(
    ops: Ops,
    weights: DecoderWeights,
    inv_freq_C: Tensor,
    caches: tuple[LayerCache, ...],
    step: StepInputs,
    x_TD: Tensor,
) -> Tensor:
    """What the last layer leaves; the keys and values of every token are left in the cache."""
    for layer, cache in zip(weights.layers, caches, strict=True):
        k_cache, v_cache = cache.k_cache_BGPC, cache.v_cache_BGPC
        q_THC = ops.norm_qkv_rope_kv(
            x_TD,
            layer.norm1,
            layer.qkv,
            layer.q_norm,
            layer.k_norm,
            step.position_T,
            inv_freq_C,
            k_cache,
            v_cache,
            step.slot_T,
        )
        y_THC = ops.paged_attention(q_THC, k_cache, v_cache, step.batch)
        x_TD = ops.linear_residual(y_THC.flatten(1), layer.o, x_TD)
        y_TF = ops.norm_linear_swiglu(x_TD, layer.norm2, layer.gate_up)
        x_TD = ops.linear_residual(y_TF, layer.down, x_TD)
    return x_TD
