"""The model's configuration: the fields on which the runtime's decisions rest, read once from config.json.

One `VisionConfig` and one `DecoderConfig` cover the whole family (InternViT-300M and -6B; Qwen2, Qwen3, Qwen3-MoE,
GPT-OSS, Llama and InternLM2-layout language models) through explicit flags; there is no class per model.

Both formats are read: the original one (`InternVLChatConfig` of OpenGVLab/InternVL) and `-hf` (`InternVLConfig` of
transformers). A missing key means what it means to the official class, a key that cannot matter is not looked at, and
a value that the runtime would not honour is refused with key, value and file.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from internvl_rt.checkpoint.classes import ModelClass, check_vision_type, find_class
from internvl_rt.checkpoint.decoder_config import DECODERS, MAX_COUNT, DecoderClass, read_decoder
from internvl_rt.checkpoint.decoder_config import DecoderConfig as DecoderConfig
from internvl_rt.checkpoint.decoder_config import ExpertsConfig as ExpertsConfig
from internvl_rt.checkpoint.decoder_config import Yarn as Yarn
from internvl_rt.checkpoint.json_section import MAX_SIZE, UNSUPPORTED, Section, read_json
from internvl_rt.checkpoint.quantization import Quantization, read_quantization
from internvl_rt.checkpoint.template import CHATML, TEMPLATES, TemplateName, Thinking

LOG = logging.getLogger("internvl_rt")
MAX_TILES = 128  # of a picture, the thumbnail not counted
MAX_SIDE = 2048  # of a tile, pixels
FLASH_HEADS = 16  # of the attention that looks at a tile's patches to choose how many tokens it gets
_KNOWN = {
    "InternVL3": ("1B", "2B", "8B", "9B", "14B", "38B", "78B"),
    "InternVL3_5": ("1B", "2B", "4B", "8B", "14B", "38B", "30B-A3B", "241B-A28B", "GPT-OSS-20B-A4B-Preview"),
}
KNOWN_MODELS = {  # the config.json in the package, by name; the 9B's vocab_size is an assumption
    f"{series}-{size}": Path(__file__).parents[1] / "configs" / f"{series}-{size}.json"
    for series, sizes in _KNOWN.items()
    for size in sizes
}
DEFAULT_SYSTEM_MESSAGE = CHATML.system_message


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
class FlashConfig:
    """InternVL3.5-Flash: of a request's tiles those of the highest odds are compressed to fewer visual tokens.

    A tile is compressed if its odds are above this quantile of the request's tiles, and not below this number.
    """

    quantile: float
    least_odds: float


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
    end_token_ids: tuple[int, ...] = ()  # an answer ends with any of them; (): with the template's own
    quantization: Quantization | None = None  # of the stored weights
    flash: FlashConfig | None = None  # None: no tile is compressed
    template: TemplateName = "internvl2_5"
    can_think: bool = False  # trained to reason in <think>, as all with a language model of Qwen3
    thinking: Thinking | None = None  # how its chat template asks for that; None: as the cards of InternVL3.5 do

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile that is not compressed."""
        return self.vision.num_patches // self.downsample**2

    @property
    def least_tokens_per_tile(self) -> int:
        """Visual tokens of a compressed tile, if tiles may be compressed."""
        return self.tokens_per_tile if self.flash is None else self.vision.num_patches // self.downsample**4

    @property
    def rows_per_tile(self) -> int:
        """Rows that the vision tower gives for a tile: its visual tokens, or what `model/flash.py` gives."""
        return self.tokens_per_tile + (0 if self.flash is None else self.least_tokens_per_tile + 1)


def load_config(path: Path) -> ModelConfig:
    """Reads a checkpoint folder, or one config.json, of either format.

    What a `-hf` model's own files say beside it is read as transformers does: tile limits from processor_config.json or
    preprocessor_config.json, end tokens from generation_config.json, the system message from the chat template.
    Raises ConfigError for a missing, malformed or unsupported value.
    """
    return parse_config(read_json(path / "config.json" if path.is_dir() else path))


def parse_config(top: Section) -> ModelConfig:
    """Reads the content of a config.json, as `load_config` does."""
    kind = find_class(top)
    is_original = kind.format == "original"
    vision = top.section("vision_config")
    text = top.section("llm_config" if is_original or (kind.mixed and not top.has("text_config")) else "text_config")
    config = _read_original(top, vision, text, kind) if is_original else _read_hf(top, vision, text, kind)
    vision.support("quantization_config", None)
    return replace(config, quantization=read_quantization(top, text, mxfp4=config.decoder.sinks))


# What the missing keys of each format mean to its ViT class.
_ORIGINAL_VIT = VisionConfig(3200, 48, 25, 12800, 224, 14, "rms_norm", 1e-6, qkv_bias=False, qk_norm=True)
_HF_VIT = VisionConfig(1024, 24, 16, 4096, 448, 14, "layer_norm", 1e-6, qkv_bias=False, qk_norm=False)


def _read_original(top: Section, vision: Section, text: Section, kind: ModelClass) -> ModelConfig:
    """Reads the original format; defaults as in configuration_{internvl_chat,intern_vit,internlm2}.py."""
    decoder_class = _decoder_of_llm_config(text)
    template = top.choice("template", (_template_of(decoder_class),), remedy=kind.other_template)
    top.support("select_layer", -1)
    top.support("pad2square", False)
    vision.support("use_moe", False)
    check_vision_type(kind, vision)
    vision_config = _read_vision(vision, _ORIGINAL_VIT, qkv_bias="qkv_bias", qk_norm="qk_normalization")
    top.support("force_image_size", None, vision_config.image_size)
    # The config class of InternVL3 clears this flag; that of InternVL3.5, which came with Qwen3, respects it.
    tied = decoder_class.model_type.startswith("qwen3") and text.flag("tie_word_embeddings", False)
    dynamic, max_tiles = top.flag("dynamic_image_size", False), top.integer("max_dynamic_patch", 6, maximum=MAX_TILES)
    min_tiles = top.integer("min_dynamic_patch", 1, maximum=max_tiles)
    downsample = _read_downsample(top, vision_config)
    return ModelConfig(
        vision=vision_config,
        decoder=read_decoder(text, decoder_class, tied),
        format="original",
        downsample=downsample,
        unshuffle=top.choice("ps_version", ("v1", "v2"), "v1"),
        min_tiles=min_tiles if dynamic else 1,
        max_tiles=max_tiles if dynamic else 1,
        thumbnail=top.flag("use_thumbnail", False),
        system_message=top.text("system_message") or TEMPLATES[template].system_message,
        dtype=_read_dtype(top, text),
        flash=_read_flash(top, vision, vision_config, downsample),
        template=template,
        can_think=decoder_class.model_type.startswith("qwen3"),
    )


def _read_hf(top: Section, vision: Section, text: Section, kind: ModelClass) -> ModelConfig:
    """Reads the -hf format; defaults as in transformers' models/{internvl,qwen2,qwen3,qwen3_moe,gpt_oss,llama}/."""
    # Here, because jinja2 is slow to import and the original format does without it.
    from internvl_rt.checkpoint.chat_template import read_chat_template

    top.support("projector_hidden_act", "gelu")
    top.support("vision_feature_layer", -1)
    top.support("vision_feature_select_strategy", "default")
    vision.support("use_absolute_position_embeddings", True)
    vision.support("use_mean_pooling", True)  # without it one more norm follows the last layer
    check_vision_type(kind, vision)
    missing = _HF_VIT if kind.vision_bias is None else replace(_HF_VIT, qkv_bias=kind.vision_bias)
    spelling = _spelling(vision) if kind.mixed else {"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"}
    vision_config = _read_vision(vision, missing, **spelling)
    if vision_config.qk_norm:
        vision.support("layer_norm_eps", 1e-6)  # the class has this value built in for q and k
    if text.path == "llm_config.":
        decoder_class = _decoder_of_llm_config(text)
    else:
        model_type = text.choice("model_type", ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "llama"), kind.text_type)
        decoder_class = next(one for one in DECODERS.values() if one.model_type == model_type)
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
    template = TEMPLATES[_template_of(decoder_class)]
    chat = read_chat_template(top.file.parent, template, picture=kind.picture)
    least, most = _read_mixed_tiles(top, vision, vision_config) if kind.mixed else (1, 12)
    max_tiles = processor.integer("max_patches", most, maximum=MAX_TILES)
    decoder = read_decoder(text, decoder_class, tied)
    return ModelConfig(
        vision=vision_config,
        decoder=decoder,
        format="hf",
        downsample=_read_downsample(top, vision_config),
        unshuffle="v2",
        min_tiles=processor.integer("min_patches", min(least, max_tiles), maximum=max_tiles),
        max_tiles=max_tiles,
        thumbnail=True,
        system_message=chat.system_message,
        dtype=_read_dtype(top, text),
        end_token_ids=_read_end_tokens(top, text, decoder.vocab_size, template.stop.token),
        template=template.name,
        can_think=decoder_class.model_type.startswith("qwen3") or chat.thinking is not None,
        thinking=chat.thinking,
    )


def _decoder_of_llm_config(text: Section) -> DecoderClass:
    names = text.values.get("architectures")
    decoder_class = DECODERS.get(str(names[0])) if isinstance(names, list) and names else None
    if decoder_class is None:
        raise text.refusal("architectures", f"one of {', '.join(DECODERS)}", UNSUPPORTED)
    return decoder_class


def _template_of(decoder_class: DecoderClass) -> TemplateName:
    """Returns the template that models with a language model of this class were trained with."""
    return "internvl3_5_gpt_oss" if decoder_class.model_type == "gpt_oss" else "internvl2_5"


def _spelling(vision: Section) -> dict[str, str]:
    """Returns the keys of a mixed config's vision section that the formats name differently, as they are there."""
    keys = {"qkv_bias": ("attention_bias", "qkv_bias"), "qk_norm": ("use_qk_norm", "qk_normalization")}
    for ours, theirs in keys.values():
        if ours in vision.values and theirs in vision.values:
            vision.support(theirs, vision.values[ours])
    return {name: theirs if theirs in vision.values else ours for name, (ours, theirs) in keys.items()}


def _read_mixed_tiles(top: Section, vision: Section, config: VisionConfig) -> tuple[int, int]:
    """Checks the keys of the original format in a mixed config, of which transformers reads none.

    Returns the least and the most tiles that they give a picture, for a folder whose image processor does not say.
    """
    top.support("template", "internvl2_5")
    top.support("select_layer", -1)
    top.support("pad2square", False)
    top.support("ps_version", "v2")
    top.support("dynamic_image_size", True)
    top.support("use_thumbnail", True)
    top.support("force_image_size", None, config.image_size)
    vision.support("use_moe", False)
    most = top.integer("max_dynamic_patch", 12, maximum=MAX_TILES)
    return top.integer("min_dynamic_patch", 1, maximum=most), most


def _read_end_tokens(top: Section, text: Section, vocab_size: int, stop: str) -> tuple[int, ...]:
    """Reads eos_token_id of generation_config.json, or without that file of config.json; () if it is not there.

    stop: the token that ends an answer then.

    What else transformers would do by that file is logged, since here `SamplingParams` alone say how tokens are drawn.
    """
    file = top.file.parent / "generation_config.json"
    found = [read_json(file)] if os.path.lexists(file) else [top, text]
    penalty = found[0].values.get("repetition_penalty")
    if found[0].values.get("do_sample") is True or (isinstance(penalty, int | float) and penalty != 1):
        LOG.warning("%s asks for draws or a penalty; here answers are greedy unless SamplingParams ask for it", file)
    section = next((section for section in found if section.has("eos_token_id")), None)
    if section is None:
        LOG.warning("%s names no eos_token_id: transformers ends no answer, here %s does", found[0].file, stop)
        return ()
    value = section.values["eos_token_id"]
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not 0 < len(ids) <= MAX_COUNT or any(type(each) is not int or not 0 <= each < vocab_size for each in ids):
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
        num_layers=section.integer("num_hidden_layers", missing.num_layers, maximum=MAX_COUNT),
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


def _read_downsample(section: Section, vision: VisionConfig) -> int:
    ratio, grid = section.real("downsample_ratio", 0.5), vision.image_size // vision.patch_size
    downsample = round(1 / ratio)
    if ratio * downsample != 1 or grid % downsample:
        raise section.refusal("downsample_ratio", f"one over a divisor of the tile's {grid} patches", UNSUPPORTED)
    if vision.hidden_size * downsample**2 > MAX_SIZE:
        raise section.refusal("downsample_ratio", f"fewer than {MAX_SIZE} channels in a visual token", UNSUPPORTED)
    return downsample


def _read_flash(top: Section, vision: Section, config: VisionConfig, downsample: int) -> FlashConfig | None:
    """Reads what makes a model an InternVL3.5-Flash; the official class has no defaults for its thresholds."""
    if not top.has("flash_mode") or not top.flag("flash_mode", False):
        return None
    if (config.image_size // config.patch_size) % downsample**2:
        expected = f"a tile whose patches can be merged {downsample**2} x {downsample**2} with flash_mode"
        raise vision.refusal("image_size", expected, UNSUPPORTED)
    if config.hidden_size * downsample**4 > MAX_SIZE:
        expected = f"fewer than {MAX_SIZE} channels in a compressed visual token with flash_mode"
        raise vision.refusal("hidden_size", expected, UNSUPPORTED)
    if config.hidden_size % FLASH_HEADS:
        raise vision.refusal("hidden_size", f"a multiple of {FLASH_HEADS} with flash_mode", UNSUPPORTED)
    return FlashConfig(
        quantile=top.part_of_one("flash_relative_threshold"),
        least_odds=top.part_of_one("flash_absolute_threshold"),
    )


def _read_dtype(*sections: Section) -> Literal["bfloat16", "float16", "float32"]:
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if section.has(key):
                remedy = f"write the dtype of the weights at {key}"
                return section.choice(key, ("bfloat16", "float16", "float32"), remedy=remedy)
    return "float32"
