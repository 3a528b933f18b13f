"""Writes the tiny checkpoint's files except its weights: config.json and a Qwen2 tokenizer of the questions' words."""

import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from support.digits import COMPARE, COUNT, READ

CONFIG: dict[str, object] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 56,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "system_message": "Answer briefly.",
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": 96,
        "image_size": 56,
        "intermediate_size": 384,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": "bfloat16",
    },
}
LLM_CONFIG: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
PLAIN_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
INTERNVL_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def write_files(folder: Path) -> None:
    """Writes all files except the weights into an existing folder."""
    vocab_size = _write_tokenizer(folder)
    _write_json(folder / "config.json", {**CONFIG, "llm_config": {**LLM_CONFIG, "vocab_size": vocab_size}})
    _write_json(folder / "generation_config.json", {"_from_model_config": True})


def _write_tokenizer(folder: Path) -> int:
    """Writes a byte-level BPE tokenizer with one token for each word of the questions; returns the vocabulary size."""
    base = tokenizers.Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    template = ["system\n", str(CONFIG["system_message"]), "user\n", "assistant\n", "Image-1: \n"]
    base.train_from_iterator([*READ, *COUNT, *COMPARE, *template, "Picture 1", "Both are equal"], trainer)
    base.model.save(str(folder))
    size = base.get_vocab_size()
    added = {token: size + n for n, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS + INTERNVL_TOKENS)}
    special = SPECIAL_TOKENS + INTERNVL_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(n): {"content": token, **flags, "special": token in special} for token, n in added.items()}
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": special[1:], **named})
    _write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 12288, **named},
    )
    return size + len(added)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
