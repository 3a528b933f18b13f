"""Trains the checkpoint that ships in the package as model `tiny`, on the CPU, and measures it.

    .venv/bin/python tests/train_tiny.py --out /tmp/tiny        (the default is the package's own folder)

Everything but the loss is the package's own: tiles, prompts, V2PE positions, the model and its reference operations,
the checkpoint writer; accuracy is measured through the engine. Each picture's V2PE delta is drawn anew whenever it is
used, from 1, 1/2, ..., 1/256, as in native V2PE pre-training.
"""

import argparse
import ctypes
import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from support.digits import (
    COMPARE,
    COUNT,
    MAX_DIGITS,
    READ,
    Exercise,
    draw_comparison,
    draw_picture,
    draw_reading,
    load_glyphs,
    measure,
)
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from internvl_rt import Engine
from internvl_rt.config import ModelConfig, load_config
from internvl_rt.image import ImageOptions, tile_image
from internvl_rt.kv_cache import LayerCache
from internvl_rt.model.internvl import InternVL, ModelWeights, build_weights, named_parameters
from internvl_rt.ops import TORCH
from internvl_rt.position import STRIDES, build_positions
from internvl_rt.prompt import VisualSpan, build_prompt, parse_messages, turns_from_messages
from internvl_rt.step import StepInputs
from internvl_rt.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.weights import DIALECTS, save_weights

SEED = 3
NUM_EXERCISES, NUM_STEPS, BATCH_SIZE = 12_000, 1000, 48
EASY_SHARE = 0.25  # of the steps, at the beginning: pictures of one or two digits only
COMPARISONS = 0.25  # of the exercises
PEAK_RATE, WARMUP_STEPS = 2e-3, 30
SORTED_BATCHES = 8  # batches whose prompts are sorted by length, to pad less
SAMPLES = ("7", "42", "905", "4719", "31415", "862053")

CONFIG = {
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
    "llm_config": {
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
    },
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
PLAIN_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
INTERNVL_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE whose merges make one token of every word in the questions; returns the vocabulary's size."""
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
    write_json(folder / "added_tokens.json", added)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": special[1:], **named})
    write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 12288, **named},
    )
    return size + len(added)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
