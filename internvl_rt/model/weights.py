"""Checkpoint tensors to parameters: one table of names for each dialect, read in both directions.

`plan_placements` spells a dialect out for a configuration, as tensor name -> rows of a parameter. It cuts every
parameter into rows without overlap or gap, so weights are complete exactly if every planned tensor is there. Loading
copies along the plan, saving goes the other way.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.folder import Checkpoint, write_tensors
from internvl_rt.errors import CheckpointError
from internvl_rt.model.internvl import ModelWeights, build_weights, named_parameters

# `#` is the layer's number; `{a,b}` are several tensors that fill the parameter's rows in this order.
# fmt: off
_VISION = (  # parameters      original name                   -hf name
    ("class_E",                "embeddings.class_embedding",   "embeddings.cls_token"),
    ("position_UE",            "embeddings.position_embedding", "embeddings.position_embeddings"),
    ("patch",                  "embeddings.patch_embedding",   "embeddings.patch_embeddings.projection"),
    ("layers.#.norm1",         "encoder.layers.#.norm1",       "encoder.layer.#.layernorm_before"),
    ("layers.#.qkv",           "encoder.layers.#.attn.qkv",    "encoder.layer.#.attention.{q,k,v}_proj"),
    ("layers.#.q_norm",        "encoder.layers.#.attn.q_norm", "encoder.layer.#.attention.q_norm"),
    ("layers.#.k_norm",        "encoder.layers.#.attn.k_norm", "encoder.layer.#.attention.k_norm"),
    ("layers.#.proj",          "encoder.layers.#.attn.proj",   "encoder.layer.#.attention.projection_layer"),
    ("layers.#.scale1_E",      "encoder.layers.#.ls1",         "encoder.layer.#.lambda_1"),
    ("layers.#.norm2",         "encoder.layers.#.norm2",       "encoder.layer.#.layernorm_after"),
    ("layers.#.fc1",           "encoder.layers.#.mlp.fc1",     "encoder.layer.#.mlp.fc1"),
    ("layers.#.fc2",           "encoder.layers.#.mlp.fc2",     "encoder.layer.#.mlp.fc2"),
    ("layers.#.scale2_E",      "encoder.layers.#.ls2",         "encoder.layer.#.lambda_2"),
)
_PROJECTOR = (
    ("norm", "mlp1.0", "layer_norm"),
    ("fc1",  "mlp1.1", "linear_1"),
    ("fc2",  "mlp1.3", "linear_2"),
)
_DECODER = (  # parameters     Qwen2, Qwen3, Llama                 InternLM2
    ("embedding_VD",           "embed_tokens.weight",              "tok_embeddings.weight"),
    ("layers.#.norm1",         "layers.#.input_layernorm",         "layers.#.attention_norm"),
    ("layers.#.qkv",           "layers.#.self_attn.{q,k,v}_proj",  "layers.#.attention.wqkv"),
    ("layers.#.q_norm",        "layers.#.self_attn.q_norm",        ""),
    ("layers.#.k_norm",        "layers.#.self_attn.k_norm",        ""),
    ("layers.#.o",             "layers.#.self_attn.o_proj",        "layers.#.attention.wo"),
    ("layers.#.norm2",         "layers.#.post_attention_layernorm", "layers.#.ffn_norm"),
    ("layers.#.gate_up",       "layers.#.mlp.{gate,up}_proj",      "layers.#.feed_forward.{w1,w3}"),
    ("layers.#.down",          "layers.#.mlp.down_proj",           "layers.#.feed_forward.w2"),
    ("norm",                   "norm",                             "norm"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Dialect:
    """A naming of the tensors: columns of the tables, and what stands before the names."""

    vision_prefix: str
    vision_column: int
    projector_prefix: str
    decoder_prefix: str
    decoder_column: int
    lm_head: str

    def table(self) -> dict[str, str]:
        rows = [(f"vision.{row[0]}", self.vision_prefix + row[self.vision_column]) for row in _VISION]
        rows += [(f"projector.{row[0]}", self.projector_prefix + row[self.vision_column]) for row in _PROJECTOR]
        rows += [(f"decoder.{row[0]}", self.decoder_prefix + row[self.decoder_column]) for row in _DECODER]
        return {**dict(rows), "decoder.lm_head": self.lm_head}


DIALECTS: Mapping[str, Dialect] = {
    "original": Dialect("vision_model.", 1, "", "language_model.model.", 1, "language_model.lm_head"),
    "internlm2": Dialect("vision_model.", 1, "", "language_model.model.", 2, "language_model.output"),
    # Two ways in which transformers names the same: in the files on the hub, and in memory and some newer files.
    "hf": Dialect("vision_tower.", 2, "multi_modal_projector.", "language_model.model.", 1, "language_model.lm_head"),
    "hf-nested": Dialect(
        "model.vision_tower.", 2, "model.multi_modal_projector.", "model.language_model.", 1, "lm_head"
    ),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_PARAMETER = re.compile(r"(?P<module>.+?)(\.(?P<kind>weight|bias)_[A-Z]+)?")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
# Buffers that some versions of transformers wrote, and a training-time token that the class declares but does not use.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.mask_token)")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor of a checkpoint belongs: rows [start, stop) of a parameter, whatever the tensor's own shape."""

    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]  # in the file
    # (key/value heads, channels) of a merged wqkv, whose rows go by key/value head: its query heads, its key, its value
    grouped: tuple[int, int] | None = None


def plan_placements(config: ModelConfig, dialect: Dialect) -> dict[str, Placement]:
    """Every tensor that a checkpoint in this dialect must hold, and its place."""
    v, d, table = config.vision, config.decoder, dialect.table()
    parameters = named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta"))
    shapes_in_file = {
        "vision.class_E": (1, 1, v.hidden_size),
        "vision.position_UE": (1, 1 + v.num_patches, v.hidden_size),
        "vision.patch.weight_NK": (v.hidden_size, 3, v.patch_size, v.patch_size),
    }
    plan = {}
    for path, parameter in parameters.items():
        match = _PARAMETER.fullmatch(path)
        assert match, path
        layer = _LAYER.search(path)
        pattern = table[_LAYER.sub("#", match["module"])].replace("#", layer[0] if layer else "#")
        suffix = f".{match['kind']}" if match["kind"] else ""
        names = [name + suffix for name in _expand(pattern)]
        num_rows = parameter.shape[0]
        kv_rows = v.hidden_size if path.startswith("vision.") else d.num_kv_heads * d.head_dim
        sizes = [num_rows - 2 * kv_rows, kv_rows, kv_rows] if len(names) == 3 else [num_rows // len(names)] * len(names)
        grouped = (d.num_kv_heads, d.head_dim) if pattern.endswith(".wqkv") else None
        start = 0
        for name, size in zip(names, sizes, strict=True):
            shape = shapes_in_file.get(path, (size, *parameter.shape[1:]))
            plan[name] = Placement(path, start, start + size, shape, grouped)
            start += size
    return plan


def _expand(pattern: str) -> list[str]:
    """["a.x_b", "a.y_b"] of "a.{x,y}_b"."""
    before, brace, rest = pattern.partition("{")
    inside, _, after = rest.partition("}")
    return [before + part + after for part in inside.split(",")] if brace else [pattern]


def load_weights(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> ModelWeights:
    """The checkpoint's weights in `dtype` on `device`; the dialect is the one whose names it uses.

    Host memory never exceeds the weights that stay on the host plus the largest stored tensor. Raises CheckpointError,
    before memory is taken, if tensors are missing, left over, misshapen, or not stored as floating-point numbers.
    """
    names = checkpoint.entries.keys()
    dialect = max(DIALECTS.values(), key=lambda one: len(plan_placements(config, one).keys() & names))
    config = _settle_tying(checkpoint, config, dialect)
    plan = plan_placements(config, dialect)
    _check(checkpoint, config, dialect, plan)
    weights = build_weights(config, dtype=dtype, device=device)
    parameters = named_parameters(weights)
    for name in (name for name in checkpoint.entries if name in plan):
        place = plan[name]
        rows = parameters[place.parameter][place.start : place.stop]
        if place.grouped is None:
            checkpoint.read_into(name, rows)
        else:
            for ours, stored in _pair_rows(rows, checkpoint.tensor(name), place.grouped):
                ours.copy_(stored)
    return weights


def save_weights(
    weights: ModelWeights, config: ModelConfig, folder: Path, *, dialect: Dialect, max_shard_bytes: int = 5 << 30
) -> None:
    """Writes what `load_weights` reads, in the parameters' dtype; config.json and the tokenizer are not written."""
    plan, parameters = plan_placements(config, dialect), named_parameters(weights)

    def make(name: str) -> Tensor:
        place = plan[name]
        rows = parameters[place.parameter][place.start : place.stop].cpu()
        if place.grouped is None:
            return rows
        tensor = torch.empty(place.shape, dtype=rows.dtype)
        for ours, stored in _pair_rows(rows, tensor, place.grouped):
            stored.copy_(ours)
        return tensor

    shapes = {name: place.shape for name, place in plan.items()}
    dtype = weights.decoder.embedding_VD.dtype
    write_tensors(folder, shapes, make, dtype=dtype, max_shard_bytes=max_shard_bytes)


def _pair_rows(rows: Tensor, wqkv: Tensor, grouped: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same values: of all q, all k, all v in order, and of a tensor that is grouped by key/value head."""
    num_kv_heads, head_dim = grouped
    by_group = wqkv.view(num_kv_heads, -1, head_dim, wqkv.shape[1])
    by_head = rows.view(-1, head_dim, rows.shape[1])
    yield by_head[: -2 * num_kv_heads].view(by_group[:, :-2].shape), by_group[:, :-2]
    yield by_head[-2 * num_kv_heads : -num_kv_heads], by_group[:, -2]
    yield by_head[-num_kv_heads:], by_group[:, -1]


def _settle_tying(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect) -> ModelConfig:
    """The configuration that holds for this checkpoint, where it has an lm_head although its config ties it.

    An lm_head equal to the embedding changes nothing. One that differs is used in the -hf format, as transformers does.
    """
    head, (embedding,) = f"{dialect.lm_head}.weight", _expand(dialect.table()["decoder.embedding_VD"])
    if not config.decoder.tie_embeddings or not {head, embedding} <= checkpoint.entries.keys():
        return config
    if checkpoint.same_bytes(head, embedding):
        return config
    if config.format == "original":
        raise CheckpointError(
            f"{checkpoint.folder}: {head} differs from {embedding}, but tie_word_embeddings in config.json says that "
            "they are one; set it to false if both are meant"
        )
    return replace(config, decoder=replace(config.decoder, tie_embeddings=False))


def _check(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect, plan: Mapping[str, Placement]) -> None:
    entries, head = checkpoint.entries, f"{dialect.lm_head}.weight"
    missing = [name for name in plan if name not in entries]
    if len(missing) == len(plan):
        raise CheckpointError(
            f"{checkpoint.folder}: none of its {len(entries)} tensors is one of an InternVL model "
            f"({_some(list(entries))}); give an InternVL checkpoint"
        )
    extra = [name for name in entries if name not in plan and not _IGNORED.fullmatch(name)]
    if config.decoder.tie_embeddings and head in extra:
        extra.remove(head)
    both = [(name, place, entries[name]) for name, place in plan.items() if name in entries]
    shapes = [
        f"{name} is {list(entry.shape)}, expected {list(place.shape)}"
        for name, place, entry in both
        if entry.shape != place.shape
    ]
    dtypes = [f"{name} is {entry.dtype}" for name, _, entry in both if entry.dtype not in FLOATS]
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for found, what in (
            (missing, "missing"),
            (extra, "left over"),
            (shapes, "of the wrong shape"),
            (dtypes, "not stored as 16-bit or 32-bit floating point"),
        )
        if found
    ]
    if missing == [head]:
        problems.append(
            'weights without an lm_head need "tie_word_embeddings": true in the config of the language model'
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit its config.json: {'; '.join(problems)}; download config.json and the "
            "weights of one model"
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
