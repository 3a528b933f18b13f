"""Reads a checkpoint's tokenizer files with `tokenizers` or sentencepiece, and refuses what a prompt cannot follow."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from internvl_rt.checkpoint.files import MAX_TOKENIZER_BYTES, read_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.errors import CheckpointError, InternVLError, RequestError, TranslateErrors, quoted
from internvl_rt.inputs.slices import O200K_CUT, QWEN2_CUT, cuts_are_safe

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_WORDS = (  # of GPT-OSS
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTION}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTION}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {QWEN2_WORDS: QWEN2_CUT, O200K_WORDS: O200K_CUT}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # how an added token is found in a text


def library_errors(build: Callable[[str], InternVLError]) -> TranslateErrors:
    """Raises `build(reason)` for whatever the library raises: its panics are no `Exception`, so nobody catches them."""

    def translate(error: BaseException) -> InternVLError | None:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            return build(" ".join(str(error).split()))
        return None  # KeyboardInterrupt and the like

    return TranslateErrors(translate)


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Reads tokenizer.json; padding and truncation in it, which are for batches in training, are dropped.

    Raises CheckpointError for a malformed file, and for one that would draw the ids of a text at random.
    """
    content = read_file(path, CheckpointError, max_bytes=MAX_TOKENIZER_BYTES)
    with library_errors(lambda reason: CheckpointError(f"{path} is not a tokenizer file: {reason}; download it again")):
        base = tokenizers.Tokenizer.from_buffer(content)
        base.no_padding()
        base.no_truncation()
    if dropout := getattr(base.model, "dropout", None):
        raise CheckpointError(
            f"{path}: expected a model without dropout, got dropout {dropout}, which makes the ids of a text random; "
            "set it to null"
        )
    return base


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """Builds the Qwen2 tokenizer of transformers (models/qwen2): NFC, the Qwen2 word pattern, byte-level BPE."""
    vocab = read_json(vocab_path)
    lines, merges = read_file(merges_path, CheckpointError).decode("utf-8", "replace").split("\n"), []
    for number, line in enumerate(lines, start=1):
        pair = tuple(line.split())
        if not pair or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2 or not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
            raise CheckpointError(
                f"{merges_path} line {number}: expected two tokens of {vocab_path.name} that join to a third, "
                f"got {quoted(line)}; download both files again"
            )
        merges.append(pair)
    with library_errors(
        lambda reason: CheckpointError(f"{vocab_path}: expected tokens with their ids ({reason}); download it again")
    ):
        base = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    base.normalizer = normalizers.NFC()
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    return base


def read_sentencepiece(path: Path) -> tuple[Any, list[str]]:
    """Reads a sentencepiece model, and the names of its pieces by id.

    Raises CheckpointError for a malformed file, or if sentencepiece is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CheckpointError(f"{path} needs sentencepiece; run: pip install 'internvl-rt[internlm]'") from error
    content = read_file(path, CheckpointError)
    try:
        model = SentencePieceProcessor(model_proto=content)
        return model, [model.id_to_piece(token_id) for token_id in range(model.get_piece_size())]
    except (RuntimeError, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}; download it again") from error


def piece_bytes(piece: str) -> bytes:
    """Returns the bytes of a sentencepiece model's piece in a text."""
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def read_declared_tokens(folder: Path) -> dict[int, AddedToken]:
    """Returns the added tokens by id: from tokenizer_config.json, in older checkpoints from added_tokens.json."""
    config = read_json(folder / "tokenizer_config.json")
    older, special_map = read_json(folder / "added_tokens.json"), read_json(folder / "special_tokens_map.json")
    try:
        if "added_tokens_decoder" in config:
            decoder = config["added_tokens_decoder"]
            known = (*_FLAGS, "special")
            declared = {
                int(key): AddedToken(fields["content"], **{flag: fields[flag] for flag in known if flag in fields})
                for key, fields in decoder.items()
            }
        else:
            groups = [value if isinstance(value, list) else [value] for value in special_map.values()]
            special = {item["content"] if isinstance(item, dict) else item for group in groups for item in group}
            declared = {i: AddedToken(token, special=token in special, normalized=False) for token, i in older.items()}
        if any(not 0 <= token_id < 2**31 or not token.content for token_id, token in declared.items()):
            raise ValueError("an id is out of range, or a token empty")
        return declared
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the added tokens in tokenizer_config.json, added_tokens.json or special_tokens_map.json are "
            f"malformed ({quoted(error)}); download these files again"
        ) from error


def read_prefix_ids(path: Path, base: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the file puts before every prompt. Raises CheckpointError if it puts any behind."""
    text = base.encode("a")  # any text would do: only the place of its own ids counts
    own = [index for index, sequence in enumerate(text.sequence_ids) if sequence is not None]
    if own and own[-1] + 1 < len(text.ids):
        raise CheckpointError(
            f"{path}: expected a post_processor that adds tokens before a text at most, got one that adds "
            f"{text.tokens[own[-1] + 1 :]} behind, where the answer begins; remove them"
        )
    return tuple(text.ids[: own[0]] if own else text.ids)


def with_added(
    folder: Path, base: tokenizers.Tokenizer, added: Mapping[int, AddedToken], hidden: Collection[str]
) -> tokenizers.Tokenizer:
    """Builds a tokenizer that shares the vocabulary of `base` and reads all added tokens but the `hidden` ones."""
    result = tokenizers.Tokenizer(base.model)
    result.normalizer = base.normalizer
    result.pre_tokenizer = base.pre_tokenizer
    tokens = [
        AddedToken(token.content, special=token.content in hidden, **{flag: getattr(token, flag) for flag in _FLAGS})
        for _, token in sorted(added.items())
    ]
    with library_errors(
        lambda reason: CheckpointError(f"{folder}: the added tokens do not follow the vocabulary: {reason}")
    ):
        result.add_tokens(tokens)
    result.encode_special_tokens = True  # tokens flagged special are ordinary text to this tokenizer
    for token_id, token in added.items():
        if (actual := result.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"{folder}: token {quoted(token.content)} is declared as {token_id} but follows the vocabulary as "
                f"{actual}; take all tokenizer files from one checkpoint"
            )
    return result


def find_cut(base: tokenizers.Tokenizer, added: Collection[AddedToken]) -> re.Pattern[str] | None:
    """Returns where a text may be cut without a change of its ids: known if words are those of Qwen2 or o200k."""
    state = json.loads(base.pre_tokenizer.__getstate__()) if base.pre_tokenizer else {}
    cut = None
    match state.get("pretokenizers"):
        case [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}, spelling]:
            spelling.pop("trim_offsets", None)  # changes no ids
            cut = _CUTS.get(words) if spelling == _BYTE_LEVEL else None
    depends_on_place = any(token.single_word or token.lstrip or token.rstrip for token in added)
    if cut is None or depends_on_place or not isinstance(base.normalizer, normalizers.NFC | None):
        return None
    return cut if cuts_are_safe(cut, [token.content for token in added]) else None


def encoder(library: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """Returns a function from text to ids that any number of threads may call, and that holds none of them up."""

    def encode(text: str) -> list[int]:
        with library_errors(
            lambda reason: RequestError(f"the tokenizer cannot read {quoted(text)}: {reason}; change it")
        ):
            # A batch is encoded without the interpreter lock, which `encode` holds; "fast" leaves out offsets.
            return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if there is no such file."""
    return parse_object(path, read_file(path, CheckpointError), CheckpointError) if os.path.lexists(path) else {}
