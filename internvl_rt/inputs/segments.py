"""The parts of Intern-S1's tokenizer beside its byte-level BPE: three sentencepiece models, for molecules and proteins.

Behind <SMILES> or <SELFIES> text is encoded by the first model, behind <IUPAC> by the second, up to the tag's end;
outside of tags what `molecules` finds is encoded by the first or the third one. Behind <MOLFORMULA> nothing is looked
for. What a model has no piece for is encoded as other text. Source: the tokenizer's code in internlm/Intern-S1.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_rt.errors import CheckpointError
from internvl_rt.inputs.molecules import split_molecules
from internvl_rt.inputs.tokenizer_files import piece_bytes, read_sentencepiece

Encode = Callable[[str], list[int]]

_NUM_BETWEEN = 26  # ids between the vocabulary and the first model's pieces, which are those of Qwen3's added tokens
_TAGS = {"SMILES": ("SMILES", "SELFIES"), "IUPAC": ("IUPAC",), "FASTA": ()}  # of each model, in the order of ids
# These switch between models too, but give no token.
_SILENT = {"SMILES": "SMILES_AUTO_DETECT", "FASTA": "FASTA_AUTO_DETECT"}
_GUARDED = "MOLFORMULA"


@dataclass(frozen=True, slots=True)
class Segments:
    models: Mapping[str, Any]
    starts: Mapping[str, int]  # the id of each model's first piece
    pieces: dict[int, bytes]  # of all models, by id; those that give no text have none
    tags: Mapping[str, int]  # the tokens that begin and end a segment

    def encoder(self, added: Mapping[str, int], base: Encode) -> Encode:
        """Returns a function from text to ids, which reads the `added` tokens in the text, tags among them.

        base: encodes text without added tokens and segments.
        """
        begins = {f"<{tag}>": model for model, tags in _TAGS.items() for tag in tags}
        opens = begins | {f"<{tag}>": model for model, tag in _SILENT.items()}
        closes = {f"</{mark[1:]}" for mark in opens}
        guards = {f"<{_GUARDED}>": 1, f"</{_GUARDED}>": -1}
        # How many more tags are open behind a mark, of those in which nothing is looked for.
        steps = {**guards, **dict.fromkeys(begins, 1), **{f"</{mark[1:]}": -1 for mark in begins}}
        marks = sorted({*added, *opens, *closes, *guards}, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, marks)) + ")")

        def encode(text: str) -> list[int]:
            ids: list[int] = []
            open_models: list[str] = []
            depth = 0
            for number, part in enumerate(pattern.split(unicodedata.normalize("NFC", text))):
                if number % 2 == 0:  # text, mark, text, ..., text
                    inner = open_models[-1] if open_models else None
                    for piece, kind in [(part, None)] if depth else split_molecules(part):
                        ids += self._encode(kind or inner, piece, base)
                    continue
                if part in guards:
                    ids += base(part)
                elif part in added:
                    ids.append(added[part])
                if part in opens:
                    open_models.append(opens[part])
                elif part in closes:
                    del open_models[-1:]
                depth = max(0, depth + steps.get(part, 0))
            return ids

        return encode

    def _encode(self, name: str | None, text: str, base: Encode) -> list[int]:
        if name is None:
            return base(text.replace("▁", " "))  # sentencepiece's space, which the official tokenizer never keeps
        model, start, ids = self.models[name], self.starts[name], list[int]()
        unknown = model.unk_id()
        for piece_id, piece in zip(model.encode(text), model.encode(text, out_type=str), strict=True):
            ids += base(piece.replace("▁", " ")) if piece_id == unknown else [start + piece_id]
        return ids


def has_segments(folder: Path) -> bool:
    """Says whether a folder holds any of the models."""
    return any(os.path.lexists(_file(folder, name)) for name in _TAGS)


def read_segments(folder: Path, vocab_size: int, declared: Mapping[str, int]) -> Segments:
    """Reads the models. Their pieces and tags have the ids behind the vocabulary's, one model after the other.

    declared: the added tokens of tokenizer_config.json. Raises CheckpointError for a missing or malformed file, if
    sentencepiece is not installed, or if declared ids are not where the models leave them.
    """
    models: dict[str, Any] = {}
    starts: dict[str, int] = {}
    pieces: dict[int, bytes] = {}
    tags: dict[str, int] = {}
    next_id = vocab_size + _NUM_BETWEEN
    for name, own_tags in _TAGS.items():
        models[name], names = read_sentencepiece(_file(folder, name))
        starts[name] = next_id
        silent = models[name].is_control(list(range(len(names))))
        unknown = models[name].unk_id()
        pieces |= {
            next_id + index: b"" if silent[index] or index == unknown else piece_bytes(piece)
            for index, piece in enumerate(names)
        }
        next_id += len(names)
        marks = [mark for tag in own_tags for mark in (f"<{tag}>", f"</{tag}>")]
        tags |= {mark: next_id + index for index, mark in enumerate(marks)}
        next_id += len(marks)
    _check_ids(folder, declared, pieces, tags)
    return Segments(models, starts, pieces, tags)


def _check_ids(folder: Path, declared: Mapping[str, int], pieces: Iterable[int], tags: Mapping[str, int]) -> None:
    taken = set(pieces)
    for token, token_id in declared.items():
        if token_id in taken or tags.get(token, token_id) != token_id:
            raise CheckpointError(
                f"{folder}: token {token!r} is declared as {token_id}, but the tokenizer_*.model files have "
                f"{tags.get(token, 'a piece there')}; take all tokenizer files from one checkpoint"
            )


def _file(folder: Path, name: str) -> Path:
    return folder / f"tokenizer_{name}.model"
