"""The language model's part of a config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internvl_rt.checkpoint.json_section import MAX_SIZE, UNSUPPORTED, Section

MAX_COUNT = 1 << 10  # of layers and of end tokens
_MOST_OF_LAYER = 512  # experts, as many as `kernels/route_experts.py` can choose from
_MAX_EXPERTS = 1 << 16  # of all layers, each with tensors of its own


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts that each layer of a decoder has in place of one MLP. A token goes through some of them."""

    num_experts: int
    num_chosen: int  # of each token
    renormalises: bool  # whether the chosen ones' probabilities are divided by their sum
    gate: Literal["silu", "clamped"] = "silu"
    biases: bool = False  # of the router and of each expert's products
    first_here: int = 0  # of a rank: the experts that it holds
    num_here: int | None = None  # None: all

    @property
    def count_here(self) -> int:
        return self.num_experts if self.num_here is None else self.num_here


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary frequencies of a longer window (YaRN, arXiv 2309.00071), as in transformers' modeling_rope_utils.py."""

    factor: float
    original: int  # the window before, tokens
    beta_fast: float
    beta_slow: float
    truncates: bool  # whether the borders between kept and divided frequencies are whole numbers
    scale: float  # of sine and cosine


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-shaped decoder: RMS norm, rotary positions, grouped-query attention, SiLU-gated MLPs."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP, or of each expert
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_position: int  # the trained window, tokens
    qkv_bias: bool
    qk_norm: bool  # RMS norm per head on q and k, before the rotation (Qwen3)
    tie_embeddings: bool
    experts: ExpertsConfig | None = None  # None: each layer has one MLP
    o_bias: bool = False
    sinks: bool = False  # one more logit in the softmax of each head, which has no value
    windows: tuple[int | None, ...] = ()  # of each layer, tokens that one sees, itself the last; (): all, in all layers
    yarn: Yarn | None = None

    def window_of(self, layer: int) -> int | None:
        """Returns how many tokens one sees in a layer; None: all before it."""
        return self.windows[layer] if self.windows else None

    @property
    def window(self) -> int | None:
        """The longest window of any layer; None if no layer has one."""
        return max((window for window in self.windows if window is not None), default=None)

    @property
    def num_tables(self) -> int:
        """How many tables of blocks a sequence has in the KV cache: layers with a window have one of their own."""
        return 1 if self.window is None else 2


class DecoderClass(NamedTuple):
    """A language model class: what its missing keys mean, and the flags that must be off, with their defaults."""

    model_type: str
    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: width / heads
    max_position: int
    flags_off: Mapping[str, bool]
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    norm_eps: float = 1e-6
    theta: float = 10000.0


_LAYER_KINDS = "sliding_attention", "full_attention"
_SLIDING, _BIASED = {"use_sliding_window": False}, {"attention_bias": False}
DECODERS = {
    "Qwen2ForCausalLM": DecoderClass("qwen2", 151936, 22016, 32, None, 32768, _SLIDING),
    "Qwen3ForCausalLM": DecoderClass("qwen3", 151936, 22016, 32, 128, 32768, _SLIDING | _BIASED),
    "Qwen3MoeForCausalLM": DecoderClass("qwen3_moe", 151936, 768, 4, None, 32768, _SLIDING | _BIASED, 2048, 24),
    "GptOssForCausalLM": DecoderClass("gpt_oss", 201088, 2880, 8, 64, 131072, {}, 2880, 36, 64, 1e-5, 150000.0),
    "InternLM2ForCausalLM": DecoderClass("internlm2", 103168, 11008, None, None, 2048, {"bias": True}),
    "LlamaForCausalLM": DecoderClass("llama", 32000, 11008, None, None, 2048, _BIASED | {"mlp_bias": False}),
}


def read_decoder(section: Section, missing: DecoderClass, tied: bool) -> DecoderConfig:
    section.support("hidden_act", "silu")
    for key, default in missing.flags_off.items():
        if section.flag(key, default):
            raise section.refusal(key, "false", UNSUPPORTED)
    is_moe, is_gpt_oss = missing.model_type == "qwen3_moe", missing.model_type == "gpt_oss"
    width = section.integer("moe_intermediate_size" if is_moe else "intermediate_size", missing.intermediate_size)
    num_layers = section.integer("num_hidden_layers", missing.num_layers, maximum=MAX_COUNT)
    hidden_size = section.integer("hidden_size", missing.hidden_size)
    num_heads = section.integer("num_attention_heads", missing.num_heads)
    num_kv_heads, head_dim = missing.num_kv_heads or num_heads, missing.head_dim or hidden_size // num_heads
    if "num_key_value_heads" in section.values:  # null: as many as query heads, in every class
        num_kv_heads = section.integer("num_key_value_heads") if section.has("num_key_value_heads") else num_heads
    if num_heads % num_kv_heads:
        raise section.refusal("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if section.has("head_dim"):
        head_dim = section.integer("head_dim")
    elif missing.head_dim is None and hidden_size % num_heads:
        raise section.refusal("hidden_size", f"a multiple of num_attention_heads, {num_heads}")
    if head_dim % 2:
        raise section.refusal("head_dim", f"an even number, not {head_dim}")
    if (num_heads + 2 * num_kv_heads) * head_dim > MAX_SIZE:
        raise section.refusal("num_attention_heads", f"fewer than {MAX_SIZE} channels in all heads of {head_dim}")
    theta, yarn = _read_rope(section, missing)
    return DecoderConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=width,
        vocab_size=section.integer("vocab_size", missing.vocab_size),
        norm_eps=section.real("rms_norm_eps", missing.norm_eps),
        rope_theta=theta,
        max_position=section.integer("max_position_embeddings", missing.max_position),
        qkv_bias=missing.model_type in ("qwen2", "gpt_oss"),
        qk_norm=missing.model_type.startswith("qwen3"),
        tie_embeddings=tied,
        experts=_read_experts(section, width, num_layers, is_gpt_oss) if is_moe or is_gpt_oss else None,
        o_bias=is_gpt_oss,
        sinks=is_gpt_oss,
        windows=_read_windows(section, num_layers) if is_gpt_oss else (),
        yarn=yarn,
    )


def _read_windows(section: Section, num_layers: int) -> tuple[int | None, ...]:
    """Reads the layers of GPT-OSS, every other one of which has a window, the first one among them."""
    kinds = ["sliding_attention", "full_attention"]
    if section.has("layer_types"):
        kinds = section.values["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != num_layers or not {*map(str, kinds)} <= set(_LAYER_KINDS):
            raise section.refusal("layer_types", f"for each of {num_layers} layers one of {', '.join(_LAYER_KINDS)}")
    window = section.integer("sliding_window", 128) if section.values.get("sliding_window", 128) is not None else None
    return tuple(window if kinds[layer % len(kinds)] == _LAYER_KINDS[0] else None for layer in range(num_layers))


def _read_experts(section: Section, width: int, num_layers: int, is_gpt_oss: bool) -> ExpertsConfig:
    """Reads the experts of Qwen3-MoE or GPT-OSS. transformers 5 writes the former's number at another key."""
    section.support("decoder_sparse_step", 1)
    section.support("mlp_only_layers", None, [])
    section.support("swiglu_alpha", 1.702)
    section.support("swiglu_limit", 7.0, 7)
    key = "num_local_experts" if section.has("num_local_experts") else "num_experts"
    num_experts = section.integer(key, 128, maximum=_MOST_OF_LAYER)
    if 2 * num_experts * width > MAX_SIZE or num_experts * num_layers > _MAX_EXPERTS:
        few = f"at most {min(MAX_SIZE // (2 * width), _MAX_EXPERTS // num_layers):,} of {width} in {num_layers} layers"
        raise section.refusal(key, few, UNSUPPORTED)
    if is_gpt_oss:  # softmax of the chosen ones' logits is softmax of all, divided by the sum of the chosen ones
        num_chosen = section.integer("num_experts_per_tok", 4, maximum=num_experts)
        return ExpertsConfig(num_experts, num_chosen, renormalises=True, gate="clamped", biases=True)
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=section.integer("num_experts_per_tok", 8, maximum=num_experts),
        renormalises=section.flag("norm_topk_prob", False),
    )


def _read_rope(section: Section, missing: DecoderClass) -> tuple[float, Yarn | None]:
    """Reads theta from rope_theta, or from the rope_parameters of transformers 5, and the kind of scaling.

    Dynamic scaling is checked only: it acts beyond the trained window (modeling_rope_utils.py), which is not exceeded.
    """
    kinds = ("yarn",) if missing.model_type == "gpt_oss" else ("default", "dynamic")
    theta = section.real("rope_theta", missing.theta)
    key = "rope_parameters" if section.has("rope_parameters") else "rope_scaling"
    if not section.has(key):
        return theta, GPT_OSS_YARN if kinds == ("yarn",) else None
    rope = section.section(key)
    kind = rope.choice("rope_type", kinds, rope.choice("type", kinds, kinds[0]))
    if rope.has("type"):
        rope.support("type", kind)
    rope.support("partial_rotary_factor", 1.0)
    theta = rope.real("rope_theta", theta)
    if kind == "default":
        return theta, None
    factor = rope.real("factor")
    if kind == "dynamic":
        return theta, None
    rope.support("mscale", None)
    rope.support("mscale_all_dim", None)
    return theta, Yarn(
        factor=factor,
        original=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
        truncates=rope.flag("truncate", True),
        scale=rope.real("attention_factor") if rope.has("attention_factor") else yarn_scale(factor),
    )


def yarn_scale(factor: float) -> float:
    """Returns by what sine and cosine are multiplied, as the paper suggests."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


GPT_OSS_YARN = Yarn(32.0, 4096, 32.0, 1.0, truncates=False, scale=yarn_scale(32.0))
