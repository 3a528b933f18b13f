"""Finds a model by its name, on disk or on the hub. It imports no torch, so a wrong name is told at once."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.config import KNOWN_MODELS, ModelConfig, load_config, parse_config
from internvl_rt.checkpoint.json_section import Section, read_json
from internvl_rt.errors import CheckpointError, ConfigError, quoted

MERGE_LORA = (
    "merge it into its base model first (merge_and_unload of PEFT and then save_pretrained, or tools/merge_lora.py of "
    "the official repository), and give the merged model's folder"
)
RANDOM_PREFIX = "random:"  # starts a model's name where the engine is to make the weights itself
_TINY = Path(__file__).parents[1] / "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIG_FILES = ("*config.json", "chat_template.*")
_PROMPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # all that prompts depend on
_ALL_FILES = (*_PROMPT_FILES, "*.safetensors")
_TORCH_FILES = ("pytorch_model*.bin",)  # the weights of a repository that has no safetensors


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Finds the folder of `model`: "tiny" (in the package), a path, or a hub id such as OpenGVLab/InternVL3-1B.

    What exists on disk never touches the network; hub ids are downloaded to the cache of `huggingface_hub`, which shows
    its progress and respects HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Raises CheckpointError.
    """
    folder = _resolve(model, revision, _ALL_FILES)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected the folder of a checkpoint; give the folder that holds it")
    if os.path.isfile(folder / "config.json"):
        return folder
    if os.path.isfile(folder / "adapter_config.json"):
        raise CheckpointError(f"{folder} holds a LoRA adapter and no model; {MERGE_LORA}")
    raise CheckpointError(f"{folder} holds no config.json; give the folder of an InternVL checkpoint")


def resolve_without_weights(model: str | Path, *, revision: str | None = None) -> Path:
    """Finds a folder with a model's configuration and tokenizer. Of a hub id no weights are downloaded."""
    return _resolve(model, revision, _PROMPT_FILES)


def find_model(model: str) -> str | Path:
    """Returns what an engine loads: a model's folder, or a name of random weights. Raises as `find_config` does."""
    if is_random(model):
        find_config(model)
        return model
    return resolve_model(model)


def find_config(model: str | Path) -> tuple[ModelConfig, str]:
    """Returns a model's configuration and name.

    model: what `resolve_model` takes, the path of a config.json, one of `KNOWN_MODELS`, or `random:` before what
    `read_original` takes. Of a hub id only the configuration is downloaded. Raises CheckpointError or ConfigError.
    """
    if is_random(model):
        return random_config(str(model).removeprefix(RANDOM_PREFIX)), str(model)
    file = find_config_file(model)
    on_disk = os.path.isdir(os.path.expanduser(model))
    name = file.parent.resolve().name if on_disk else str(model)
    return load_config(file), name if name.isprintable() else quoted(name)


def find_config_file(model: str | Path, *, revision: str | None = None) -> Path:
    """Returns the path of a model's config.json, given as for `find_config`. Raises CheckpointError."""
    if revision is None and str(model) in KNOWN_MODELS and not os.path.exists(model):
        return KNOWN_MODELS[str(model)]
    path = _resolve(model, revision, _CONFIG_FILES)
    return path / "config.json" if path.is_dir() else path


def is_random(model: str | Path) -> bool:
    return isinstance(model, str) and model.startswith(RANDOM_PREFIX)


def random_config(model: str | Path) -> ModelConfig:
    """Returns the configuration of one of `KNOWN_MODELS`, a config.json or its folder. Raises ConfigError."""
    return read_original(model)[1]


def read_original(model: str | Path | Mapping[str, Any]) -> tuple[Section, ModelConfig]:
    """Returns a configuration of the original format, as it stands in its file and as it is read.

    model: one of `KNOWN_MODELS`, the path of a config.json or its folder, or the content of a config.json. Raises
    ConfigError.
    """
    if isinstance(model, Mapping):
        top = Section(Path("config.json"), "", model)
    else:
        path = KNOWN_MODELS.get(str(model), Path(model))
        if not os.path.exists(path):
            known = ", ".join(KNOWN_MODELS)
            raise ConfigError(f"{str(model)[:200]}: no such file, and none of the known models {known}; give either")
        top = read_json(path / "config.json" if path.is_dir() else path)
    config = parse_config(top)
    if config.format != "original":
        raise ConfigError(f"{top.file} is of the -hf format, expected the original one; give an original config.json")
    return top, config


def _resolve(model: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Path:
    if not isinstance(model, str | Path) or not isinstance(revision, str | None):
        raise CheckpointError(
            f"model and revision: expected a path or a hub id, and a text or None, got {quoted(model)} and "
            f"{quoted(revision)}; correct them"
        )
    if model == "tiny":
        return _TINY
    path = os.path.expanduser(model)
    if os.path.exists(path):
        if revision is not None:
            raise CheckpointError(f"revision {quoted(revision)} was given, but {path} is on disk; leave it out")
        return Path(path)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        close = difflib.get_close_matches(str(model)[:100], KNOWN_MODELS, 1) or ["InternVL3-1B"]
        hub_id = f"OpenGVLab/{close[0]}"
        raise CheckpointError(
            f"{quoted(str(model))}: no such folder; give an existing one, 'tiny', or a hub id such as {hub_id}"
        )
    folder = _download(model, revision, patterns)
    if patterns is _ALL_FILES and not any(folder.glob("*.safetensors")):
        folder = _download(model, revision, _TORCH_FILES)
    return folder


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
