"""The configuration of a model with a language model of GPT-OSS, and with it how its turns are written."""

import json
import logging

import pytest
import torch

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.template import HARMONY
from internvl_rt.errors import ConfigError
from internvl_rt.model.internvl import build_weights, named_parameters
from support.configs import HF, changed, parse
from support.harmony import FINAL, NAME

ORIGINAL = json.loads(KNOWN_MODELS[NAME].read_text())
HF_GPT_OSS = changed(HF, {"text_config": ORIGINAL["llm_config"]})
OWN = (
    "{% if messages[0].role != 'system' %}<|start|>system<|message|>You are Ada.<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role != 'assistant' %}<|message|>{% elif m.content %}"
    f"{FINAL}{{% endif %}}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for part in m.content %}}"
    "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part.type == 'video' %}{{ '<video>\n' }}{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_it_has_as_many_parameters_as_the_published_files():
    weights = build_weights(load_config(KNOWN_MODELS[NAME]), dtype=torch.bfloat16, device="meta")
    assert sum(tensor.numel() for tensor in named_parameters(weights).values()) == 21_232_768_704


@pytest.mark.parametrize("values", [ORIGINAL, HF_GPT_OSS], ids=["original", "hf"])
def test_experts_in_mxfp4_are_no_quantisation(values):
    """They are multiplied out while they are loaded; the tensors tell."""
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    assert parse(changed(values, {"quantization_config": mxfp4})).quantization is None


def test_the_20b_is_read_field_by_field():
    config = load_config(KNOWN_MODELS[NAME])
    decoder, experts = config.decoder, config.decoder.experts
    assert (config.template, config.system_message, config.can_think) == (HARMONY.name, HARMONY.system_message, False)
    assert (decoder.num_layers, decoder.hidden_size, decoder.vocab_size) == (24, 2880, 200_028)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (64, 8, 64)
    assert (experts.num_experts, experts.num_chosen, decoder.intermediate_size) == (32, 4, 2880)
    assert decoder.windows == (128, None) * 12
    assert 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 2 == 48 * 1024, "bytes of a token"


def test_a_template_of_another_language_model_is_refused():
    with pytest.raises(ConfigError, match=r"template is 'internvl2_5', expected 'internvl3_5_gpt_oss'"):
        parse(changed(ORIGINAL, {"template": "internvl2_5"}))
    other = changed(ORIGINAL, {"llm_config": json.loads(KNOWN_MODELS["InternVL3_5-8B"].read_text())["llm_config"]})
    with pytest.raises(ConfigError, match=r"template is 'internvl3_5_gpt_oss', expected 'internvl2_5'"):
        parse(other)


@pytest.mark.parametrize("message", [None, "", "Be brief."])
def test_a_system_message_overrides_the_default_unless_it_is_empty(message):
    expected = message or HARMONY.system_message
    assert parse(changed(ORIGINAL, {"system_message": message})).system_message == expected


def test_an_hf_folder_has_the_template_by_its_class():
    config = parse(HF_GPT_OSS)
    assert (config.format, config.template, config.can_think) == ("hf", HARMONY.name, False)
    assert config.system_message == HARMONY.system_message, "of a folder without a chat template"
    assert config.decoder == load_config(KNOWN_MODELS[NAME]).decoder


@pytest.mark.parametrize(
    ("template", "expected", "says"),
    [
        (OWN, "You are Ada.", False),
        (OWN[OWN.index("{% for m") :], None, False),
        (OWN.replace("<|end|>", "<|end|>\n"), HARMONY.system_message, True),
        ("{{ strftime_now('%Y') }}", HARMONY.system_message, True),
    ],
    ids=["own", "none", "otherwise", "unfollowed"],
)
def test_the_chat_template_of_an_hf_folder_is_compared_with_that_of_gpt_oss(tmp_path, caplog, template, expected, says):
    (tmp_path / "config.json").write_text(json.dumps(HF_GPT_OSS))
    (tmp_path / "chat_template.jinja").write_text(template, newline="")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [200002, 199999]}))
    config = load_config(tmp_path)
    assert (config.system_message, config.end_token_ids) == (expected, (200002, 199999))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == says
