"""Converts text to token ids and back.

Checkpoints with a Qwen language model carry a byte-level BPE, run by the `tokenizers` library; those with an InternLM
one (the 9B and its 2.5 neighbours) a sentencepiece model. Both become one `Tokenizer`: two functions from text to ids
and one table from id to bytes, so that decoding and streaming are the same for both.
"""

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from internvl_rt.checkpoint.files import MAX_TOKENIZER_BYTES, read_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.errors import CheckpointError, RequestError

# These are never read from a user's text, whatever the checkpoint's flags say: they end turns and stand for pictures.
TEMPLATE_TOKENS = frozenset(
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"]
    + [f"<{slash}{name}>" for name in ("img", "quad", "ref", "box") for slash in ("", "/")]
)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's printable alphabet: bytes that print are their own character, the others follow from U+0100 on.
_BYTE_OF_CHAR = {
    256 + n: byte for n, byte in enumerate(b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or b >= 174))
}
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_UNDECODABLE = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")  # "surrogateescape" makes these of broken bytes


class TextStream:
    """Text of one growing sequence; the pieces joined are exactly `Tokenizer.decode` of all its ids."""

    def __init__(self, tokenizer: "Tokenizer", skipped: Collection[int]) -> None:
        """skipped: ids that give no text."""
        self._token_bytes, self._whole, self._skipped = tokenizer.token_bytes, tokenizer.whole, skipped
        self._pieces = pieces = tokenizer.pieces
        self._is_between = not pieces  # no incomplete character is held, and no space will be dropped
        self._at_start = pieces
        # A broken character is one U+FFFD with byte-level BPE, and one for each of its bytes with sentencepiece.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if pieces else "replace")

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes: "" within a character, for skipped and for unknown ids."""
        if token_id in self._skipped:
            return ""
        if self._is_between and (text := self._whole.get(token_id)) is not None:
            return text
        data = self._token_bytes.get(token_id, b"")
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
            return self._text(data)
        was_between, text = self._is_between, self._text(data)
        self._is_between = not self._at_start and not self._decoder.getstate()[0]
        if was_between and self._is_between:
            self._whole[token_id] = text
        return text

    def flush(self) -> str:
        """Returns the rest: the bytes of an incomplete character become U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        return text.translate(_UNDECODABLE) if self._pieces else text


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Tokenizer:
    """A checkpoint's tokenizer. Immutable, so any number of threads may use it at once."""

    prefix_ids: tuple[int, ...]  # what a full prompt starts with: () or the id of <s>
    find_token_id: Callable[[str], int | None]
    _encode_plain: Callable[[str], list[int]]
    _encode_all: Callable[[str], list[int]]
    token_bytes: Mapping[int, bytes]
    special_ids: frozenset[int]
    pieces: bool  # sentencepiece conventions: the first space is dropped, a broken byte is one U+FFFD
    whole: dict[int, str] = field(default_factory=dict)  # streams keep the texts of whole characters' tokens here

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's embedding may have more rows."""
        return len(self.token_bytes)

    def token_id(self, token: str) -> int:
        """Returns the id of a token, spelt as in the vocabulary. Raises CheckpointError if there is none."""
        if (token_id := self.find_token_id(token)) is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; take all tokenizer files from one checkpoint")
        return token_id

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Returns the ids of `text`, without `prefix_ids`.

        With `specials` the special tokens written in `text` are read as such, as the official code does with a rendered
        prompt. Without, they stay ordinary text; added tokens that are not special, such as <tool_call>, are read as
        tokens either way. Raises RequestError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text is not valid Unicode: half a surrogate pair at character {error.start}; send the whole one"
            ) from error
        return self._encode_all(text) if specials else self._encode_plain(text)

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Returns the text of `ids`; broken UTF-8 becomes U+FFFD, spaces are left as they are."""
        stream = self.stream(skip_specials=skip_specials)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_specials: bool = True) -> TextStream:
        """Starts to decode a sequence whose ids come one by one."""
        return TextStream(self, self.special_ids if skip_specials else ())


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json, else vocab.json with merges.txt, else tokenizer.model (sentencepiece) from `folder`.

    Tokens that tokenizer_config.json or added_tokens.json declare on top are added in each case. Raises CheckpointError
    if no such file is there, one is malformed, or sentencepiece is needed and not installed.
    """
    if os.path.lexists(folder / "tokenizer.json"):
        return _from_library(folder, _read_tokenizer_json(folder / "tokenizer.json"))
    if all(os.path.lexists(folder / name) for name in ("vocab.json", "merges.txt")):
        return _from_library(folder, _read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt"))
    if os.path.lexists(folder / "tokenizer.model"):
        return _from_sentencepiece(folder)
    raise CheckpointError(
        f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or tokenizer.model; "
        "download them from the model's repository"
    )


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(read_file(path, CheckpointError, max_bytes=MAX_TOKENIZER_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a tokenizer file: {error}; download it again") from error


def _read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """The Qwen2 tokenizer of transformers (models/qwen2): NFC, the Qwen2 word pattern, byte-level BPE."""
    vocab = _read_json(vocab_path)
    lines, merges = read_file(merges_path, CheckpointError).decode("utf-8", "replace").split("\n"), []
    for number, line in enumerate(lines, start=1):
        pair = tuple(line.split())
        if not pair or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2 or not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
            raise CheckpointError(
                f"{merges_path} line {number}: expected two tokens of {vocab_path.name} that join to a third, "
                f"got {line!r}; download both files again"
            )
        merges.append(pair)
    try:
        base = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except (TypeError, OverflowError) as error:
        raise CheckpointError(f"{vocab_path}: expected tokens with their ids ({error}); download it again") from error
    base.normalizer = normalizers.NFC()
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    return base


def _from_library(folder: Path, base: tokenizers.Tokenizer) -> Tokenizer:
    byte_level = "ByteLevel" in str(base.decoder)
    if not byte_level and "ByteFallback" not in str(base.decoder):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: expected a ByteLevel or ByteFallback decoder, got {base.decoder}; use an "
            "InternVL checkpoint"
        )
    added = _declared_tokens(folder) | base.get_added_tokens_decoder()
    special = frozenset(token.content for token in added.values() if token.special)
    everything = _with_added(folder, base, added, hidden=frozenset())
    plain = _with_added(folder, base, added, hidden=special | TEMPLATE_TOKENS)
    to_bytes = _byte_level_bytes if byte_level else _piece_bytes
    token_bytes = {token_id: to_bytes(token) for token, token_id in base.get_vocab(with_added_tokens=False).items()}
    return Tokenizer(
        prefix_ids=tuple(base.encode("").ids),
        find_token_id=everything.token_to_id,
        _encode_plain=lambda text: plain.encode(text).ids,
        _encode_all=lambda text: everything.encode(text).ids,
        token_bytes=token_bytes | {token_id: token.content.encode() for token_id, token in added.items()},
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        pieces=not byte_level,
    )


def _with_added(
    folder: Path, base: tokenizers.Tokenizer, added: Mapping[int, AddedToken], hidden: Collection[str]
) -> tokenizers.Tokenizer:
    """Builds a tokenizer that shares the vocabulary of `base` and reads all added tokens but the `hidden` ones."""
    result = tokenizers.Tokenizer(base.model)
    result.normalizer = base.normalizer
    result.pre_tokenizer = base.pre_tokenizer
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    result.add_tokens(
        [
            AddedToken(token.content, special=token.content in hidden, **{flag: getattr(token, flag) for flag in flags})
            for _, token in sorted(added.items())
        ]
    )
    result.encode_special_tokens = True  # tokens flagged special are ordinary text to this tokenizer
    for token_id, token in added.items():
        if (actual := result.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"{folder}: token {token.content!r} is declared as {token_id} but follows the vocabulary as {actual}; "
                "take all tokenizer files from one checkpoint"
            )
    return result


def _from_sentencepiece(folder: Path) -> Tokenizer:
    """Encodes text between added tokens by itself, as the slow InternLM2 and InternLM3 tokenizers do."""
    path = folder / "tokenizer.model"
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CheckpointError(f"{path} needs sentencepiece; run: pip install 'internvl-rt[internlm]'") from error
    try:
        model = SentencePieceProcessor(model_proto=read_file(path, CheckpointError))
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}; download it again") from error

    size, bos = model.get_piece_size(), model.bos_id()
    own = [token_id for token_id in (model.unk_id(), bos, model.eos_id(), model.pad_id()) if token_id >= 0]
    declared = _declared_tokens(folder)
    added = {model.id_to_piece(token_id): token_id for token_id in own}
    added |= {token.content: token_id for token_id, token in declared.items()}
    special_ids = frozenset(own) | {token_id for token_id, token in declared.items() if token.special}
    visible = {t: i for t, i in added.items() if i not in special_ids and t not in TEMPLATE_TOKENS}
    # A special token may use an unused piece of the model. Text spelt like the piece must not give it, but bytes.
    spelled = {
        token_id: [model.piece_to_id(f"<0x{byte:02X}>") for byte in model.id_to_piece(token_id).encode()]
        for token, token_id in added.items()
        if token_id < size and token_id not in own and token not in visible
    }

    def encode_plain(text: str) -> list[int]:
        return [part for token_id in model.encode(text) for part in spelled.get(token_id, (token_id,))]

    def find_token_id(token: str) -> int | None:
        token_id = added.get(token, model.piece_to_id(token))
        return token_id if token in added or token_id != model.unk_id() else None

    control = model.is_control(list(range(size)))
    token_bytes = {i: b"" if control[i] else _piece_bytes(model.id_to_piece(i)) for i in range(size)}
    add_bos = bos >= 0 and _read_json(folder / "tokenizer_config.json").get("add_bos_token", True)
    return Tokenizer(
        prefix_ids=(bos,) if add_bos else (),
        find_token_id=find_token_id,
        _encode_plain=_splitting(visible, encode_plain),
        _encode_all=_splitting(added, model.encode),
        token_bytes=token_bytes | {token_id: token.encode() for token, token_id in added.items()},
        special_ids=special_ids,
        pieces=True,
    )


def _splitting(added: Mapping[str, int], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Reads the added tokens in a text, longest first, and encodes what lies between them with `encode`."""
    if not added:
        return encode
    pattern = re.compile("(" + "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)) + ")")

    def encode_split(text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(pattern.split(text)):  # text, token, text, token, ..., text
            ids += [added[part]] if number % 2 else encode(part)
        return ids

    return encode_split


def _declared_tokens(folder: Path) -> dict[int, AddedToken]:
    """Added tokens by id: from tokenizer_config.json, in older checkpoints from added_tokens.json."""
    config = _read_json(folder / "tokenizer_config.json")
    older, special_map = _read_json(folder / "added_tokens.json"), _read_json(folder / "special_tokens_map.json")
    try:
        if "added_tokens_decoder" in config:
            return {int(key): AddedToken(**fields) for key, fields in config["added_tokens_decoder"].items()}
        groups = [value if isinstance(value, list) else [value] for value in special_map.values()]
        special = {item["content"] if isinstance(item, dict) else item for group in groups for item in group}
        return {i: AddedToken(token, special=token in special, normalized=False) for token, i in older.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the added tokens in tokenizer_config.json, added_tokens.json or special_tokens_map.json are "
            f"malformed ({error!r}); download these files again"
        ) from error


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # a character is not in the alphabet: the token stands for itself
        return token.encode()


def _piece_bytes(piece: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    return parse_object(path, read_file(path, CheckpointError), CheckpointError) if os.path.lexists(path) else {}
