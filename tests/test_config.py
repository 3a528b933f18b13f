"""Reading config.json of both formats: what the keys mean, what missing keys mean, and what is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl_rt.config import (
    DEFAULT_SYSTEM_MESSAGE,
    KNOWN_MODELS,
    DecoderConfig,
    DynamicRope,
    ModelConfig,
    VisionConfig,
    load_config,
    parse_config,
)
from internvl_rt.errors import ConfigError
from internvl_rt.json_section import Section
from internvl_rt.model.internvl import build_weights, named_parameters

ORIGINAL = json.loads(KNOWN_MODELS["InternVL3-1B"].read_text())
HF = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "image_seq_length": 256,
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "torch_dtype": "bfloat16",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "vocab_size": 151674,
    },
    "vision_config": {
        "attention_bias": True,
        "hidden_size": 1024,
        "image_size": [448, 448],
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "patch_size": [14, 14],
        "use_qk_norm": False,
    },
}
VISION_300M = VisionConfig(
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    image_size=448,
    patch_size=14,
    norm="layer_norm",
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
)
DECODER_1B = DecoderConfig(
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    vocab_size=151674,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=DynamicRope(2.0),
    max_position=32768,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values set by dotted path; ... removes the key."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return values


def parse(values: dict[str, Any]) -> ModelConfig:
    return parse_config(Section(Path("there/config.json"), "", values))


def test_the_1b_is_read_field_by_field():
    assert load_config(KNOWN_MODELS["InternVL3-1B"]) == ModelConfig(
        vision=VISION_300M,
        decoder=DECODER_1B,
        format="original",
        downsample=2,
        unshuffle="v2",
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        system_message=DEFAULT_SYSTEM_MESSAGE,
        dtype="bfloat16",
    )


def test_an_hf_config_of_the_same_model_differs_only_in_format_and_system_message():
    original, hf = load_config(KNOWN_MODELS["InternVL3-1B"]), parse(HF)
    assert (hf.vision, hf.decoder) == (original.vision, original.decoder)
    assert (hf.format, hf.system_message) == ("hf", None)
    assert (hf.unshuffle, hf.min_tiles, hf.max_tiles, hf.thumbnail, hf.dtype) == ("v2", 1, 12, True, "bfloat16")


@pytest.mark.parametrize(
    ("name", "documented", "counted"),
    [
        ("InternVL3-1B", "0.9", "0.938"),
        ("InternVL3-2B", "2.1", "2.089"),
        ("InternVL3-8B", "7.9", "7.944"),
        ("InternVL3-9B", "9.1", "9.139"),
        ("InternVL3-14B", "15.1", "15.117"),
        ("InternVL3-38B", "38.4", "38.388"),
        ("InternVL3-78B", "78.4", "78.408"),
    ],
)
def test_every_size_has_the_documented_number_of_parameters(name, documented, counted):
    weights = build_weights(load_config(KNOWN_MODELS[name]), dtype=torch.bfloat16, device="meta")
    billions = sum(tensor.numel() for tensor in named_parameters(weights).values()) / 1e9
    assert f"{billions:.1f}" == documented
    assert f"{billions:.3f}" == counted


def test_exactly_the_known_models_have_a_file():
    folder = next(iter(KNOWN_MODELS.values())).parent
    assert sorted(folder.glob("*.json")) == sorted(KNOWN_MODELS.values())


def test_missing_keys_of_the_original_format_mean_what_they_mean_to_the_official_classes():
    config = parse(
        {
            "model_type": "internvl_chat",
            "template": "internvl2_5",
            "vision_config": {},
            "llm_config": {"architectures": ["Qwen2ForCausalLM"]},
        }
    )
    assert config.vision == VisionConfig(3200, 48, 25, 12800, 224, 14, "rms_norm", 1e-6, qkv_bias=False, qk_norm=True)
    assert config.decoder == DecoderConfig(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=22016,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        max_position=32768,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=False,
    )
    assert (config.unshuffle, config.thumbnail, config.min_tiles, config.max_tiles) == ("v1", False, 1, 1)
    assert config.dtype == "float32"


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
def test_missing_keys_of_the_hf_format_mean_what_they_mean_to_transformers(text):
    from transformers import AutoConfig, InternVLConfig

    theirs = InternVLConfig(text_config=AutoConfig.for_model(text))
    ours = parse({"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": text}})
    vision, decoder = theirs.vision_config, theirs.text_config
    assert ours.vision == VisionConfig(
        hidden_size=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        intermediate_size=vision.intermediate_size,
        image_size=vision.image_size[0],
        patch_size=vision.patch_size[0],
        norm=vision.norm_type,
        norm_eps=vision.layer_norm_eps,
        qkv_bias=vision.attention_bias,
        qk_norm=vision.use_qk_norm,
    )
    assert ours.decoder == DecoderConfig(
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_hidden_layers,
        num_heads=decoder.num_attention_heads,
        num_kv_heads=decoder.num_key_value_heads,
        head_dim=getattr(decoder, "head_dim", decoder.hidden_size // decoder.num_attention_heads),
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        norm_eps=decoder.rms_norm_eps,
        rope_theta=decoder.rope_parameters["rope_theta"],
        rope_scaling=None,
        max_position=decoder.max_position_embeddings,
        qkv_bias=text == "qwen2",
        qk_norm=text == "qwen3",
        tie_embeddings=decoder.tie_word_embeddings,
    )
    assert ours.downsample == round(1 / theirs.downsample_ratio)


def test_a_qwen3_decoder_has_its_own_head_dim_and_normalises_q_and_k():
    qwen3 = {"llm_config.architectures": ["Qwen3ForCausalLM"], "llm_config.model_type": "qwen3"}
    decoder = parse(changed(ORIGINAL, qwen3)).decoder
    assert (decoder.head_dim, decoder.qk_norm, decoder.qkv_bias) == (128, True, False)
    assert parse(changed(ORIGINAL, {**qwen3, "llm_config.head_dim": 32})).decoder.head_dim == 32


def test_an_internlm2_decoder_has_no_bias_and_as_many_key_heads_as_query_heads_where_nothing_is_said():
    values = json.loads(KNOWN_MODELS["InternVL3-9B"].read_text())
    assert not parse(values).decoder.qkv_bias
    assert parse(changed(values, {"llm_config.num_key_value_heads": ...})).decoder.num_kv_heads == 32
    assert parse(changed(ORIGINAL, {"llm_config.num_key_value_heads": None})).decoder.num_kv_heads == 14


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"llm_config.tie_word_embeddings": True}, False),  # cleared by the class of InternVL3
        ({"llm_config.tie_word_embeddings": True, "llm_config.architectures": ["Qwen3ForCausalLM"]}, True),
        ({"tie_word_embeddings": True, "llm_config.architectures": ["Qwen3ForCausalLM"]}, False),
    ],
)
def test_the_original_format_ties_embeddings_only_with_qwen3(changes, tied):
    assert parse(changed(ORIGINAL, changes)).decoder.tie_embeddings is tied


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, False),
        ({"text_config.tie_word_embeddings": True}, True),
        ({"text_config.tie_word_embeddings": False, "tie_word_embeddings": True}, True),
        ({"text_config.tie_word_embeddings": False, "tie_word_embeddings": False}, False),
    ],
)
def test_the_hf_format_ties_embeddings_where_either_flag_says_so(changes, tied):
    assert parse(changed(HF, changes)).decoder.tie_embeddings is tied


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": None}, (1e6, None)),
        ({"rope_scaling": {"type": "default"}}, (1e6, None)),
        ({"rope_scaling": {"type": "dynamic", "factor": 6}}, (1e6, DynamicRope(6.0))),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.5}}, (1e6, DynamicRope(1.5))),
        ({"rope_scaling": ..., "rope_theta": ...}, (1e4, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e7}, "rope_scaling": ...}, (5e7, None)),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 7, "factor": 4.0}}, (7.0, DynamicRope(4.0))),
    ],
)
def test_rotary_settings_are_read_from_every_spelling(changes, expected):
    decoder = parse(changed(HF, {f"text_config.{key}": value for key, value in changes.items()})).decoder
    assert (decoder.rope_theta, decoder.rope_scaling) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [(None, DEFAULT_SYSTEM_MESSAGE), ("", DEFAULT_SYSTEM_MESSAGE), ("Be brief.", "Be brief.")],
)
def test_a_system_message_overrides_the_default_unless_it_is_empty(message, expected):
    assert parse(changed(ORIGINAL, {"system_message": message})).system_message == expected


def test_keys_that_cannot_matter_are_not_looked_at():
    junk = {"auto_map": 7, "image_fold": [], "llm_config._name_or_path": "Qwen3MoeForCausalLM", "initializer": math.nan}
    junk |= {"vision_config.num_experts": 8, "vision_config.use_moe": False, "llm_config.moe_config": None}
    assert parse(changed(ORIGINAL, junk)) == parse(ORIGINAL)


def test_a_ratio_of_one_over_any_divisor_of_the_grid_is_accepted():
    config = parse(changed(ORIGINAL, {"downsample_ratio": 0.25}))
    assert (config.downsample, config.tokens_per_tile) == (4, 64)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1, 12)),
        ({"preprocessor_config.json": {"min_patches": 2, "max_patches": 6, "crop_to_patches": False}}, (2, 6)),
        ({"processor_config.json": {"image_processor": {"max_patches": 4}}, "preprocessor_config.json": {}}, (1, 4)),
        ({"processor_config.json": {"image_seq_length": 256}, "preprocessor_config.json": {"max_patches": 5}}, (1, 5)),
    ],
)
def test_tile_limits_of_an_hf_folder_come_from_its_image_processor(tmp_path, files, expected):
    for file, values in {**files, "config.json": HF}.items():
        (tmp_path / file).write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert (config.min_tiles, config.max_tiles) == expected


def test_another_normalisation_of_pixels_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: image_mean is \[0\.5, 0\.5, 0\.5\]"):
        load_config(tmp_path)


REFUSED_ORIGINAL: list[tuple[str, Any]] = [
    ("model_type", "internvl_chat_gpt_oss"),
    ("model_type", ["internvl_chat"]),
    ("architectures", ["InternVLRewardModel"]),
    ("template", "Hermes-2"),
    ("template", None),
    ("select_layer", -4),
    ("select_layer", -1.0),
    ("downsample_ratio", 0.3),
    ("downsample_ratio", 1 / 3),  # does not divide 32
    ("downsample_ratio", 2),
    ("downsample_ratio", 1e-320),
    ("downsample_ratio", True),
    ("force_image_size", 224),
    ("pad2square", True),
    ("flash_mode", True),
    ("ps_version", "v3"),
    ("use_thumbnail", 1),
    ("dynamic_image_size", "true"),
    ("min_dynamic_patch", 13),  # more than max_dynamic_patch
    ("max_dynamic_patch", 0),
    ("max_dynamic_patch", 10**9),
    ("system_message", 5),
    ("torch_dtype", "float64"),
    ("quantization_config", {"quant_method": "awq"}),
    ("llm_config", None),
    ("llm_config.quantization_config", {"quant_method": "awq"}),
    ("llm_config.architectures", ["Qwen3MoeForCausalLM"]),
    ("llm_config.architectures", ["GptOssForCausalLM"]),
    ("llm_config.architectures", [["Qwen2ForCausalLM"]]),
    ("llm_config.architectures", []),
    ("llm_config.architectures", "Qwen2ForCausalLM"),
    ("llm_config.hidden_act", "gelu"),
    ("llm_config.use_sliding_window", True),
    ("llm_config.hidden_size", 900),
    ("llm_config.hidden_size", 896.0),
    ("llm_config.hidden_size", -896),
    ("llm_config.hidden_size", 10**400),
    ("llm_config.num_key_value_heads", 3),
    ("llm_config.num_key_value_heads", True),
    ("llm_config.head_dim", 63),
    ("llm_config.num_hidden_layers", 10**6),
    ("llm_config.num_hidden_layers", 0),
    ("llm_config.vocab_size", None),
    ("llm_config.vocab_size", "151674"),
    ("llm_config.rms_norm_eps", math.nan),
    ("llm_config.rms_norm_eps", 0),
    ("llm_config.rope_theta", math.inf),
    ("llm_config.rope_theta", 10**400),
    ("llm_config.rope_scaling", "dynamic"),
    ("llm_config.rope_scaling.type", "linear"),  # next to the rope_type "dynamic"
    ("llm_config.rope_scaling.rope_type", "yarn"),
    ("llm_config.rope_scaling.rope_type", "default"),  # next to the type "dynamic"
    ("llm_config.rope_scaling.factor", None),
    ("llm_config.rope_scaling.partial_rotary_factor", 0.5),
    ("vision_config", []),
    ("vision_config.model_type", "siglip_vision_model"),
    ("vision_config.quantization_config", {}),
    ("vision_config.hidden_act", "quick_gelu"),
    ("vision_config.num_attention_heads", 15),
    ("vision_config.num_channels", 1),
    ("vision_config.norm_type", "batch_norm"),
    ("vision_config.layer_norm_eps", "1e-6"),
    ("vision_config.image_size", [448, 336]),
    ("vision_config.image_size", [448]),
    ("vision_config.patch_size", 15),
    ("vision_config.qkv_bias", None),
    ("vision_config.use_moe", True),
]
REFUSED_HF: list[tuple[str, Any]] = [
    ("model_type", "internvl_flash"),
    ("architectures", ["InternVLChatModel"]),
    ("vision_feature_layer", [-1, -2]),
    ("vision_feature_select_strategy", "full"),
    ("projector_hidden_act", "relu"),
    ("quantization_config", {"quant_method": "awq"}),
    ("tie_word_embeddings", "yes"),
    ("text_config.model_type", "qwen3_moe"),
    ("text_config.model_type", "gpt_oss"),
    ("text_config.quantization_config", {"quant_method": "awq"}),
    ("vision_config.use_mean_pooling", False),
    ("vision_config.use_absolute_position_embeddings", False),
    ("vision_config.model_type", "intern_vit_6b"),
]


# The key to blame is another one where two do not fit together.
BLAMED = {
    "vision_config.num_attention_heads": "vision_config.hidden_size",
    "vision_config.patch_size": "vision_config.image_size",
    "llm_config.rope_scaling.rope_type": "llm_config.rope_scaling.",
}


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        pytest.param(base, key, value, id=f"{key}={value!r:.40}")
        for base, refused in ((ORIGINAL, REFUSED_ORIGINAL), (HF, REFUSED_HF))
        for key, value in refused
    ],
)
def test_an_unsupported_value_is_refused_in_one_line_with_file_key_and_value(base, key, value):
    with pytest.raises(ConfigError) as caught:
        parse(changed(base, {key: value}))
    message = str(caught.value)
    assert message.startswith(f"there/config.json: {BLAMED.get(key, key)}")
    assert "expected" in message
    assert ";" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_attention_biases_are_refused_where_the_output_would_have_one_too(architecture):
    changes = {"llm_config.architectures": [architecture], "llm_config.attention_bias": True}
    with pytest.raises(ConfigError, match=r"llm_config\.attention_bias is True, expected false"):
        parse(changed(ORIGINAL, changes))


def test_an_internlm2_decoder_that_does_not_say_it_has_no_bias_is_refused():
    values = json.loads(KNOWN_MODELS["InternVL3-9B"].read_text())
    with pytest.raises(ConfigError, match=r"llm_config\.bias is missing, expected false"):
        parse(changed(values, {"llm_config.bias": ...}))


def test_an_hf_vit_with_normalised_q_and_k_has_the_one_eps_that_its_class_builds_in():
    normalised = {"vision_config.use_qk_norm": True, "vision_config.norm_type": "rms_norm"}
    assert parse(changed(HF, normalised)).vision.qk_norm
    with pytest.raises(ConfigError, match=r"vision_config\.layer_norm_eps is 1e-05, expected 1e-06"):
        parse(changed(HF, {**normalised, "vision_config.layer_norm_eps": 1e-5}))


@pytest.mark.parametrize("key", ["model_type", "template", "vision_config", "llm_config", "llm_config.architectures"])
def test_a_missing_key_without_a_meaning_is_named(key):
    with pytest.raises(ConfigError, match=f"{key} is missing, expected"):
        parse(changed(ORIGINAL, {key: ...}))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


LEAVES = [
    (base, f"{prefix}{key}")
    for base in (ORIGINAL, HF)
    for prefix, section in [("", base), *((f"{k}.", v) for k, v in base.items() if isinstance(v, dict))]
    for key in section
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text() | st.sampled_from(["type", "factor"]), children),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(LEAVES), JSON)
def test_any_value_is_either_read_or_refused_with_a_config_error(leaf, value):
    base, key = leaf
    try:
        config = parse(changed(base, {key: value}))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        build_weights(config, dtype=torch.bfloat16, device="meta")
