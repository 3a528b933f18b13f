"""One safetensors file: its header checked in full before anything else, its tensors read and written one at a time.

Format: an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, range of bytes), then the data,
little-endian, in C order and without gaps (github.com/huggingface/safetensors). Files are read, not mapped: mapped
pages would count as memory of the process.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors by name, in the order in which they lie. Raises CheckpointError for a malformed or truncated file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(file, f"its header should take {length:,} bytes of a file of {size:,}")
        header = parse_object(file, stream.read(length))
    header.pop("__metadata__", None)
    parsed = [(name, _parse_entry(file, name, value, 8 + length)) for name, value in header.items()]
    entries = dict(sorted(parsed, key=lambda item: (item[1].offset_bytes, item[1].num_bytes)))
    end = 8 + length
    for name, entry in entries.items():
        if entry.offset_bytes != end:
            raise _damaged(file, f"{name!r} starts at byte {entry.offset_bytes:,}, but its predecessor ends at {end:,}")
        end += entry.num_bytes
    if end != size:
        raise _damaged(file, f"it is {'truncated' if size < end else 'too long'}: {size:,} bytes instead of {end:,}")
    return entries


def _parse_entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            name.isprintable()
            and dtype in _DTYPES
            and len(shape) <= _MAX_DIMENSIONS
            and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        ):
            entry = TensorEntry(file, _DTYPES[dtype], tuple(shape), data_start + begin)
            if entry.num_bytes == end - begin:
                return entry
    raise _damaged(file, f"{name!r} is described by {reprlib.repr(value)}")


def parse_object(file: Path, text: bytes) -> dict[str, Any]:
    """The JSON object `text` of `file`. Raises CheckpointError if it is none, or a name is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} is there twice")
            values[name] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its JSON is malformed: {error}") from error
    if not isinstance(values, dict):
        raise _damaged(file, "its JSON is not an object")
    return values


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {problem}; download it again")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(entry: TensorEntry, out: Tensor, start: int = 0) -> None:
    """Fills `out`, a contiguous CPU tensor of the entry's dtype, with the elements from `start` on."""
    view, done = _bytes_of(out), 0
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset_bytes + start * entry.dtype.itemsize)
        while done < len(view):
            if not (count := file.readinto(view[done:])):
                raise CheckpointError(f"{entry.file} became shorter while it was read; download it again")
            done += count


def write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Writes tensors of one dtype; `make(name)` is called once for each, in order, and its result dropped."""
    dtype_name = next(name for name, known in _DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(_bytes_of(make(name)))
