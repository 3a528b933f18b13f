"""Checkpoint folders: found on disk or on the hub, their tensors read and written one at a time.

Nothing in a folder is trusted: every file's header is checked in full before any tensor is read, no other weights than
safetensors are read, and no code that lies beside them is looked at.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import KNOWN_MODELS, ModelConfig, load_config
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.checkpoint.tensor_file import TensorEntry, read_chunks, read_header, read_tensor, write_file
from internvl_rt.errors import CheckpointError, quoted

_TINY = Path(__file__).parents[1] / "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIG_FILES = ("*config.json", "chat_template.*")
_ALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Finds the folder of `model`: "tiny" (in the package), a path, or a hub id such as OpenGVLab/InternVL3-1B.

    What exists on disk never touches the network; hub ids are downloaded to the cache of `huggingface_hub`, which shows
    its progress and respects HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Raises CheckpointError.
    """
    folder = _resolve(model, revision, _ALL_FILES)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected the folder of a checkpoint; give the folder that holds it")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; give the folder of an InternVL checkpoint")
    return folder


def find_config(model: str | Path) -> tuple[ModelConfig, str]:
    """Returns a model's configuration and name.

    model: what `resolve_model` takes, the path of a config.json, or one of `KNOWN_MODELS`. Of a hub id only the
    configuration is downloaded. Raises CheckpointError or ConfigError.
    """
    if str(model) in KNOWN_MODELS and not os.path.exists(model):
        return load_config(KNOWN_MODELS[str(model)]), str(model)
    path = _resolve(model, None, _CONFIG_FILES)
    on_disk = os.path.isdir(os.path.expanduser(model))
    return load_config(path), path.resolve().name if on_disk else str(model)


def find_config_file(model: str | Path, *, revision: str | None = None) -> Path:
    """Returns the path of a model's config.json, given as for `find_config`. Raises CheckpointError."""
    if revision is None and str(model) in KNOWN_MODELS and not os.path.exists(model):
        return KNOWN_MODELS[str(model)]
    path = _resolve(model, revision, _CONFIG_FILES)
    return path / "config.json" if path.is_dir() else path


def _resolve(model: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Path:
    if model == "tiny":
        return _TINY
    path = os.path.expanduser(model)
    if os.path.exists(path):
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given, but {path} is on disk; leave it out")
        return Path(path)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        close = difflib.get_close_matches(str(model), KNOWN_MODELS, 1) or ["InternVL3-1B"]
        hub_id = f"OpenGVLab/{close[0]}"
        raise CheckpointError(
            f"{quoted(str(model))}: no such folder; give an existing one, 'tiny', or a hub id such as {hub_id}"
        )
    return _download(model, revision, patterns)


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors as hub  # here, because it is slow to import and folders on disk do without it
    from huggingface_hub import snapshot_download

    name = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except hub.HFValidationError:
        problem = f"{name} is neither a folder nor a hub id; an id looks like OpenGVLab/InternVL3-1B"
    except hub.GatedRepoError:
        problem = f"{name} is gated; accept its terms on its page on the hub, then set HF_TOKEN or run: hf auth login"
    except hub.RevisionNotFoundError:
        problem = f"{name} is not on the hub; leave the revision out, or give a branch, tag or commit of the model"
    except hub.RepositoryNotFoundError:
        problem = f"{name} is not on the hub, or private; check the spelling, or set HF_TOKEN or run: hf auth login"
    except hub.LocalEntryNotFoundError:
        problem = (
            f"{name} is not in the cache, or only in part, and the hub cannot be reached; check the network, unset "
            "HF_HUB_OFFLINE if it is set, or give a folder on disk"
        )
    # HTTPError is that of the HTTP library which huggingface_hub uses; hf_xet raises RuntimeError.
    except (hub.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"{name} could not be downloaded: {reason}; run again to go on where it stopped"
    raise CheckpointError(problem)


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

    Raises CheckpointError for missing, truncated, inconsistent or malformed files, before any tensor is read.
    """
    if (folder / _SINGLE).is_file():
        return Checkpoint(folder, read_header(folder / _SINGLE))
    if (folder / _INDEX).is_file():
        return Checkpoint(folder, _read_shards(folder, folder / _INDEX))
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    found = f"; {', '.join(others)} cannot be read safely, convert to safetensors" if others else "; download it again"
    raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}{found}")


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = parse_object(index, index.read_bytes(), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors")
        for shard in weight_map.values()
    ):
        raise CheckpointError(
            f"{index}: expected a weight_map of tensor names to .safetensors files; download it again"
        )
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} files are missing: {', '.join(missing)}; download them"
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        header = read_header(folder / shard)
        if twice := sorted(header.keys() & entries.keys()):
            raise CheckpointError(
                f"{folder}: {twice[0]!r} is in both {entries[twice[0]].file.name} and {shard}; download both again"
            )
        entries |= header
    where = {name: entry.file.name for name, entry in entries.items()}
    if wrong := sorted(name for name, _ in where.items() ^ weight_map.items()):
        wanted, found = (names.get(wrong[0], "none of them") for names in (weight_map, where))
        raise CheckpointError(
            f"{index} does not fit its files: {wrong[0]!r} should be in {wanted} but is in {found}; download all again"
        )
    return entries


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
