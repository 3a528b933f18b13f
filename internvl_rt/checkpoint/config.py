"""The model's configuration: the fields on which the runtime's decisions rest, read once from config.json.

One `VisionConfig` and one `DecoderConfig` cover the whole family (InternViT-300M and -6B; Qwen2, Qwen3, Llama and
InternLM2-layout language models) through explicit flags; there is no class per model.

Both formats are read: the original one (`InternVLChatConfig` of OpenGVLab/InternVL) and `-hf` (`InternVLConfig` of
transformers). A missing key means what it means to the official class, a key that cannot matter is not looked at, and
a value that the runtime would not honour is refused with key, value and file.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from internvl_rt.checkpoint.json_section import MAX_SIZE, UNSUPPORTED, Section, read_json
from internvl_rt.checkpoint.quantization import Quantization, read_quantization

LOG = logging.getLogger("internvl_rt")
MAX_TILES = 128  # of a picture, the thumbnail not counted
MAX_SIDE = 2048  # of a tile, pixels
KNOWN_MODELS = {  # the config.json in the package, by name; the 9B's vocab_size is an assumption
    f"InternVL3-{size}": Path(__file__).parents[1] / "configs" / f"InternVL3-{size}.json"
    for size in ("1B", "2B", "8B", "9B", "14B", "38B", "78B")
}
DEFAULT_SYSTEM_MESSAGE = (  # of the `internvl2_5` template, internvl_chat/internvl/conversation.py
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """InternViT: pre-norm blocks with LayerScale, a class token, learned positions and no final norm."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int  # side of a tile, pixels
    patch_size: int  # pixels
    norm: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool  # RMS norm over all heads' channels together, before attention

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches per tile, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-shaped decoder: RMS norm, rotary positions, grouped-query attention, SiLU-gated MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_position: int  # the trained window, tokens
    qkv_bias: bool
    qk_norm: bool  # RMS norm per head on q and k, before the rotation (Qwen3)
    tie_embeddings: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    format: Literal["original", "hf"]
    downsample: int  # patches per visual token, along one side (2)
    unshuffle: Literal["v1", "v2"]  # v1 transposes the grid of visual tokens
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    system_message: str | None  # of a conversation without its own; None: no system turn
    dtype: Literal["bfloat16", "float16", "float32"]  # of the checkpoint, as config.json says
    end_token_ids: tuple[int, ...] = ()  # an answer ends with any of them; (): with the template's <|im_end|>
    quantization: Quantization | None = None  # of the stored weights

    @property
    def tokens_per_tile(self) -> int:
        return self.vision.num_patches // self.downsample**2


def load_config(path: Path) -> ModelConfig:
    """Reads a checkpoint folder, or one config.json, of either format.

    What a `-hf` model's own files say beside it is read as transformers does: tile limits from processor_config.json or
    preprocessor_config.json, end tokens from generation_config.json, the system message from the chat template.
    Raises ConfigError for a missing, malformed or unsupported value.
    """
    return parse_config(read_json(path / "config.json" if path.is_dir() else path))


def parse_config(top: Section) -> ModelConfig:
    """Reads the content of a config.json, as `load_config` does."""
    original = top.choice("model_type", ("internvl_chat", "internvl")) == "internvl_chat"
    # VisualPRM's class, InternVLRewardModel, has no other weights: it scores steps by the language model's head.
    chat = (["InternVLChatModel"], ["InternVLRewardModel"])
    top.support("architectures", *(chat if original else (["InternVLForConditionalGeneration"],)))
    vision, text = top.section("vision_config"), top.section("llm_config" if original else "text_config")
    config = _read_original(top, vision, text) if original else _read_hf(top, vision, text)
    vision.support("quantization_config", None)
    return replace(config, quantization=read_quantization(top, text))


_MAX_COUNT = 1 << 10  # of layers and of end tokens


class _DecoderClass(NamedTuple):
    """A language model class: what its missing keys mean, and the flags that must be off, with their defaults."""

    model_type: str
    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: width / heads
    max_position: int
    flags_off: Mapping[str, bool]


# What the missing keys of each format mean to its ViT class.
_ORIGINAL_VIT = VisionConfig(3200, 48, 25, 12800, 224, 14, "rms_norm", 1e-6, qkv_bias=False, qk_norm=True)
_HF_VIT = VisionConfig(1024, 24, 16, 4096, 448, 14, "layer_norm", 1e-6, qkv_bias=False, qk_norm=False)
_SLIDING, _BIASED = {"use_sliding_window": False}, {"attention_bias": False}
_DECODERS = {
    "Qwen2ForCausalLM": _DecoderClass("qwen2", 151936, 22016, 32, None, 32768, _SLIDING),
    "Qwen3ForCausalLM": _DecoderClass("qwen3", 151936, 22016, 32, 128, 32768, _SLIDING | _BIASED),
    "InternLM2ForCausalLM": _DecoderClass("internlm2", 103168, 11008, None, None, 2048, {"bias": True}),
    "LlamaForCausalLM": _DecoderClass("llama", 32000, 11008, None, None, 2048, _BIASED | {"mlp_bias": False}),
}


def _read_original(top: Section, vision: Section, text: Section) -> ModelConfig:
    """Reads the original format; defaults as in configuration_{internvl_chat,intern_vit,internlm2}.py."""
    top.choice("template", ("internvl2_5",))
    top.support("select_layer", -1)
    top.support("pad2square", False)
    top.support("flash_mode", None, False)
    vision.support("use_moe", False)
    vision.support("model_type", "intern_vit_6b")
    vision_config = _read_vision(vision, _ORIGINAL_VIT, qkv_bias="qkv_bias", qk_norm="qk_normalization")
    top.support("force_image_size", None, vision_config.image_size)
    names = text.values.get("architectures")
    decoder_class = _DECODERS.get(str(names[0])) if isinstance(names, list) and names else None
    if decoder_class is None:
        raise text.refusal("architectures", f"one of {', '.join(_DECODERS)}", UNSUPPORTED)
    # The config class of InternVL3 clears this flag; that of InternVL3.5, which came with Qwen3, respects it.
    tied = decoder_class.model_type == "qwen3" and text.flag("tie_word_embeddings", False)
    dynamic, max_tiles = top.flag("dynamic_image_size", False), top.integer("max_dynamic_patch", 6, maximum=MAX_TILES)
    min_tiles = top.integer("min_dynamic_patch", 1, maximum=max_tiles)
    return ModelConfig(
        vision=vision_config,
        decoder=_read_decoder(text, decoder_class, tied),
        format="original",
        downsample=_read_downsample(top, vision_config),
        unshuffle=top.choice("ps_version", ("v1", "v2"), "v1"),
        min_tiles=min_tiles if dynamic else 1,
        max_tiles=max_tiles if dynamic else 1,
        thumbnail=top.flag("use_thumbnail", False),
        system_message=top.text("system_message") or DEFAULT_SYSTEM_MESSAGE,
        dtype=_read_dtype(top, text),
    )


def _read_hf(top: Section, vision: Section, text: Section) -> ModelConfig:
    """Reads the -hf format; defaults as in transformers' models/{internvl,qwen2,qwen3,llama}/configuration_*.py."""
    # Here, because jinja2 is slow to import and the original format does without it.
    from internvl_rt.checkpoint.chat_template import find_system_message

    top.support("projector_hidden_act", "gelu")
    top.support("vision_feature_layer", -1)
    top.support("vision_feature_select_strategy", "default")
    vision.support("use_absolute_position_embeddings", True)
    vision.support("use_mean_pooling", True)  # without it one more norm follows the last layer
    vision.support("model_type", "internvl_vision")
    vision_config = _read_vision(vision, _HF_VIT, qkv_bias="attention_bias", qk_norm="use_qk_norm")
    if vision_config.qk_norm:
        vision.support("layer_norm_eps", 1e-6)  # the class has this value built in for q and k
    model_type = text.choice("model_type", ("qwen2", "qwen3", "llama"), "qwen2")
    decoder_class = next(one for one in _DECODERS.values() if one.model_type == model_type)
    # transformers 4 reads the inner flag, 5 the outer one; where they differ, `load_weights` looks at the tensors.
    tied = text.flag("tie_word_embeddings", False) or top.flag("tie_word_embeddings", False)
    # Its crop_to_patches is not read: InternVLProcessor turns tiling on whatever the file says.
    processor = _read_image_processor(top.file.parent)
    processor.support("image_mean", [0.485, 0.456, 0.406])
    processor.support("image_std", [0.229, 0.224, 0.225])
    processor.support("rescale_factor", 1 / 255)
    processor.support("resample", 3)  # bicubic
    processor.support("size", dict.fromkeys(("height", "width"), vision_config.image_size))
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        processor.support(key, True, None)
    max_tiles = processor.integer("max_patches", 12, maximum=MAX_TILES)
    decoder = _read_decoder(text, decoder_class, tied)
    return ModelConfig(
        vision=vision_config,
        decoder=decoder,
        format="hf",
        downsample=_read_downsample(top, vision_config),
        unshuffle="v2",
        min_tiles=processor.integer("min_patches", 1, maximum=max_tiles),
        max_tiles=max_tiles,
        thumbnail=True,
        system_message=find_system_message(top.file.parent),
        dtype=_read_dtype(top, text),
        end_token_ids=_read_end_tokens(top, text, decoder.vocab_size),
    )


def _read_end_tokens(top: Section, text: Section, vocab_size: int) -> tuple[int, ...]:
    """Reads eos_token_id of generation_config.json, or without that file of config.json; () if it is not there.

    What else transformers would do by that file is logged, since here `SamplingParams` alone say how tokens are drawn.
    """
    file = top.file.parent / "generation_config.json"
    found = [read_json(file)] if os.path.lexists(file) else [top, text]
    penalty = found[0].values.get("repetition_penalty")
    if found[0].values.get("do_sample") is True or (isinstance(penalty, int | float) and penalty != 1):
        LOG.warning("%s asks for draws or a penalty; here answers are greedy unless SamplingParams ask for it", file)
    section = next((section for section in found if section.has("eos_token_id")), None)
    if section is None:
        LOG.warning("%s names no eos_token_id: transformers ends no answer, here <|im_end|> does", found[0].file)
        return ()
    value = section.values["eos_token_id"]
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not 0 < len(ids) <= _MAX_COUNT or any(type(each) is not int or not 0 <= each < vocab_size for each in ids):
        raise section.refusal("eos_token_id", f"a token id below the vocabulary's {vocab_size:,}, or a list of these")
    return ids


def _read_image_processor(folder: Path) -> Section:
    """Reads part of processor_config.json (transformers 5), else preprocessor_config.json, else {}: all defaults."""
    file = folder / "processor_config.json"
    if os.path.lexists(file) and (processor := read_json(file)).has("image_processor"):
        return processor.section("image_processor")
    file = folder / "preprocessor_config.json"
    return read_json(file) if os.path.lexists(file) else Section(file, "", {})


def _read_vision(section: Section, missing: VisionConfig, *, qkv_bias: str, qk_norm: str) -> VisionConfig:
    """Reads the ViT; qkv_bias and qk_norm are the keys that the two formats name differently."""
    section.support("hidden_act", "gelu")
    section.support("num_channels", 3)
    config = VisionConfig(
        hidden_size=section.integer("hidden_size", missing.hidden_size),
        num_layers=section.integer("num_hidden_layers", missing.num_layers, maximum=_MAX_COUNT),
        num_heads=section.integer("num_attention_heads", missing.num_heads),
        intermediate_size=section.integer("intermediate_size", missing.intermediate_size),
        image_size=section.side("image_size", missing.image_size),
        patch_size=section.side("patch_size", missing.patch_size),
        norm=section.choice("norm_type", ("layer_norm", "rms_norm"), missing.norm),
        norm_eps=section.real("layer_norm_eps", missing.norm_eps),
        qkv_bias=section.flag(qkv_bias, missing.qkv_bias),
        qk_norm=section.flag(qk_norm, missing.qk_norm),
    )
    if config.hidden_size % config.num_heads:
        raise section.refusal("hidden_size", f"a multiple of num_attention_heads, {config.num_heads}")
    if config.image_size % config.patch_size:
        raise section.refusal("image_size", f"a multiple of patch_size, {config.patch_size}", UNSUPPORTED)
    if config.image_size > MAX_SIDE:
        raise section.refusal("image_size", f"at most {MAX_SIDE} pixels", UNSUPPORTED)
    return config


def _read_decoder(section: Section, missing: _DecoderClass, tied: bool) -> DecoderConfig:
    section.support("hidden_act", "silu")
    for key, default in missing.flags_off.items():
        if section.flag(key, default):
            raise section.refusal(key, "false", UNSUPPORTED)
    hidden_size, num_heads = section.integer("hidden_size", 4096), section.integer("num_attention_heads", 32)
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
    return DecoderConfig(
        hidden_size=hidden_size,
        num_layers=section.integer("num_hidden_layers", 32, maximum=_MAX_COUNT),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=section.integer("intermediate_size", missing.intermediate_size),
        vocab_size=section.integer("vocab_size", missing.vocab_size),
        norm_eps=section.real("rms_norm_eps", 1e-6),
        rope_theta=_read_rope_theta(section),
        max_position=section.integer("max_position_embeddings", missing.max_position),
        qkv_bias=missing.model_type == "qwen2",
        qk_norm=missing.model_type == "qwen3",
        tie_embeddings=tied,
    )


def _read_rope_theta(section: Section) -> float:
    """Reads theta from rope_theta, or from the rope_parameters of transformers 5, and checks the kind of scaling.

    Dynamic scaling is checked only: it acts beyond the trained window (modeling_rope_utils.py), which is not exceeded.
    """
    theta = section.real("rope_theta", 10000.0)
    key = "rope_parameters" if section.has("rope_parameters") else "rope_scaling"
    if not section.has(key):
        return theta
    rope = section.section(key)
    kinds = ("default", "dynamic")
    kind = rope.choice("rope_type", kinds, rope.choice("type", kinds, "default"))
    if rope.has("type"):
        rope.support("type", kind)
    rope.support("partial_rotary_factor", 1.0)
    if kind == "dynamic":
        rope.real("factor")
    return rope.real("rope_theta", theta)


def _read_downsample(section: Section, vision: VisionConfig) -> int:
    ratio, grid = section.real("downsample_ratio", 0.5), vision.image_size // vision.patch_size
    downsample = round(1 / ratio)
    if ratio * downsample != 1 or grid % downsample:
        raise section.refusal("downsample_ratio", f"one over a divisor of the tile's {grid} patches", UNSUPPORTED)
    if vision.hidden_size * downsample**2 > MAX_SIZE:
        raise section.refusal("downsample_ratio", f"fewer than {MAX_SIZE} channels in a visual token", UNSUPPORTED)
    return downsample


def _read_dtype(*sections: Section) -> Literal["bfloat16", "float16", "float32"]:
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if section.has(key):
                remedy = f"write the dtype of the weights at {key}"
                return section.choice(key, ("bfloat16", "float16", "float32"), remedy=remedy)
    return "float32"
