"""The tensors of a checkpoint folder, read and written one at a time.

Nothing in a folder is trusted: every file's header is checked in full before any tensor is read, nothing is unpickled,
and no code that lies beside the weights is looked at.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internvl_rt.checkpoint import torch_file
from internvl_rt.checkpoint.files import read_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.checkpoint.tensor_file import TensorEntry, read_chunks, read_header, read_tensor, write_file
from internvl_rt.errors import CheckpointError, quoted

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ReadHeader = Callable[[Path], dict[str, TensorEntry]]
_READERS: dict[str, _ReadHeader] = {_SINGLE: read_header, "pytorch_model.bin": torch_file.read_header}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder by name, described by checked headers; their data is read when asked for."""

    folder: Path
    entries: Mapping[str, TensorEntry]

    def read_into(self, name: str, out: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Reads a tensor, by default all of it, as `read_tensor` does."""
        read_tensor(self.entries[name], out, rows, columns)

    def same_bytes(self, name: str, other: str) -> bool:
        """Returns whether two tensors are equal bit for bit; compares them in small chunks."""
        one, two = self.entries[name], self.entries[other]
        same_kind = (one.dtype, one.shape) == (two.dtype, two.shape)
        return same_kind and all(a == b for a, b in zip(read_chunks(one), read_chunks(two), strict=True))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks the headers of model.safetensors, or of all shards in model.safetensors.index.json.

    In a folder with neither, those of pytorch_model.bin, or of the shards in pytorch_model.bin.index.json. Raises
    CheckpointError for missing, truncated, inconsistent or malformed files, before any tensor is read.
    """
    for single, read in _READERS.items():
        if os.path.lexists(folder / single):
            return Checkpoint(folder, read(folder / single))
        if os.path.lexists(index := folder / f"{single}.index.json"):
            return Checkpoint(folder, _read_shards(folder, index, read, Path(single).suffix))
    others = sorted(
        file.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)
    )
    found = f", but {some_of(others)}" if others else ""
    names = [f"{single}{ending}" for single in _READERS for ending in ("", ".index.json")]
    raise CheckpointError(f"{folder} holds none of {', '.join(names)}{found}; download it again")


def _read_shards(folder: Path, index: Path, read: _ReadHeader, suffix: str) -> dict[str, TensorEntry]:
    weight_map = parse_object(index, read_file(index, CheckpointError), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and shard == Path(shard).name and shard.endswith(suffix) for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to {suffix} files; download it again")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not os.path.lexists(folder / shard)]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} files are missing: {some_of(missing)}; download them"
        )

    def misfit(name: str, found: str, remedy: str) -> CheckpointError:
        wanted = weight_map.get(name, "none of them")
        problem = f"{quoted(name)} should be in {wanted} but is in {found}"
        return CheckpointError(f"{index} does not fit its files: {problem}; download both again, or {remedy}")

    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        header = read(folder / shard)
        if twice := sorted(header.keys() & entries.keys()):
            raise CheckpointError(
                f"{folder}: {quoted(twice[0])} is in both {entries[twice[0]].file.name} and {shard}; download both "
                "again"
            )
        if extra := sorted(header.keys() - weight_map.keys()):  # told at once, so that the index bounds what is kept
            raise misfit(extra[0], shard, "add it to the weight_map if the tensor was added on purpose")
        entries |= header
    for name, shard in weight_map.items():
        if name not in entries:
            raise misfit(name, "none of them", "delete that line of the weight_map if it was removed on purpose")
        if (found := entries[name].file.name) != shard:
            raise misfit(name, found, "correct that line of the weight_map if the tensor was moved on purpose")
    return entries


def some_of(names: list[str]) -> str:
    """Joins the first few of names, each shortened: a tensor may have a name of any length."""
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:5]]
    return ", ".join(shown) + (", ..." if len(names) > 5 else "")


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes model.safetensors, or shards with an index where it would exceed `max_shard_bytes`.

    `make(name)` is called once for each tensor, in order, and its result dropped before the next one.
    """
    num_bytes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in num_bytes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        write_file(folder / _SINGLE, shapes, make, dtype)
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, {name: shapes[name] for name in shard}, make, dtype)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
