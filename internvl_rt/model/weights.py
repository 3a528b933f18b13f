"""Checkpoint tensors to parameters: one table of names for each dialect, read in both directions.

`plan_file` spells a dialect out for a configuration: every tensor that a checkpoint holds, and where its values belong.
Loading copies along the plan, saving goes the other way. A rank of several checks the whole plan, and reads its part.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.find import MERGE_LORA
from internvl_rt.checkpoint.folder import Checkpoint, some_of, write_tensors
from internvl_rt.checkpoint.quantization import Quantization, Scheme
from internvl_rt.errors import CheckpointError, ConfigError, not_finite
from internvl_rt.model.dialects import DIALECTS, Dialect, find_dialect, name_modules
from internvl_rt.model.internvl import (
    ModelWeights,
    build_weights,
    fill_weights,
    map_linears,
    named_linears,
    named_parameters,
)
from internvl_rt.model.linear import AnyLinear, Linear
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.placement import (
    MXFP4_END,
    Placement,
    PlannedTensor,
    cut_placements,
    mxfp4_scales,
    plan_tensors,
    read_placed,
)
from internvl_rt.model.shard import WHOLE, Shard, cut_of, shard_decoder, vocabulary_of
from internvl_rt.model.stored_linear import (
    FLOATS,
    LAST_NAMES,
    Part,
    StoredTensor,
    cast_linear,
    check_module,
    check_scales,
    column_unit,
    fits,
    join_parts,
    largest_of,
    quantise_shapes,
    read_number,
    read_part,
    stored_tensors,
)

_LORA = re.compile(r"\blora_|\.base_layer\.")  # as PEFT names an adapter's tensors, and what they adapt
# Buffers that some versions of transformers wrote, a training-time token that the class declares but does not use, and
# the two rounds of attention that the class of Flash declares and does not use.
_IGNORED = re.compile(
    r".*\.(rotary_emb\.inv_freq|embeddings\.mask_token)"
    r"|pooling_before_gating\.(attn[34]\.(in_proj_|out_proj\.)|norm[34]\.)(weight|bias)"
)


class Module(NamedTuple):
    """A module of a checkpoint, which holds a quantised linear, or rows of one.

    shape: [N, K] of its weight. placements: where the rows belong.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    placements: tuple[Placement, ...]


class FilePlan(NamedTuple):
    """What a checkpoint must hold.

    tensors: by name, those that are read into parameters, and those that modules consist of
    dense: where the values of the former belong
    modules: by the path of their linear
    schemes: of the quantised linears, by path
    kv_scales: names of the static scales of keys and of values, of each layer; empty: there are none
    """

    tensors: dict[str, StoredTensor]
    dense: dict[str, PlannedTensor]
    modules: dict[str, list[Module]]
    schemes: dict[str, Scheme]
    kv_scales: list[tuple[str, str]]


def find_schemes(
    config: ModelConfig, quantization: Quantization | None, dialect: Dialect = DIALECTS["original"]
) -> dict[str, Scheme]:
    """Returns how each quantised linear is stored, by path. Raises ConfigError where its parts differ."""
    if quantization is None:
        return {}
    found, experts = {}, config.decoder.experts
    for path in named_linears(build_weights(config, dtype=torch.bfloat16, device="meta")):
        if path.endswith(".router"):  # small, and it decides
            continue
        modules = name_modules(dialect, path, 0 if experts is None else experts.num_experts)
        schemes = {name: quantization.scheme_of(path, names) for name, names in modules}
        if len(set(schemes.values())) > 1:
            differ = ", ".join(f"{name} ({scheme or 'dense'})" for name, scheme in schemes.items())
            raise ConfigError(
                f"{quantization.source}: {differ} are one product here, so they must be quantised alike; use a "
                "checkpoint in which they are"
            )
        if scheme := schemes[modules[0][0]]:
            found[path] = scheme
    return found


def shape_weights(
    config: ModelConfig, dtype: torch.dtype, schemes: Mapping[str, Scheme], shard: Shard = WHOLE
) -> ModelWeights:
    """Returns a rank's weights on the device "meta", of which those that `schemes` names are quantised.

    It takes no memory. Raises ConfigError for a weight that cannot be cut as it is quantised, alike on all ranks.
    """
    local = replace(config, decoder=shard_decoder(config.decoder, shard))
    weights = build_weights(local, dtype=dtype, device="meta")
    if not config.decoder.tie_embeddings:
        head = weights.decoder.lm_head.take_rows(vocabulary_of(config.decoder, shard))
        weights = replace(weights, decoder=replace(weights.decoder, lm_head=head))

    def quantise(path: str, linear: AnyLinear) -> AnyLinear:
        assert isinstance(linear, Linear)
        if path not in schemes:
            return linear
        _check_borders(path, config, schemes[path], shard)
        return quantise_shapes(linear, schemes[path], _first_column(path, config, shard))

    return map_linears(weights, quantise)


def _first_column(path: str, config: ModelConfig, shard: Shard) -> int:
    cut = cut_of(f"{path}.weight_NK", config.decoder, shard)
    return 0 if cut is None else cut.columns.start or 0


def _check_borders(path: str, config: ModelConfig, scheme: Scheme, shard: Shard) -> None:
    """Raises ConfigError if any rank's columns of a linear begin where a weight stored so cannot be cut."""
    unit = column_unit(scheme)
    borders = [_first_column(path, config, replace(shard, rank=rank)) for rank in range(shard.size)]
    if wrong := [border for border in borders if border % unit]:
        raise ConfigError(
            f"tensor_parallel_size {shard.size} cuts {name_modules(DIALECTS['original'], path, 1)[0][0]} ({scheme}) at "
            f"column {wrong[0]}, expected multiples of {unit}: what is between them is stored together; choose another "
            "tensor_parallel_size, or 8-bit weights with one scale a row"
        )


def agreement(path: str, config: ModelConfig, shard: Shard) -> Callable[[Tensor], Tensor] | None:
    """Returns what makes the ranks' largest numbers of each row agree, for a linear whose columns they share."""
    cut = cut_of(f"{path}.weight_NK", config.decoder, shard)
    if cut is None or cut.columns == slice(None):
        return None
    assert shard.group is not None, "ranks quantise a weight together"
    return shard.group.largest


def plan_file(config: ModelConfig, dialect: Dialect, quantization: Quantization | None) -> FilePlan:
    """Lists what a checkpoint in this dialect must hold. Raises ConfigError for shapes that cannot be quantised so."""
    schemes = find_schemes(config, quantization, dialect)
    source = "" if quantization is None else quantization.source
    dense, modules = plan_tensors(config, dialect), {path: list[Module]() for path in schemes}
    tensors = {}
    for name, planned in dense.items():
        is_mxfp4 = name.endswith(MXFP4_END)
        tensors[name] = StoredTensor((planned.shape,), (torch.uint8,) if is_mxfp4 else FLOATS)
        if is_mxfp4:
            tensors[mxfp4_scales(name)] = StoredTensor((planned.shape[:-1],), (torch.uint8,))
    for name, planned in list(dense.items()):
        path, _, field = planned.placements[0].parameter.rpartition(".")
        if field != "weight_NK" or path not in schemes or schemes[path].layout == "cast":
            continue
        module, scheme, (n, k) = name.removesuffix(".weight"), schemes[path], planned.shape
        if not fits(scheme, n, k):
            raise ConfigError(f"{source}: {module} of {n} x {k} cannot be stored as {scheme}")
        modules[path].append(Module(module, scheme, (n, k), planned.placements))
        del dense[name], tensors[name]
        tensors |= {f"{module}.{last}": stored for last, stored in stored_tensors(scheme, n, k).items()}
    kv_scales = []
    if quantization is not None and quantization.kv_cache is not None:
        for index in range(config.decoder.num_layers):
            attention = name_modules(dialect, f"decoder.layers.{index}.o")[0][0].rpartition(".")[0]
            kv_scales.append((f"{attention}.k_scale", f"{attention}.v_scale"))
            tensors |= dict.fromkeys(kv_scales[-1], StoredTensor(((1,), ()), FLOATS))
    return FilePlan(tensors, dense, modules, schemes, kv_scales)


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops = TORCH,
    quantization: Quantization | None = None,
    shard: Shard = WHOLE,
) -> ModelWeights:
    """Loads the checkpoint's weights on `device`, as `ops` multiplies them fastest; all that is dense in `dtype`.

    quantization: how the checkpoint is quantised, or is to be.
    shard: the part that is loaded, and of large tensors all that is read. The checks are those of the whole. Ranks that
        quantise dense weights must load at the same time.

    Memory never exceeds the weights that stay plus the largest linear, and that of the host no more than this where it
    holds them, else the largest stored tensor. Raises CheckpointError, before memory is taken, if tensors are missing,
    left over, misshapen, of the wrong dtype, or if scales are not finite; and after all are read, if another number is
    not finite in `dtype`.
    """
    dialect = find_dialect(checkpoint.entries)
    config = settle_tying(checkpoint, config, dialect)
    plan = plan_file(config, dialect, quantization)
    check_tensors(checkpoint, config, dialect, plan)
    parts: dict[str, list[tuple[str, Placement]]] = {}  # of each parameter
    for name, planned in plan.dense.items():
        for place in cut_placements(planned.placements, config.decoder, shard):
            parts.setdefault(place.parameter, []).append((name, place))
    extremes: list[tuple[str, Tensor]] = []  # of each part's numbers; on the device, which the host does not wait for

    def fill(path: str, parameter: Tensor) -> None:
        shard.check()
        for name, place in parts[path]:
            rows = parameter[place.start : place.stop]
            read_placed(checkpoint, name, place, rows)
            extremes.append((name, torch.stack(rows.aminmax())))  # NaN if one is NaN

    def make(path: str, linear: AnyLinear, fill_dense: Callable[[], Linear]) -> AnyLinear:
        if plan.schemes[path].layout == "cast":
            return cast_linear(fill_dense(), plan.schemes[path], agreement(path, config, shard))
        parts = ((module, cut_placements(module.placements, config.decoder, shard)) for module in plan.modules[path])
        return join_parts(linear, (read(module, places) for module, places in parts if places))

    def read(module: Module, places: list[Placement]) -> tuple[Part, list[tuple[slice, slice]]]:
        shard.check()
        rows = [range(module.shape[0])[place.rows] for place in places]
        first, stop = min(one.start for one in rows), max(one.stop for one in rows)
        how = module.scheme, *module.shape, torch.device(device), slice(first, stop), places[0].columns
        part = read_part(checkpoint, module.name, *how)
        extremes.append((module.name, largest_of(part, dtype).expand(2)))
        ours = [slice(place.start, place.stop) for place in places]
        return part, list(zip(ours, [slice(one.start - first, one.stop - first) for one in rows], strict=True))

    shapes = shape_weights(config, dtype, plan.schemes, shard)
    weights = fill_weights(shapes, fill, ops, device=device, make=make, shard=shard)
    is_finite = torch.stack([pair for _, pair in extremes]).isfinite().all(1).tolist()
    broken = [name for (name, _), ok in zip(extremes, is_finite, strict=True) if not ok]
    if broken:
        names = some_of(list(dict.fromkeys(broken)))
        raise CheckpointError(
            f"{checkpoint.folder}: {names}: numbers are {not_finite(dtype, 'download the weights again')}"
        )
    if plan.kv_scales:
        scales = [[read_number(checkpoint, name) for name in names] for names in plan.kv_scales]
        weights = replace(weights, decoder=replace(weights.decoder, kv_scale_L2=torch.tensor(scales, device=device)))
    return weights


def save_weights(
    weights: ModelWeights, config: ModelConfig, folder: Path, *, dialect: Dialect, max_shard_bytes: int = 5 << 30
) -> None:
    """Writes what `load_weights` reads, in the parameters' dtype; config.json and the tokenizer are not written."""
    plan, parameters = plan_tensors(config, dialect), named_parameters(weights)
    dtype = weights.decoder.embedding_VD.dtype

    def make(name: str) -> Tensor:
        planned = plan[name]
        tensor = torch.empty(planned.shape, dtype=dtype)
        matrix = tensor.view(-1, tensor.shape[-1])
        for place in planned.placements:
            part, rows = matrix[place.rows, place.columns], parameters[place.parameter][place.start : place.stop]
            part.copy_((rows.t() if place.transposed and rows.ndim == 2 else rows).reshape(part.shape))
        return tensor

    shapes = {name: planned.shape for name, planned in plan.items()}
    write_tensors(folder, shapes, make, dtype=dtype, max_shard_bytes=max_shard_bytes)


def settle_tying(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect) -> ModelConfig:
    """Returns the configuration, with `tie_embeddings` as this checkpoint means it.

    A checkpoint may hold an lm_head although its config ties it to the embedding. One that is equal changes nothing;
    one that differs, as a quantised one does, is used in the -hf format, as transformers does, and refused in the
    original format.
    """
    head, embedding = f"{dialect.lm_head}.weight", dialect.table()["decoder.embedding_VD"]
    found = [name for name in checkpoint.entries if name.startswith(f"{dialect.lm_head}.")]
    if not config.decoder.tie_embeddings or not found or embedding not in checkpoint.entries:
        return config
    if found == [head] and checkpoint.same_bytes(head, embedding):
        return config
    if config.format == "original":
        raise CheckpointError(
            f"{checkpoint.folder}: {found[0]} differs from {embedding}, but tie_word_embeddings in config.json says "
            "that they are one; set it to false if both are meant"
        )
    return replace(config, decoder=replace(config.decoder, tie_embeddings=False))


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect, plan: FilePlan) -> None:
    """Raises CheckpointError unless the tensors are those of the plan, and their scales are finite, as one line."""
    entries, head = checkpoint.entries, f"{dialect.lm_head}.weight"
    missing = [name for name, stored in plan.tensors.items() if name not in entries and not stored.is_optional]
    extra = [name for name in entries if name not in plan.tensors and not _IGNORED.fullmatch(name)]
    merge_lora = f"a LoRA adapter is not merged; {MERGE_LORA}" if any(map(_LORA.search, extra)) else ""
    if len(missing) == len(plan.tensors):
        raise CheckpointError(
            f"{checkpoint.folder}: none of its {len(entries)} tensors is one of an InternVL model "
            f"({some_of(list(entries))}); {merge_lora or 'give an InternVL checkpoint'}"
        )
    if config.decoder.tie_embeddings and head in extra:
        extra.remove(head)
    both = [(name, stored, entries[name]) for name, stored in plan.tensors.items() if name in entries]
    shapes = [
        f"{name} is {list(entry.shape)}, expected {list(stored.shapes[0])}"
        for name, stored, entry in both
        if entry.shape not in stored.shapes
    ]
    wrong = [(name, stored, entry.dtype) for name, stored, entry in both if entry.dtype not in stored.dtypes]
    dtypes = [f"{name} is {dtype}" for name, stored, dtype in wrong if stored.dtypes == FLOATS]
    others = [f"{name} is {dtype}, expected {one.dtypes[0]}" for name, one, dtype in wrong if one.dtypes != FLOATS]
    problems = [
        f"{len(found)} {what}: {some_of(found)}"
        for found, what in (
            (missing, "missing"),
            (extra, "left over"),
            (shapes, "of the wrong shape"),
            (dtypes, "not stored as 16-bit or 32-bit floating point"),
            (others, "of the wrong dtype"),
        )
        if found
    ]
    if not problems:
        modules = [module for linear in plan.modules.values() for module in linear]
        found = (check_module(checkpoint, module.name, module.scheme, *module.shape) for module in modules)
        problem = next(filter(None, found), None) or check_scales(checkpoint, sum(plan.kv_scales, ()))
        if problem:
            raise CheckpointError(f"{checkpoint.folder}: {problem}; download the weights again")
        return
    remedy = merge_lora or "download config.json and the weights of one model"
    quantised = dtypes or any(name.rpartition(".")[2] in LAST_NAMES for name in extra)
    if missing == [head]:
        remedy = _remedy_without_head(config, head, dialect.table()["decoder.embedding_VD"])
    elif quantised and not plan.modules:
        remedy = "the quantization_config that goes with quantised weights is missing; download config.json again"
    elif quantised:
        remedy = "its quantization_config must say which linears are quantised, and how; download config.json again"
    raise CheckpointError(f"{checkpoint.folder} does not fit its config.json: {'; '.join(problems)}; {remedy}")


def _remedy_without_head(config: ModelConfig, head: str, embedding: str) -> str:
    """Says what to do where only the lm_head is missing, which the config does not tie to the embedding."""
    if config.format == "original" and not config.decoder.qk_norm:  # of its language models, Qwen3 alone may be tied
        return (
            f'the official class of this model overrules "tie_word_embeddings": true, so save the model again with '
            f"{head}, as a copy of {embedding} if they were one in training"
        )
    section = "llm_config" if config.format == "original" else "text_config"
    return f'if the lm_head is {embedding}, write "tie_word_embeddings": true into {section} of config.json'
