"""Random weights of any model's real shape, for benchmarks and tests: as a checkpoint, or straight into memory."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.find import read_original
from internvl_rt.checkpoint.folder import write_tensors
from internvl_rt.checkpoint.quantization import Quantization
from internvl_rt.checkpoint.template import CHATML, TEMPLATES
from internvl_rt.errors import CheckpointError, ConfigError
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import ModelWeights, build_weights, fill_weights, named_parameters
from internvl_rt.model.linear import AnyLinear, Linear
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.placement import plan_tensors
from internvl_rt.model.shard import WHOLE, Shard, cut_of
from internvl_rt.model.stored_linear import FLOATS, cast_linear
from internvl_rt.model.weights import agreement, find_schemes, shape_weights

_OFFICIAL = {"internvl2_5": 151643, "internvl3_5_gpt_oss": 199998}  # the id of the first added token
_QWEN_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
_QWEN_PLAIN = [
    *("<tool_call>", "</tool_call>"),
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
]
_GPT_OSS_SPECIAL = [
    *("<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>"),
    *("<|constrain|>", "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
    *(f"<|reserved_{number}|>" for number in (200009, 200010, 200011)),
    *("<|call|>", *(f"<|reserved_{number}|>" for number in range(200013, 200018)), "<|endofprompt|>"),
]
_INTERNVL = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def write_random_checkpoint(
    model: str | Path | Mapping[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes a checkpoint folder in the original format, complete or not at all, taking the memory of one tensor.

    model: one of `KNOWN_MODELS`, the path of a config.json or its folder, or the content of a config.json.
    seed: with its name it decides what a tensor holds. Matrices and biases are normal with deviation 0.02, norms 1,
        LayerScale uniform in 0.1 ... 1, so that logits are finite at any size.

    The tokenizer is a byte-level BPE without merges: 256 bytes, unused entries, and the official added tokens at their
    ids 151643 ... 151673 (with a language model of GPT-OSS its own, at 199998 ... 200027), or at the end of a smaller
    vocabulary. An InternLM2-layout model (the 9B) gets the same files, although its own tokenizer is a sentencepiece
    one.

    Raises CheckpointError if `folder` is there and not empty, or the disk too small; ConfigError for an unsupported
    model.
    """
    assert dtype in FLOATS, dtype
    top, config = read_original(model)
    decoder_class = top.values["llm_config"]["architectures"][0]
    dialect = DIALECTS["internlm2" if decoder_class == "InternLM2ForCausalLM" else "original"]
    if decoder_class == "GptOssForCausalLM":
        dialect = replace(dialect, experts="gpt_oss")
    plan = plan_tensors(config, dialect)

    def make(name: str) -> Tensor:
        return _fill(torch.empty(plan[name].shape, dtype=dtype), plan[name].placements[0].parameter, f"{seed} {name}")

    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already and is not an empty folder; give a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(math.prod(planned.shape) for planned in plan.values()) * dtype.itemsize
    if (free := shutil.disk_usage(folder.parent).free) < num_bytes * 1.01:
        raise CheckpointError(f"{folder.parent} has {free:,} bytes free, but the weights take {num_bytes:,}; make room")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        _write_json(unfinished / "config.json", {**top.values, "torch_dtype": str(dtype).removeprefix("torch.")})
        write_random_tokenizer(unfinished, config)
        shapes = {name: planned.shape for name, planned in plan.items()}
        write_tensors(unfinished, shapes, make, dtype=dtype, max_shard_bytes=max_shard_bytes)
        unfinished.replace(folder)


def random_weights(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    ops: Ops = TORCH,
    quantization: Quantization | None = None,
    shard: Shard = WHOLE,
) -> ModelWeights:
    """Makes random weights on `device`, without a file or a copy, distributed as `write_random_checkpoint` says.

    quantization: one of `cast`. What a parameter holds depends on `seed`, its path, the dtype and the kind of device.
    shard: the part that is kept; each parameter that is cut is whole for a moment, so that its numbers are the same
    """
    whole_shapes = named_parameters(build_weights(config, dtype=dtype, device="meta"))

    def fill(path: str, parameter: Tensor) -> None:
        shard.check()
        cut = cut_of(path, config.decoder, shard)
        whole = parameter if cut is None else torch.empty_like(whole_shapes[path], device=device)
        _fill(whole, path, f"{seed} {path}")
        if cut is not None:
            torch.cat([whole[rows][..., cut.columns] for rows in cut.rows], out=parameter)

    def make(path: str, _: AnyLinear, fill_dense: Callable[[], Linear]) -> AnyLinear:
        return cast_linear(fill_dense(), schemes[path], agreement(path, config, shard))

    schemes = find_schemes(config, quantization)
    shapes = shape_weights(config, dtype, schemes, shard)
    return fill_weights(shapes, fill, ops, device=device, make=make, shard=shard)


def _fill(tensor: Tensor, parameter: str, key: str) -> Tensor:
    """Fills the memory of a parameter, or of some of its rows, with numbers that depend on `key`."""
    digest = blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest, "little"))
    match parameter.rpartition(".")[2]:
        case "weight_D":  # of a norm
            return tensor.fill_(1)
        case "scale1_E" | "scale2_E":
            return tensor.uniform_(0.1, 1, generator=generator)
        case _:
            return tensor.normal_(0, 0.02, generator=generator)


def write_random_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Writes the tokenizer of `write_random_checkpoint`. Raises ConfigError."""
    template, vocab_size = TEMPLATES[config.template], config.decoder.vocab_size
    own, plain = (_QWEN_SPECIAL, _QWEN_PLAIN) if template is CHATML else (_GPT_OSS_SPECIAL, [])
    added, stop = own + plain + _INTERNVL, template.stop.token
    first = min(_OFFICIAL[template.name], vocab_size - len(added))
    if first < 256:
        raise ConfigError(
            f"config.json: llm_config.vocab_size is {vocab_size}, expected at least {256 + len(added)}: 256 bytes and "
            "the added tokens; raise it"
        )
    printable = [chr(byte) for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    alphabet = printable + [chr(256 + number) for number in range(256 - len(printable))]  # as GPT-2 spells the bytes
    vocab = [*alphabet, *(f"<|unused_{number}|>" for number in range(256, first))]
    ids = {token: first + number for number, token in enumerate(added)}
    special = [token for token in added if token not in plain]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocab)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(folder / "added_tokens.json", ids)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(number): {"content": token, **flags, "special": token in special} for token, number in ids.items()
            },
            "bos_token": None,
            "eos_token": stop,
            "model_max_length": 12288,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": special[1:], "eos_token": stop, "pad_token": "<|endoftext|>"},
    )
    _write_json(folder / "generation_config.json", {"_from_model_config": True, "transformers_version": "4.37.2"})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
