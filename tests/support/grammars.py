"""Grammars over every kind of tokenizer: what their masks allow."""

import io
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece

import internvl_rt
from internvl_rt.inputs.grammar import GrammarCompiler
from internvl_rt.inputs.tokenizer import TEMPLATE_TOKENS, load_tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizer"
NUM_UNKNOWN = 9  # rows of the model's embedding that belong to no token
KINDS = ["byte-level", "tiny", "sentencepiece"]


def write_sentencepiece(folder):
    """Writes a tokenizer as InternLM has it: bytes spell what the vocabulary lacks, and a space precedes every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['{"name": "the boat", "paid": true}', "[1, 2, 34]", "the lake", "你好世界"] * 9),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokens = ["<ref>", "</ref>", *sorted(TEMPLATE_TOKENS)]
    declared = {str(340 + i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    return folder


@cache
def subject(kind):
    """Returns a tokenizer, and a compiler for a model that has NUM_UNKNOWN more rows than the tokenizer has tokens."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {"byte-level": DATA, "tiny": Path(internvl_rt.__file__).parent / "tiny"}
        tokenizer = load_tokenizer(folders[kind] if kind in folders else write_sentencepiece(Path(folder)))
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_UNKNOWN)


def moved_on(compiled, token_ids):
    """Returns the matcher of a new answer after it has accepted these tokens."""
    matcher = compiled.start()
    assert all(map(matcher.accept, token_ids))
    return matcher


def allowed(matcher, tokenizer):
    """Returns the ids in the mask, in order. The buffer starts full of ones, which must not matter."""
    num_words = -(-(tokenizer.vocab_size + NUM_UNKNOWN) // 32)
    mask_W = np.full(num_words, -1, np.int32)
    matcher.fill_mask(mask_W)
    return [t for t in range(32 * num_words) if mask_W[t // 32] >> (t % 32) & 1]


def follow(matcher, tokenizer, ids):
    """Returns whether each of these tokens may come next; mask and matcher must agree on it."""
    for token_id in ids:
        agrees = token_id in allowed(matcher, tokenizer)
        assert matcher.accept(token_id) == agrees
        if not agrees:
            return False
    return True


def fits(compiled, tokenizer, text):
    """Returns whether the grammar accepts the tokens of this text and then the end of the answer."""
    ids = [*tokenizer.encode(text), tokenizer.token_id("<|im_end|>")]
    return follow(compiled.start(), tokenizer, ids)
