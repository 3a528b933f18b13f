"""One safetensors file: its header is checked in full before anything else, its tensors are read and written in parts.

Format: an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, range of bytes), then the data,
little-endian, in C order and without gaps (github.com/huggingface/safetensors). The library checks the header. The data
is read from the file, because the library either maps it, so that it counts as memory of the process and a file that
becomes shorter ends the process, or reads a whole tensor for every part of one (fact 33 in bench/FACTS.md).
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvl_rt.checkpoint.files import MAX_FILE_BYTES, open_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.errors import CheckpointError, quoted

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
_MAX_DIMENSIONS = 8
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Returns the tensors by name, in file order. Raises CheckpointError for a malformed or truncated file."""
    with open_file(file, CheckpointError) as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{file} is damaged: header too large: {length:,} bytes, expected at most {MAX_FILE_BYTES:,}; download it "
            "again"
        )
    try:
        # Checks the header's size, its JSON, each tensor's dtype, shape and range, and that the ranges fill the file.
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {quoted(str(error))}; download it again") from error
    with open_file(file, CheckpointError) as stream:
        stream.seek(8)
        header = parse_object(file, stream.read(length), CheckpointError)
    header.pop("__metadata__", None)
    entries = {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES.get(value["dtype"]), tuple(value["shape"])
        if dtype is None or len(shape) > _MAX_DIMENSIONS or not name.isprintable():
            raise CheckpointError(
                f"{file}: {quoted(name)} is described by {quoted(value)}, expected a printable name, at most "
                f"{_MAX_DIMENSIONS} dimensions and one of the dtypes {', '.join(_DTYPES)}; use another checkpoint"
            )
        entries[name] = TensorEntry(file, dtype, shape, 8 + length + value["data_offsets"][0])
    return entries


def read_tensor(entry: TensorEntry, out: Tensor, rows: slice, columns: slice) -> None:
    """Fills `out`, contiguous, in its dtype and on its device, with a part of a tensor.

    rows, columns: they count in the stored tensor as a matrix, whose columns are its last dimension.

    Nothing else of the file is read: it goes straight into `out` where nothing has to change on the way, and otherwise
    through a buffer of 16 MiB, or of one row. Raises CheckpointError if the file has become shorter.
    """
    width, itemsize = entry.shape[-1] if entry.shape else 1, entry.dtype.itemsize
    first, stop, _ = rows.indices(math.prod(entry.shape[:-1]))
    taken = range(width)[columns]
    assert out.is_contiguous(), entry
    assert out.numel() == (stop - first) * len(taken), entry
    if out.numel() == 0:
        return
    out = out.view(stop - first, len(taken))
    straight = out.device.type == "cpu" and out.dtype == entry.dtype
    size = len(out) if straight else min(len(out), max(1, _CHUNK_BYTES // (len(taken) * itemsize)))
    buffer = out if straight else torch.empty((size, len(taken)), dtype=entry.dtype)
    with open_file(entry.file, CheckpointError) as file:
        for start in range(0, len(out), size):
            part = out[start : start + size]
            memory = _bytes_of(part if straight else buffer[: len(part)])
            offset = entry.offset_bytes + ((first + start) * width + taken.start) * itemsize
            stretch = len(memory) if len(taken) == width else len(taken) * itemsize  # bytes that lie together
            for row, begin in enumerate(range(0, len(memory), stretch)):
                _read_at(entry, file, offset + row * width * itemsize, memory[begin : begin + stretch])
            if not straight:
                part.copy_(buffer[: len(part)])


def read_chunks(entry: TensorEntry) -> Iterator[bytearray]:
    """Yields a tensor's bytes, in order, in pieces of at most 16 MiB. Raises CheckpointError as `read_tensor` does."""
    with open_file(entry.file, CheckpointError) as file:
        for done in range(0, entry.num_bytes, _CHUNK_BYTES):
            chunk = bytearray(min(_CHUNK_BYTES, entry.num_bytes - done))
            _read_at(entry, file, entry.offset_bytes + done, memoryview(chunk))
            yield chunk


def _read_at(entry: TensorEntry, file: io.BufferedReader, offset: int, memory: memoryview) -> None:
    """Fills the memory with the bytes of the file that begin at `offset`, and reads no others."""
    file.raw.seek(offset, os.SEEK_SET)
    while memory:
        count = file.raw.readinto(memory)
        if not count:
            raise CheckpointError(f"{entry.file} became shorter while it was read; download it again")
        memory = memory[count:]


def write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    dtypes: torch.dtype | Mapping[str, torch.dtype],
) -> None:
    """Writes tensors of one dtype, or of one each; `make(name)` is called once for each, in order, and dropped.

    The library would need all tensors in memory at once.
    """
    names = {known: name for name, known in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(_bytes_of(make(name)))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
