"""What tests of GPT-OSS's template share: a small random checkpoint, and a tokenizer of o200k's kind."""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from internvl_rt.checkpoint.config import KNOWN_MODELS
from internvl_rt.inputs.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from support.configs import changed

NAME = "InternVL3_5-GPT-OSS-20B-A4B-Preview"
SMALL = changed(
    json.loads(KNOWN_MODELS[NAME].read_text()),
    {
        "force_image_size": 28,
        "vision_config.image_size": 28,
        "vision_config.patch_size": 7,
        "vision_config.hidden_size": 16,
        "vision_config.num_attention_heads": 2,
        "vision_config.num_hidden_layers": 2,
        "vision_config.intermediate_size": 24,
        "llm_config.hidden_size": 32,
        "llm_config.head_dim": 16,
        "llm_config.num_attention_heads": 4,
        "llm_config.num_key_value_heads": 2,
        "llm_config.num_hidden_layers": 2,
        "llm_config.layer_types": ["sliding_attention", "full_attention"],
        "llm_config.sliding_window": 8,
        "llm_config.intermediate_size": 48,
        "llm_config.num_local_experts": 4,
        "llm_config.num_experts_per_tok": 2,
        "llm_config.vocab_size": 320,
    },
)
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"  # between an analysis and the channel after it

# As in tiktoken's o200k_base.
WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL = (
    "<|startoftext|> <|endoftext|> <|return|> <|constrain|> <|channel|> <|start|> <|end|> <|message|> <|call|> "
    "<|endofprompt|> <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
).split()


def write_small(folder: Path) -> Path:
    """Writes a GPT-OSS of a few thousand weights, each of its 256 bytes a token, and returns its folder."""
    write_random_checkpoint(SMALL, folder)
    return folder


def _build_o200k() -> Tokenizer:
    """Builds a tokenizer.json with o200k's words and a few hundred merges of what often stands together in tests."""
    base = tokenizers.Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    chosen, atoms = (
        random.Random(7),
        "a The lake 1 23 007 ' 's 'LL \n \r\n / // ! ?! . , 你好 \u0301 = - final user".split(" "),
    )
    texts = ["".join(chosen.choices(atoms, k=12)) for _ in range(3000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    base.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    with TemporaryDirectory() as folder:
        base.save(f"{folder}/tokenizer.json")
        return load_tokenizer(Path(folder))


O200K = _build_o200k()
