"""config.json of both formats is read: each key has its meaning, and so has a missing key."""

import json
import math

import pytest
import torch

from internvl_rt.checkpoint.config import (
    DEFAULT_SYSTEM_MESSAGE,
    KNOWN_MODELS,
    DecoderConfig,
    ExpertsConfig,
    ModelConfig,
    VisionConfig,
    load_config,
)
from internvl_rt.errors import ConfigError
from internvl_rt.model.internvl import build_weights, named_parameters
from support.configs import HF, ORIGINAL, changed, parse

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
    max_position=32768,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
)


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
        ("InternVL3_5-1B", "1.1", "1.061"),
        ("InternVL3_5-2B", "2.3", "2.348"),
        ("InternVL3_5-4B", "4.7", "4.732"),
        ("InternVL3_5-8B", "8.5", "8.528"),
        ("InternVL3_5-14B", "15.1", "15.120"),
        ("InternVL3_5-38B", "38.4", "38.390"),
        ("InternVL3_5-30B-A3B", "30.8", "30.849"),
        ("InternVL3_5-241B-A28B", "240.7", "240.699"),
        ("InternVL3_5-GPT-OSS-20B-A4B-Preview", "21.2", "21.233"),
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
        max_position=32768,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=False,
    )
    assert (config.unshuffle, config.thumbnail, config.min_tiles, config.max_tiles) == ("v1", False, 1, 1)
    assert config.dtype == "float32"


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "qwen3_moe", "llama"])
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
        intermediate_size=getattr(decoder, "moe_intermediate_size", decoder.intermediate_size),
        vocab_size=decoder.vocab_size,
        norm_eps=decoder.rms_norm_eps,
        rope_theta=decoder.rope_parameters["rope_theta"],
        max_position=decoder.max_position_embeddings,
        qkv_bias=text == "qwen2",
        qk_norm=text.startswith("qwen3"),
        tie_embeddings=decoder.tie_word_embeddings,
        experts=None
        if text != "qwen3_moe"
        else ExpertsConfig(decoder.num_experts, decoder.num_experts_per_tok, decoder.norm_topk_prob),
    )
    assert ours.downsample == round(1 / theirs.downsample_ratio)


def test_a_qwen3_decoder_has_its_own_head_dim_and_normalises_q_and_k():
    qwen3 = {"llm_config.architectures": ["Qwen3ForCausalLM"], "llm_config.model_type": "qwen3"}
    decoder = parse(changed(ORIGINAL, qwen3)).decoder
    assert (decoder.head_dim, decoder.qk_norm, decoder.qkv_bias) == (128, True, False)
    assert parse(changed(ORIGINAL, {**qwen3, "llm_config.head_dim": 32})).decoder.head_dim == 32


def test_a_qwen3_moe_decoder_has_experts():
    values = json.loads(KNOWN_MODELS["InternVL3_5-30B-A3B"].read_text())
    decoder = parse(values).decoder
    assert decoder.experts == ExpertsConfig(num_experts=128, num_chosen=8, renormalises=True)
    assert (decoder.intermediate_size, decoder.qk_norm, decoder.tie_embeddings) == (768, True, False)
    by_transformers_5 = {"llm_config.num_experts": ..., "llm_config.num_local_experts": 64}
    assert parse(changed(values, by_transformers_5)).decoder.experts.num_experts == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "llm_config.decoder_sparse_step is 2, expected 1; this kind of model"),
        ({"mlp_only_layers": [0]}, r"llm_config.mlp_only_layers is \[0\], expected None or \[\]; this kind of model"),
        ({"num_experts": 0}, "llm_config.num_experts is 0, expected an integer from 1 to 512"),
        ({"num_experts_per_tok": 129}, "llm_config.num_experts_per_tok is 129, expected an integer from 1 to 128"),
        (
            {"num_experts": 512, "num_hidden_layers": 200},
            "llm_config.num_experts is 512, expected at most 327 of 768",
        ),
        ({"moe_intermediate_size": 1 << 20}, "llm_config.num_experts is 128, expected at most 8 of 1048576"),
        ({"norm_topk_prob": 1}, "llm_config.norm_topk_prob is 1, expected true or false"),
    ],
)
def test_experts_that_cannot_be_are_refused_before_anything_is_made(changes, message):
    values = json.loads(KNOWN_MODELS["InternVL3_5-30B-A3B"].read_text())
    with pytest.raises(ConfigError, match=message):
        parse(changed(values, {f"llm_config.{key}": value for key, value in changes.items()}))


def test_an_internlm2_decoder_has_no_bias_and_as_many_key_heads_as_query_heads_where_nothing_is_said():
    values = json.loads(KNOWN_MODELS["InternVL3-9B"].read_text())
    assert not parse(values).decoder.qkv_bias
    assert parse(changed(values, {"llm_config.num_key_value_heads": ...})).decoder.num_kv_heads == 32
    assert parse(changed(ORIGINAL, {"llm_config.num_key_value_heads": None})).decoder.num_kv_heads == 14


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"llm_config.tie_word_embeddings": True}, False),  # the official class clears the key
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
        ({"rope_scaling": None}, 1e6),
        ({"rope_scaling": {"type": "default"}}, 1e6),
        ({"rope_scaling": {"type": "dynamic", "factor": 6}}, 1e6),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.5}}, 1e6),
        ({"rope_scaling": ..., "rope_theta": ...}, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e7}, "rope_scaling": ...}, 5e7),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 7, "factor": 4.0}}, 7.0),
    ],
)
def test_rotary_settings_are_read_from_every_spelling(changes, expected):
    decoder = parse(changed(HF, {f"text_config.{key}": value for key, value in changes.items()})).decoder
    assert decoder.rope_theta == expected


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


@pytest.mark.parametrize(
    ("generation", "changes", "expected"),
    [
        ({"eos_token_id": [151645, 151643]}, {}, (151645, 151643)),
        ({"eos_token_id": 7}, {"eos_token_id": 8}, (7,)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({}, {"eos_token_id": 8}, ()),
        (None, {}, ()),
        (None, {"eos_token_id": 8, "text_config.eos_token_id": 9}, (8,)),
        (None, {"text_config.eos_token_id": [9, 8]}, (9, 8)),
    ],
)
def test_end_tokens_of_an_hf_folder_come_from_the_file_that_transformers_reads(tmp_path, generation, changes, expected):
    (tmp_path / "config.json").write_text(json.dumps(changed(HF, changes)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).end_token_ids == expected


def test_a_folder_of_the_original_format_ends_answers_by_its_template_as_the_official_chat_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (tmp_path / "chat_template.jinja").write_text("{{ 'something else' }}")
    assert load_config(tmp_path) == parse(ORIGINAL)


def test_an_hf_folder_without_an_end_token_says_how_answers_end(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    load_config(tmp_path)
    assert "names no eos_token_id" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [({"do_sample": True}, True), ({"repetition_penalty": 1.05}, True), ({"do_sample": False, "top_p": 0.8}, False)],
)
def test_draws_that_transformers_would_make_by_the_folder_are_said(tmp_path, caplog, values, said):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, **values}))
    load_config(tmp_path)
    assert ("greedy unless SamplingParams ask for it" in caplog.text) == said


def test_the_system_message_of_an_hf_folder_is_that_of_its_chat_template(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    template = (
        "<|im_start|>system\nYou are Ada.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role ~ '\n' ~ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    (tmp_path / "chat_template.jinja").write_text(template + "{{ '' }}")
    assert load_config(tmp_path).system_message == "You are Ada."
