"""Holds a config.json in each of the two formats, and one of both, and returns changed copies."""

import copy
import json
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.config import KNOWN_MODELS, ModelConfig, parse_config
from internvl_rt.checkpoint.json_section import Section

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
QIANFAN_OCR: dict[str, Any] = {
    "architectures": ["QianfanOCRForConditionalGeneration"],
    "model_type": "qianfan_ocr",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "image_token_id": 151671,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "text_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 32768,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_theta": 5000000,
        "vocab_size": 153678,
    },
    "vision_config": {
        "attention_dropout": 0.0,
        "drop_path_rate": 0.1,
        "hidden_size": 1024,
        "image_size": 448,
        "model_type": "qianfan_ocr_vision",
        "norm_type": "layer_norm",
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "use_mean_pooling": True,
    },
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy with the values set at dotted paths; the value `...` removes the key."""
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
