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

import tokenizers

from internvl_rt.errors import CheckpointError, ContextLengthError, RequestError, quoted, utf8
from internvl_rt.inputs.segments import has_segments, read_segments
from internvl_rt.inputs.slices import slices
from internvl_rt.inputs.tokenizer_files import (
    encoder,
    find_cut,
    piece_bytes,
    read_declared_tokens,
    read_json,
    read_prefix_ids,
    read_sentencepiece,
    read_tokenizer_json,
    read_vocab_and_merges,
    with_added,
)

SHORTEN = "shorten it"  # what helps, in the error for a text that is too long

# Tokens that end a turn, open one or stand for a picture.
TEMPLATE_TOKENS = frozenset(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"])
# Those of GPT-OSS, which begin and end the parts of its turns too.
HARMONY_TOKENS = frozenset(["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"])
HARMONY_TOKENS |= {"<|constrain|>", "<|startoftext|>", "<|endofprompt|>"}
# Tokens that do so in other dialects, whose language models a checkpoint may have.
_TURN_TOKENS = frozenset(["<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
_TURN_TOKENS |= {"<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"}
# GPT-2's printable alphabet: bytes that print are their own character, the others follow from U+0100 on.
_BYTE_OF_CHAR = {
    256 + n: byte for n, byte in enumerate(b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or b >= 174))
}
_UNDECODABLE = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")  # "surrogateescape" makes these of broken bytes


class TextStream:
    """Text of one growing sequence; the pieces joined are exactly `Tokenizer.decode` of all its ids."""

    def __init__(self, tokenizer: "Tokenizer", skipped: Collection[int], *, begun: bool = False) -> None:
        """skipped: ids that give no text. begun: other text comes before, so that no space is dropped."""
        self._token_bytes, self._whole, self._skipped = tokenizer.token_bytes, tokenizer.whole, skipped
        self._pieces = pieces = tokenizer.pieces
        self._at_start = pieces and not begun
        self._is_between = not self._at_start  # no incomplete character is held, and no space will be dropped
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
    _spelled: Mapping[int, list[int]]  # what text becomes that would otherwise give this hidden id
    _cut: re.Pattern[str] | None  # matches between two parts of a text that can be encoded one by one
    token_bytes: Mapping[int, bytes]
    hidden_ids: frozenset[int]  # never read from a user's text: they end a turn, open one or stand for a picture
    special_ids: frozenset[int]  # give no text in an answer
    pieces: bool  # sentencepiece conventions: the first space is dropped, a broken byte is one U+FFFD
    whole: dict[int, str] = field(default_factory=dict)  # streams keep the texts of whole characters' tokens here

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; the model's embedding may have more rows."""
        return max(self.token_bytes, default=-1) + 1

    def token_id(self, token: str) -> int:
        """Returns the id of a token, spelt as in the vocabulary. Raises CheckpointError if there is none."""
        if (token_id := self.find_token_id(token)) is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; take all tokenizer files from one checkpoint")
        return token_id

    def encode(
        self, text: str, *, specials: bool = False, limit: int | None = None, remedy: str = SHORTEN
    ) -> list[int]:
        """Returns the ids of `text`, without `prefix_ids`.

        Added tokens written in `text`, such as <ref> or <tool_call>, are read as tokens, as the official code does with
        a rendered prompt. Those of `hidden_ids` stay ordinary text, unless `specials` is set. Raises RequestError for
        text that is not valid Unicode, that the checkpoint's tokenizer cannot read, or that is seen to have more than
        `limit` tokens before all of it is read; `remedy` says what to do then.
        """
        utf8("text", text)
        ids: list[int] = []
        for part in slices(text, self._cut):
            if limit is not None and len(ids) > limit:
                raise ContextLengthError(f"a text has more than {len(ids):,} tokens, but only {limit:,} fit; {remedy}")
            ids += self._encode_all(part) if specials else self._encode_plain(part)
        if specials or self._spelled.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._spelled.get(token_id, [token_id])]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Returns the text of `ids`; broken UTF-8 becomes U+FFFD, spaces are left as they are."""
        stream = self.stream(skip_specials=skip_specials)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_specials: bool = True, begun: bool = False) -> TextStream:
        """Starts to decode a sequence whose ids come one by one."""
        return TextStream(self, self.special_ids if skip_specials else (), begun=begun)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json, else vocab.json with merges.txt, else tokenizer.model (sentencepiece) from `folder`.

    Where tokenizer_SMILES.model and the like lie beside vocab.json, all of them are read. Tokens that
    tokenizer_config.json or added_tokens.json declare on top are added in each case. Raises CheckpointError if no such
    file is there, one is malformed, or sentencepiece is needed and not installed.
    """
    if has_segments(folder):
        return _from_segments(folder)
    if os.path.lexists(folder / "tokenizer.json"):
        return _from_library(folder, read_tokenizer_json(folder / "tokenizer.json"))
    if all(os.path.lexists(folder / name) for name in ("vocab.json", "merges.txt")):
        return _from_library(folder, read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt"))
    if os.path.lexists(folder / "tokenizer.model"):
        return _from_sentencepiece(folder)
    raise CheckpointError(
        f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or tokenizer.model; "
        "download them from the model's repository"
    )


def _from_library(folder: Path, base: tokenizers.Tokenizer) -> Tokenizer:
    path = folder / "tokenizer.json"
    byte_level = "ByteLevel" in str(base.decoder)
    if not byte_level and "ByteFallback" not in str(base.decoder):
        raise CheckpointError(
            f"{path}: expected a ByteLevel or ByteFallback decoder, got {base.decoder}; use an InternVL checkpoint"
        )
    added = read_declared_tokens(folder) | base.get_added_tokens_decoder()
    names = {token.content: token_id for token_id, token in added.items()}
    hidden = _hidden_tokens(folder, names, [])
    for token in added.values():
        if token.content in hidden and (token.lstrip or token.rstrip or token.single_word):
            raise CheckpointError(
                f"{folder}: expected {token.content} without lstrip, rstrip and single_word, which change the text "
                "beside it; set them to false"
            )
    everything = with_added(folder, base, added, hidden=())
    to_bytes = _byte_level_bytes if byte_level else piece_bytes
    spellings = base.get_vocab(with_added_tokens=False)
    token_bytes = {token_id: to_bytes(token) for token, token_id in spellings.items()}
    return Tokenizer(
        prefix_ids=read_prefix_ids(path, base),
        find_token_id=everything.token_to_id,
        _encode_plain=encoder(with_added(folder, base, added, hidden=hidden)),
        _encode_all=encoder(everything),
        _spelled=_spelled(token_bytes, [names[token] for token in hidden]),
        _cut=find_cut(base, added.values()),
        token_bytes=token_bytes | {token_id: token.content.encode() for token_id, token in added.items()},
        hidden_ids=frozenset(names[token] for token in hidden),
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        pieces=not byte_level,
    )


def _from_sentencepiece(folder: Path) -> Tokenizer:
    """Encodes text between added tokens by itself, as the slow InternLM2 and InternLM3 tokenizers do."""
    model, names = read_sentencepiece(folder / "tokenizer.model")
    bos = model.bos_id()
    own = [token_id for token_id in (model.unk_id(), bos, model.eos_id(), model.pad_id()) if token_id >= 0]
    added = {names[token_id]: token_id for token_id in own}
    declared = _read_plain_tokens(folder)
    added |= {token.content: token_id for token_id, token in declared.items()}
    hidden = _hidden_tokens(folder, added, [bos, model.eos_id()])
    pieces = {token_id: piece_bytes(name) for token_id, name in enumerate(names)}

    def find_token_id(token: str) -> int | None:
        token_id = added.get(token, model.piece_to_id(token))
        return token_id if token in added or token_id != model.unk_id() else None

    def encode(text: str) -> list[int]:
        try:
            ids: list[int] = model.encode(text)
        except RuntimeError as error:
            raise RequestError(f"the tokenizer cannot read {quoted(text)}: {error}; change it") from error
        return ids

    control = model.is_control(list(pieces))
    add_bos = bos >= 0 and read_json(folder / "tokenizer_config.json").get("add_bos_token", True)
    return Tokenizer(
        prefix_ids=(bos,) if add_bos else (),
        find_token_id=find_token_id,
        _encode_plain=_splitting({token: i for token, i in added.items() if token not in hidden}, encode),
        _encode_all=_splitting(added, encode),
        # A special token may use an unused piece of the model. Text spelt like the piece must not give it, but bytes.
        _spelled=_spelled(pieces, [added[token] for token in hidden]),
        _cut=None,
        token_bytes={i: b"" if control[i] else piece for i, piece in pieces.items()}
        | {token_id: token.encode() for token, token_id in added.items()},
        hidden_ids=frozenset(added[token] for token in hidden),
        special_ids=frozenset(own) | {token_id for token_id, token in declared.items() if token.special},
        pieces=True,
    )


def _from_segments(folder: Path) -> Tokenizer:
    """Reads an Intern-S1's tokenizer: that of Qwen3, with models for molecules and proteins behind its vocabulary."""
    base = read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
    declared = _read_plain_tokens(folder)
    added = {token.content: token_id for token_id, token in declared.items()}
    segments = read_segments(folder, base.get_vocab_size(), added)
    undeclared = {token_id for token, token_id in segments.tags.items() if token not in added}
    added |= segments.tags
    hidden = _hidden_tokens(folder, added, [])
    encode = encoder(base)
    vocabulary = {token_id: _byte_level_bytes(token) for token, token_id in base.get_vocab().items()}

    def find_token_id(token: str) -> int | None:
        return added[token] if token in added else base.token_to_id(token)

    return Tokenizer(
        prefix_ids=(),
        find_token_id=find_token_id,
        _encode_plain=segments.encoder({token: i for token, i in added.items() if token not in hidden}, encode),
        _encode_all=segments.encoder(added, encode),
        _spelled=_spelled(vocabulary, [added[token] for token in hidden]),
        _cut=None,
        token_bytes=vocabulary | segments.pieces | {token_id: token.encode() for token, token_id in added.items()},
        hidden_ids=frozenset(added[token] for token in hidden),
        special_ids=frozenset(undeclared) | {token_id for token_id, token in declared.items() if token.special},
        pieces=False,
    )


def _read_plain_tokens(folder: Path) -> dict[int, tokenizers.AddedToken]:
    """Returns the added tokens of a checkpoint whose text is cut at them here. Raises CheckpointError."""
    declared = read_declared_tokens(folder)
    for token in declared.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise CheckpointError(
                f"{folder}: expected {token.content} without lstrip, rstrip and single_word, which a checkpoint with "
                "sentencepiece models cannot have here; set them to false"
            )
    return declared


def _hidden_tokens(folder: Path, added: Mapping[str, int], ends: list[object]) -> frozenset[str]:
    """Returns the added tokens that begin or end a turn or a text, or stand for a picture: by name, by the ids `ends`,
    and by what tokenizer_config.json, special_tokens_map.json and generation_config.json declare.
    """
    files = [read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    declared = [file.get(key) for file in files for key in ("bos_token", "eos_token")]
    names = [token.get("content") if isinstance(token, dict) else token for token in declared]
    given = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = [*ends, *(given if isinstance(given, list) else [given])]
    fixed = TEMPLATE_TOKENS | HARMONY_TOKENS | _TURN_TOKENS
    return frozenset(token for token, i in added.items() if token in fixed or token in names or i in ends)


def _spelled(vocabulary: Mapping[int, bytes], hidden_ids: Collection[int]) -> dict[int, list[int]]:
    """Returns how text is written that the vocabulary itself, without added tokens, would give a hidden id."""
    byte_ids = {data: i for i, data in vocabulary.items() if len(data) == 1 and i not in hidden_ids}
    return {
        i: [byte_ids[bytes([byte])] for byte in vocabulary[i] if bytes([byte]) in byte_ids]
        for i in hidden_ids
        if i in vocabulary
    }


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


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # a character is not in the alphabet: the token stands for itself
        return token.encode()
