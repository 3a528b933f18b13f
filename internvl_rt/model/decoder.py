"""The language model: embeddings and a paged KV cache to logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.linear import AnyLinear, Norm
from internvl_rt.model.ops import Ops
from internvl_rt.model.step_inputs import LayerCache, StepInputs


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    norm1: Norm
    qkv: AnyLinear  # rows: all q heads, all k heads, all v heads
    q_norm: Norm | None
    k_norm: Norm | None
    o: AnyLinear
    norm2: Norm
    gate_up: AnyLinear  # rows: gate, up
    down: AnyLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding_VD: Tensor
    lm_head: AnyLinear  # the largest one is before the layers, so that they are not there yet while it is there twice
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    kv_scale_L2: Tensor | None = None  # float32: static scales of an 8-bit cache's keys and values, if there are any


def rotary_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Computes inv_freq[j] = theta^(-2j / C) for j < C / 2, float32."""
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
    """Returns x_TD after the last layer. Writes the keys and values of every token to their slots in the caches."""
    for layer, cache in zip(weights.layers, caches, strict=True):
        projection = layer.norm1, layer.qkv, layer.q_norm, layer.k_norm
        q_THC = ops.norm_qkv_rope_kv(x_TD, *projection, step.position_T, inv_freq_C, cache, step.slot_T)
        y_THC = ops.paged_attention(q_THC, cache, step.batch, upcoming=(layer.o, layer.gate_up))
        x_TD = ops.linear(y_THC.flatten(1), layer.o, residual=x_TD)
        x_TD = ops.gated_mlp(x_TD, layer.norm2, layer.gate_up, layer.down)
    return x_TD
