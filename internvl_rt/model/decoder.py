"""The language model: embeddings and a paged KV cache to logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.linear import AnyLinear, Experts, GatedMlp, Norm
from internvl_rt.model.ops import Ops
from internvl_rt.model.step_inputs import LayerCache, Rotary, StepInputs


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    norm1: Norm
    qkv: AnyLinear  # rows: all q heads, all k heads, all v heads
    q_norm: Norm | None
    k_norm: Norm | None
    o: AnyLinear
    norm2: Norm
    mlp: GatedMlp | Experts
    sinks_H: Tensor | None = None  # a logit for each query head, which takes weight in the softmax and has no value
    window: int | None = None  # how many tokens one attends to, itself the last; None: all before it


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding_VD: Tensor
    lm_head: AnyLinear  # the largest one is before the layers, so that they are not there yet while it is there twice
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    kv_scale_L2: Tensor | None = None  # float32: static scales of an 8-bit cache's keys and values, if there are any


def build_rotary(config: DecoderConfig, device: torch.device) -> Rotary:
    """Computes inv_freq[j] = theta^(-2j / C) for j < C / 2; with YaRN those of low frequencies are divided."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    freq_C, yarn = config.rope_theta**exponent, config.yarn
    if yarn is None:
        return Rotary(1.0 / freq_C)

    def border(turns: float) -> float:
        """Returns the index of the frequency that turns so often in the window before."""
        wavelength = yarn.original / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = border(yarn.beta_fast), border(yarn.beta_slow)
    if yarn.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    index = torch.arange(config.head_dim // 2, dtype=torch.float32, device=device)
    kept_C = 1 - ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return Rotary(1.0 / (yarn.factor * freq_C) * (1 - kept_C) + 1.0 / freq_C * kept_C, yarn.scale)


def run_layers(
    ops: Ops,
    weights: DecoderWeights,
    rotary: Rotary,
    caches: tuple[LayerCache, ...],
    step: StepInputs,
    x_TD: Tensor,
) -> Tensor:
    """Returns x_TD after the last layer. Writes the keys and values of every token to their slots in the caches."""
    for layer, cache in zip(weights.layers, caches, strict=True):
        projection, (slot_T, batch) = (layer.norm1, layer.qkv, layer.q_norm, layer.k_norm), step.places(layer.window)
        q_THC = ops.norm_qkv_rope_kv(x_TD, *projection, step.position_T, rotary, cache, slot_T)
        upcoming = layer.o, layer.mlp.first
        y_THC = ops.paged_attention(q_THC, cache, batch, upcoming, sinks_H=layer.sinks_H, window=layer.window)
        x_TD = ops.linear(y_THC.flatten(1), layer.o, residual=x_TD)
        x_TD = ops.mlp(x_TD, layer.norm2, layer.mlp)
    return x_TD
