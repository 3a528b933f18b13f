"""InternVL's classes are read under all their names, and relatives that do not run are refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.checkpoint.classes import CLASSES, RELATIVES
from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.errors import ConfigError
from support.configs import HF, ORIGINAL, QIANFAN_OCR, changed, parse

INTERN_S1 = {
    "architectures": ["InternS1ForConditionalGeneration"],
    "model_type": "interns1",
    "image_token_id": 152957,
    "auto_map": {"AutoModelForCausalLM": "modeling_interns1.InternS1ForConditionalGeneration"},
    "vision_config.model_type": "interns1_vision",
    "vision_config.drop_path_rate": 0.1,
    "text_config.model_type": "qwen3",
    "text_config.head_dim": 128,
    "text_config.vocab_size": 153216,
}
SKYWORK = {"architectures": ["SkyworkR1VChatModel"], "model_type": "skywork_chat"}


def test_a_class_is_known_by_one_name() -> None:
    names = [one.architecture for one in CLASSES]
    assert len(names) == len(set(names))
    assert not {*names, *(each for one in CLASSES for each in one.model_types)} & RELATIVES.keys()


@pytest.mark.parametrize(
    ("model_type", "vision_type"),
    [("interns1", "interns1_vision"), ("intern_s1", "intern_s1_vision"), ("interns1", "intern_s1_vision")],
)
def test_intern_s1_is_a_hf_model_with_a_larger_vocabulary(model_type: str, vision_type: str) -> None:
    names = {"model_type": model_type, "vision_config.model_type": vision_type}
    mini = parse(changed(HF, {**INTERN_S1, **names}))
    assert mini.vision == parse(HF).vision
    assert (mini.format, mini.unshuffle, mini.max_tiles, mini.thumbnail) == ("hf", "v2", 12, True)
    assert (mini.decoder.vocab_size, mini.decoder.qk_norm) == (153216, True)


def test_intern_s1_of_241b_has_the_large_vision_tower_and_experts() -> None:
    sizes: dict[str, Any] = {
        "text_config.model_type": "qwen3_moe",
        "text_config.num_experts": 128,
        "text_config.num_experts_per_tok": 8,
        "text_config.moe_intermediate_size": 1536,
        "text_config.norm_topk_prob": True,
        "vision_config.attention_bias": False,
        "vision_config.use_qk_norm": True,
        "vision_config.norm_type": "rms_norm",
        "vision_config.hidden_size": 3200,
        "vision_config.intermediate_size": 12800,
        "vision_config.num_hidden_layers": 45,
        "vision_config.num_attention_heads": 25,
    }
    config = parse(changed(HF, {**INTERN_S1, **sizes}))
    assert (config.vision.num_layers, config.vision.qk_norm, config.vision.qkv_bias) == (45, True, False)
    assert config.decoder.experts is not None
    assert (config.decoder.experts.num_experts, config.decoder.intermediate_size) == (128, 1536)


@pytest.mark.parametrize("vision_type", ["intern_vit_6b", "skywork_vit", ...])
def test_skywork_r1v_with_a_known_template_is_an_internvl_of_the_original_format(vision_type: Any) -> None:
    values = changed(ORIGINAL, {**SKYWORK, "vision_config.model_type": "intern_vit_6b"})
    assert parse(changed(values, {"vision_config.model_type": vision_type})) == parse(ORIGINAL)


def test_skywork_r1v_with_another_template_is_refused_and_the_first_one_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(ORIGINAL, {**SKYWORK, "template": "skywork-r1v-chat"}))
    message = str(caught.value)
    assert message.startswith("there/config.json: template is 'skywork-r1v-chat', expected 'internvl2_5'; ")
    assert "R1V (v1) does not: its turns are those of DeepSeek-R1" in message


def test_fine_tunes_under_internvls_own_names_and_the_critics_are_read_as_they_are() -> None:
    of_sense_nova = {"_name_or_path": "sensenova/SenseNova-SI-InternVL3-2B", "architectures": ["InternVLChatModel"]}
    assert parse(changed(ORIGINAL, of_sense_nova)) == parse(ORIGINAL)
    of_visual_prm = {"_name_or_path": "OpenGVLab/VisualPRM-8B-v1_1", "architectures": ["InternVLRewardModel"]}
    assert parse(changed(ORIGINAL, of_visual_prm)) == parse(ORIGINAL)


def _ways_to_name() -> Iterator[Any]:
    for mark, relative in RELATIVES.items():
        changes: dict[str, Any] = {"architectures": [mark]}
        if mark.startswith("modeling_"):
            changes = {"auto_map": {"AutoConfig": "configuration.C", "AutoModel": f"OpenGVLab/X--{mark}.ChatModel"}}
        elif mark == "InternLM2VEForCausalLM":
            changes = {"llm_config.architectures": [mark]}
        elif mark.islower():
            changes = {"model_type": mark}
        yield pytest.param(changes, relative, id=mark)


@pytest.mark.parametrize(("changes", "relative"), list(_ways_to_name()))
def test_a_relative_that_does_not_run_is_refused_by_name_with_a_reason_and_what_runs_instead(
    changes: dict[str, Any], relative: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(ORIGINAL, changes))
    message = str(caught.value)
    assert message.startswith(f"there/config.json: {next(iter(changes)).partition('.')[0]} is ")
    assert f"which {relative.name} is not: {relative.reason}; {relative.runs} can be used instead" in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"architectures": ["SkyworkR1VChatModel"]}, "architectures"),
        ({"model_type": "interns1"}, "architectures"),
        ({"model_type": "skywork_chat"}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "InternVLChatModel"}, "architectures"),
        ({"model_type": None, "auto_map": 5}, "model_type"),
    ],
)
def test_a_class_and_a_model_type_of_two_models_are_refused(changes: dict[str, Any], blamed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^there/config\.json: {blamed} is "):
        parse(changed(ORIGINAL, changes))


def test_qianfan_ocr_is_read_as_the_hub_has_it() -> None:
    config = parse(QIANFAN_OCR)
    vision, decoder = config.vision, config.decoder
    assert (config.format, config.unshuffle, config.min_tiles, config.max_tiles, config.thumbnail) == (
        "hf", "v2", 1, 12, True,
    )  # fmt: skip
    assert (vision.hidden_size, vision.qkv_bias, vision.qk_norm, vision.norm) == (1024, True, False, "layer_norm")
    assert (decoder.hidden_size, decoder.num_layers, decoder.qk_norm, decoder.tie_embeddings) == (2560, 36, True, False)


SPELLINGS: list[dict[str, Any]] = [
    {"vision_config.qkv_bias": ...},  # the class has biases by default
    {"vision_config.qk_normalization": ...},
    {"vision_config.qkv_bias": ..., "vision_config.attention_bias": True},
    {"vision_config.qk_normalization": ..., "vision_config.use_qk_norm": False},
    {"vision_config.attention_bias": True, "vision_config.use_qk_norm": False},  # both, and they agree
    {"vision_config.image_size": [448, 448], "vision_config.patch_size": [14, 14]},
    {"vision_config.model_type": "intern_vit_6b"},
    {"vision_config.model_type": ...},
    {"text_config.model_type": ...},  # a Qwen3 by default
    {"template": ..., "select_layer": ..., "ps_version": ..., "force_image_size": ..., "use_thumbnail": ...},
]


@pytest.mark.parametrize("changes", SPELLINGS)
def test_each_section_of_qianfan_ocr_is_read_by_the_keys_that_it_has(changes: dict[str, Any]) -> None:
    assert parse(changed(QIANFAN_OCR, changes)) == parse(QIANFAN_OCR)


def test_the_text_section_of_qianfan_ocr_may_be_the_original_one() -> None:
    text = QIANFAN_OCR["text_config"]
    values = {key: value for key, value in QIANFAN_OCR.items() if key != "text_config"}
    config: ModelConfig = parse({**values, "llm_config": {**text, "architectures": ["Qwen3ForCausalLM"]}})
    assert config == parse(QIANFAN_OCR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "qianfan"}, "template is 'qianfan', expected 'internvl2_5'"),
        ({"select_layer": -4}, "select_layer is -4, expected -1"),
        ({"pad2square": True}, "pad2square is True, expected False"),
        ({"ps_version": "v1"}, "ps_version is 'v1', expected 'v2'"),
        ({"use_thumbnail": False}, "use_thumbnail is False, expected True"),
        ({"dynamic_image_size": False}, "dynamic_image_size is False, expected True"),
        ({"force_image_size": 224}, "force_image_size is 224, expected None or 448"),
        ({"min_dynamic_patch": 13}, "min_dynamic_patch is 13, expected an integer from 1 to 12"),
        ({"vision_config.attention_bias": False}, "vision_config.qkv_bias is True, expected False"),
        ({"vision_config.use_qk_norm": True}, "vision_config.qk_normalization is False, expected True"),
        ({"vision_config.use_moe": True}, "vision_config.use_moe is True, expected False"),
        ({"vision_config.model_type": "siglip"}, "vision_config.model_type is 'siglip', expected 'qianfan_ocr_vision'"),
        ({"text_config": ...}, "llm_config is missing, expected an object"),
    ],
)
def test_what_qianfan_ocr_would_not_be_computed_with_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(QIANFAN_OCR, changes))
    assert str(caught.value).startswith(f"there/config.json: {message}")


def test_tiles_of_qianfan_ocr_are_those_of_its_config_unless_its_image_processor_says_otherwise(tmp_path: Path) -> None:
    values = changed(QIANFAN_OCR, {"min_dynamic_patch": 2, "max_dynamic_patch": 16})
    config = parse(values)
    assert (config.min_tiles, config.max_tiles) == (2, 16)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_patches": 1}))
    config = load_config(tmp_path)
    assert (config.min_tiles, config.max_tiles) == (1, 1)
