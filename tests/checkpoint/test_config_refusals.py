"""Bad configurations are refused in one line, with file, key, value, what was expected and what to do."""

import copy
import json
import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.errors import ConfigError
from internvl_rt.model.internvl import build_weights
from support.configs import HF, ORIGINAL, changed, parse

REFUSED_ORIGINAL: list[tuple[str, Any]] = [
    ("model_type", "internvl_chat_gpt_oss"),
    ("model_type", ["internvl_chat"]),
    ("architectures", ["InternVLValueModel"]),
    ("template", "Hermes-2"),
    ("template", "internvl3_5_gpt_oss"),  # of a language model of GPT-OSS alone
    ("template", None),
    ("select_layer", -4),
    ("select_layer", -1.0),
    ("downsample_ratio", 0.3),
    ("downsample_ratio", 1 / 3),  # the ratio does not divide 32
    ("downsample_ratio", 2),
    ("downsample_ratio", 1e-320),
    ("downsample_ratio", True),
    ("force_image_size", 224),
    ("pad2square", True),
    ("flash_mode", True),  # without thresholds
    ("ps_version", "v3"),
    ("use_thumbnail", 1),
    ("dynamic_image_size", "true"),
    ("min_dynamic_patch", 13),  # it is more than max_dynamic_patch
    ("max_dynamic_patch", 0),
    ("max_dynamic_patch", 129),
    ("max_dynamic_patch", 10**9),
    ("system_message", 5),
    ("torch_dtype", "float64"),
    ("torch_dtype", "auto"),
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("llm_config", None),
    ("llm_config.quantization_config", {"quant_method": "mxfp4"}),
    ("llm_config.architectures", ["Qwen2MoeForCausalLM"]),
    ("llm_config.architectures", ["Phi3ForCausalLM"]),
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
    ("llm_config.rope_scaling.type", "linear"),  # contradicts the rope_type "dynamic"
    ("llm_config.rope_scaling.rope_type", "yarn"),
    ("llm_config.rope_scaling.rope_type", "default"),  # contradicts the type "dynamic"
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
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("tie_word_embeddings", "yes"),
    ("text_config.model_type", "qwen2_moe"),
    ("text_config.model_type", "phi3"),
    ("text_config.quantization_config", {"quant_method": "mxfp4"}),
    ("vision_config.use_mean_pooling", False),
    ("vision_config.use_absolute_position_embeddings", False),
    ("vision_config.model_type", "intern_vit_6b"),
]


# If two keys do not fit together, the message may blame the other one: changed key, blamed key.
BLAMED = {
    "vision_config.num_attention_heads": "vision_config.hidden_size",
    "vision_config.patch_size": "vision_config.image_size",
    "llm_config.rope_scaling.rope_type": "llm_config.rope_scaling.",
    "flash_mode": "flash_relative_threshold",
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
        (b'{"llm_config": {"a": 1, "a": 1}}', "is not JSON: 'a' is there twice"),
        (b'{"a": %s}' % (b"9" * 5000), r"is not JSON: .*\(4300 digits\)[^;]*; download the file again$"),
        (b'{"%s": 1, "%s": 1}' % (2 * (b"\\n" * 1_000_000,)), r"is not JSON: '\\n\\n.*\.\.\.' is there twice"),
        (None, "no such file"),
    ],
    ids=["brace", "encoding", "depth", "list", "twice", "digits", "long key", "missing"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_dtype_that_is_none_says_what_to_write():
    with pytest.raises(
        ConfigError, match=r"torch_dtype is 'auto', expected 'bfloat16' or .*; write the dtype of the we"
    ):
        parse(changed(ORIGINAL, {"torch_dtype": "auto"}))


def test_two_deep_values_are_not_compared():
    deep = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(ConfigError, match="image_size"):
        parse(changed(HF, {"vision_config.image_size": [deep, copy.copy(deep)]}))


@pytest.mark.parametrize(
    "changes",
    [
        {"llm_config.num_attention_heads": 1 << 23, "llm_config.head_dim": 1 << 23, "llm_config.hidden_size": 1 << 23},
        {"vision_config.image_size": 1 << 23, "vision_config.patch_size": 1, "force_image_size": 1 << 23},
        {"vision_config.hidden_size": 1 << 24, "vision_config.num_attention_heads": 1, "downsample_ratio": 0.03125},
        {
            "vision_config.intermediate_size": 1 << 24,
            "vision_config.hidden_size": 1 << 20,
            "llm_config.vocab_size": 1 << 24,
        },
    ],
    ids=["heads", "patches", "visual tokens", "wide but possible"],
)
def test_sizes_whose_products_overflow_are_refused_before_memory_is_counted(changes):
    with suppress(ConfigError):
        build_weights(parse(changed(ORIGINAL, changes)), dtype=torch.float32, device="meta")


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


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(LEAVES), JSON)
def test_any_value_is_either_read_or_refused_with_a_config_error(leaf, value):
    base, key = leaf
    with suppress(ConfigError):
        build_weights(parse(changed(base, {key: value})), dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("rescale_factor", 1 / 127.5),
        ("resample", 2),
        ("size", {"height": 384, "width": 384}),
        ("do_normalize", False),
        ("do_resize", False),
    ],
)
def test_another_way_to_make_pixels_is_refused(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {key} is "):
        load_config(tmp_path)


@pytest.mark.parametrize("value", [[], -1, 151674, True, "2", 2.0, [1, None], [[1]], {"a": 1}, [1] * 2000])
def test_an_end_token_that_is_none_is_refused(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: eos_token_id is .*expected a token id below"
    ) as error:
        load_config(tmp_path)
    assert len(str(error.value)) < 500
