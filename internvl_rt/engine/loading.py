"""Loads what an engine runs: the model, its tokenizer, and a KV cache in the memory that is left."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.checkpoint.find import RANDOM_PREFIX, is_random, random_config, resolve_model
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.checkpoint.quantization import Quantization, cast
from internvl_rt.engine.host_memory import give_back_large_buffers, keep_large_buffers
from internvl_rt.engine.memory import MemoryPlan, check_tower_memory, memory_errors, plan_memory
from internvl_rt.engine.options import ONE_SHOT, EngineOptions, write_facts
from internvl_rt.engine.ranks import FirstRank
from internvl_rt.engine.towers import VisionProcesses
from internvl_rt.errors import CheckpointError, RequestError, forked, quoted
from internvl_rt.inputs.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.model.internvl import InternVL, ModelWeights, named_linears, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.ops import KV_FORMATS, TORCH, Ops
from internvl_rt.model.ops_cpu import cpu_ops
from internvl_rt.model.ops_invariant import invariant_ops
from internvl_rt.model.ops_triton import Switches, triton_ops
from internvl_rt.model.processor import default_dtype, instructions
from internvl_rt.model.random_checkpoint import random_weights, write_random_tokenizer
from internvl_rt.model.shard import Shard, check_size, shard_decoder
from internvl_rt.model.sharded import join_shards, shard_ops
from internvl_rt.model.weights import find_schemes, load_weights, shape_weights
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.orders import Orders

LOG = logging.getLogger("internvl_rt")

_loaded_in: int | None = None  # id of the process, this one or one that it was forked from, that last loaded weights


class _Opened(NamedTuple):
    """A model before its weights are loaded. given: what the caller names it. name: its folder, or "random:..."."""

    given: str
    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    load: Callable[[torch.dtype, torch.device, Ops, Quantization | None, Shard], ModelWeights]


def load_parts(
    model: str | Path, options: EngineOptions, *, hash_key: bytes | None = None
) -> tuple[InternVL, Tokenizer, KVCache, MemoryPlan]:
    """Loads what an engine consists of, and starts the processes of its other ranks, if it has any.

    hash_key: of the cache, for one whose changes somebody follows.
    Raises ConfigError, CheckpointError or RequestError, and EngineDeadError if a rank is lost, or if this process was
    forked from one that loaded.
    """
    if _loaded_in is not None and _loaded_in != os.getpid():  # torch would wait for its threads, which stayed behind
        raise forked(_loaded_in)
    size, vision = options.tensor_parallel_size, options.vision_processes == 0
    target, opened = choose_device(options.device, size), _open(model, options.revision, options.seed or 0)
    check_size(opened.config.decoder, size, by_expert=options.expert_parallel)
    chosen = choose_dtype(options.dtype, opened.config, target)
    ops = _choose_ops(options, target, chosen)
    plan = _planning(opened.config, chosen, target, ops, options, options.shard())
    plan(weights_are_loaded=False)  # raises before memory is taken
    facts = write_facts(opened.name, options, target, chosen)
    first: FirstRank | None = None
    tower: VisionProcesses | None = None
    try:
        if not vision:
            choose_device(str(options.choose_vision_device(target)), options.vision_processes)
            tower = VisionProcesses(facts, opened.config, chosen, target, options.vision_processes)
        if size > 1:
            first = FirstRank(facts, size, target, one_shot=ONE_SHOT in options.experiments)
        shard = options.shard(group=first, lead=first, tower=tower)
        part, kv_dtype, memory = _load(opened, options, target, chosen, shard)
        with memory_errors(target):
            on_copy = None if first is None else Orders(first).copy_blocks
            sizes = _cache_sizes(part, options, kv_dtype, memory)
            cache = KVCache(part.part, **sizes, on_copy=on_copy, hash_key=hash_key)
        if tower is not None:
            tower.wait_until_ready()
    except BaseException as error:
        cause = None if first is None else first.end_after(error)
        if tower is not None:
            tower.close()
        if cause is not None:
            raise cause from error
        raise
    if first is not None:
        first.begin()
    return part, opened.tokenizer, cache, memory


def load_part(model: str, options: EngineOptions, device: torch.device, shard: Shard) -> tuple[InternVL, KVPool]:
    """Loads the part of a model that a rank other than 0 computes with, and the memory of its cache."""
    opened = _open(model, None, options.seed or 0)
    part, kv_dtype, memory = _load(opened, options, device, choose_dtype(options.dtype, opened.config, device), shard)
    with memory_errors(device):
        return part, KVPool(part.part, **_cache_sizes(part, options, kv_dtype, memory))


def load_tower(model: str, options: EngineOptions, device: torch.device) -> InternVL:
    """Loads the vision tower and the projector alone, for a vision process."""
    opened, shard = _open(model, None, options.seed or 0), Shard(decoder=False)
    config, dtype = opened.config, choose_dtype(options.dtype, opened.config, device)
    ops = _choose_ops(options, device, dtype)
    quantization = choose_quantization(config, options.quantization, vision=options.quantize_vision)
    shaped = named_parameters(shape_weights(config, dtype, find_schemes(config, quantization)))
    check_tower_memory(config, dtype, device, sum(one.nbytes for path, one in shaped.items() if shard.holds(path)))
    return InternVL(config, _load_weights(opened, dtype, device, ops, quantization, shard), ops, shard)


def _load(
    opened: _Opened, options: EngineOptions, device: torch.device, dtype: torch.dtype, shard: Shard
) -> tuple[InternVL, torch.dtype, MemoryPlan]:
    """Returns a rank's part of the model, the data type of its cache, and the plan of its memory."""
    global _loaded_in
    config, ops = opened.config, _choose_ops(options, device, dtype)
    quantization = choose_quantization(config, options.quantization, vision=options.quantize_vision)
    kv_dtype = choose_kv_dtype(options.kv_cache_dtype, config, dtype)
    plan = _planning(config, dtype, device, ops, options, shard)
    if shard.rank > 0:
        plan(weights_are_loaded=False)  # raises before memory is taken
    _loaded_in = os.getpid()
    weights = _load_weights(opened, dtype, device, ops, quantization, shard)
    with memory_errors(device):
        memory = _agree(plan, device, shard)
    on_host = device.type == "cpu"
    how = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "backend": ops.name}
    how |= {"kv_cache_dtype": str(kv_dtype).removeprefix("torch.")} if kv_dtype != dtype else {}
    how |= {"instructions": instructions()} if on_host else {}
    how |= {"tensor_parallel_size": str(shard.size)} if shard.size > 1 else {}
    if quantization:
        how["quantization"] = quantization.method
        if on_host and any(scheme.is_float for _, scheme in quantization.groups):
            faster = "quantization='int8'" if options.quantization else "the dense model with quantization='int8'"
            LOG.warning(f"a CPU converts FP8 weights for each product, which is slow; {faster} is faster")
    LOG.info(json.dumps({"loaded": opened.given, **how}))
    part = InternVL(config, join_shards(weights, config.decoder, shard), shard_ops(ops, config.decoder, shard), shard)
    return part, kv_dtype, memory


def _load_weights(
    opened: _Opened,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    quantization: Quantization | None,
    shard: Shard,
) -> ModelWeights:
    on_host = device.type == "cpu"
    with memory_errors(device):
        if on_host:
            give_back_large_buffers()
        weights = opened.load(dtype, device, ops, quantization, shard)
        if on_host:
            keep_large_buffers()
    return weights


def _agree(plan: Callable[..., MemoryPlan], device: torch.device, shard: Shard) -> MemoryPlan:
    """Plans the memory that is left when all ranks have their weights; all get as many blocks as the least can have."""
    if shard.group is None:
        return plan()
    shard.group.largest(torch.zeros(1, device=device))
    memory = plan()
    most = shard.group.largest(torch.full((1,), -memory.num_blocks, device=device))
    return replace(memory, num_blocks=-int(most))


def _cache_sizes(part: InternVL, options: EngineOptions, kv_dtype: torch.dtype, memory: MemoryPlan) -> dict[str, Any]:
    return {
        "num_blocks": memory.num_blocks,
        "block_size": options.block_size,
        "dtype": kv_dtype,
        "device": part.device,
        "ops": part.ops,
        "static_scale_L2": part.weights.decoder.kv_scale_L2 if options.kv_cache_dtype == "auto" else None,
    }


def plan_parts(model: str | Path, options: EngineOptions) -> MemoryPlan:
    """Plans what `load_parts` will take on one device, and takes nothing. Raises the same errors."""
    target = choose_device(options.device, options.tensor_parallel_size)
    config = _open(model, options.revision, 0).config
    check_size(config.decoder, options.tensor_parallel_size, by_expert=options.expert_parallel)
    chosen = choose_dtype(options.dtype, config, target)
    ops = _choose_ops(options, target, chosen)
    return _planning(config, chosen, target, ops, options, options.shard())(weights_are_loaded=False)


def _planning(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, ops: Ops, options: EngineOptions, shard: Shard
) -> Callable[..., MemoryPlan]:
    """Returns a function that plans the memory of a rank."""
    quantization = choose_quantization(config, options.quantization, vision=options.quantize_vision)
    schemes, kv_dtype = find_schemes(config, quantization), choose_kv_dtype(options.kv_cache_dtype, config, dtype)
    ops.check_cache(kv_dtype, device)
    shaped = shape_weights(config, dtype, schemes, shard)
    shapes = [tensor for path, tensor in named_parameters(shaped).items() if shard.holds(path)]
    linears = [linear for path, linear in named_linears(shaped).items() if shard.holds(path)]
    quantised = (each.num_outputs * each.num_inputs for each in linears if not isinstance(each, Linear))
    part = replace(config, decoder=shard_decoder(config.decoder, shard))
    return partial(
        plan_memory, part, dtype, device, options, kv_dtype=kv_dtype,
        weight_bytes=sum(tensor.nbytes for tensor in shapes), dense_bytes=max(quantised, default=0) * dtype.itemsize,
        graphs=options.cuda_graphs and ops.captures_graphs, vision=shard.vision,
    )  # fmt: skip


def _open(model: str | Path, revision: str | None, seed: int) -> _Opened:
    """Reads configuration and tokenizer. seed: for random weights."""
    if is_random(model):
        if revision is not None:
            raise CheckpointError(f"revision {quoted(revision)} was given, but {model} has none; leave it out")
        config = random_config(str(model).removeprefix(RANDOM_PREFIX))
        with TemporaryDirectory() as scratch:
            write_random_tokenizer(Path(scratch), config)
            tokenizer = load_tokenizer(Path(scratch))

        def make(
            dtype: torch.dtype, device: torch.device, ops: Ops, quantization: Quantization | None, shard: Shard
        ) -> ModelWeights:
            how: dict[str, Any] = {"seed": seed, "ops": ops, "quantization": quantization, "shard": shard}
            return random_weights(config, dtype=dtype, device=device, **how)

        return _Opened(str(model), str(model), config, tokenizer, make)
    folder = resolve_model(model, revision=revision)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise RequestError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {config.decoder.vocab_size} "
            "embeddings; the folder mixes files of different models"
        )
    checkpoint = open_checkpoint(folder)

    def load(
        dtype: torch.dtype, device: torch.device, ops: Ops, quantization: Quantization | None, shard: Shard
    ) -> ModelWeights:
        how: dict[str, Any] = {"ops": ops, "quantization": quantization, "shard": shard}
        return load_weights(checkpoint, config, dtype=dtype, device=device, **how)

    return _Opened(str(model), str(folder.resolve()), config, tokenizer, load)


def choose_quantization(
    config: ModelConfig, to: Literal["fp8", "int8"] | None, *, vision: bool = False
) -> Quantization | None:
    """Returns how weights are held: as the checkpoint says, or as the options do. Raises RequestError if both do."""
    if to is None:
        if vision:
            raise RequestError("quantize_vision needs quantization='fp8' or 'int8'; give it, or leave both out")
        return config.quantization
    if config.quantization is not None:
        raise RequestError(
            f"quantization={to!r} is for dense checkpoints, but this one is quantised ({config.quantization.method}); "
            "leave it out"
        )
    return cast(to, vision=vision)


def choose_device(device: str, num_ranks: int = 1) -> torch.device:
    """Takes CUDA for "auto" if there is a GPU. Raises RequestError for a device that is not there.

    num_ranks: how many devices from this one on are needed, if it is no CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and num_ranks > 1 and (chosen.index or 0) + num_ranks > torch.cuda.device_count():
        raise RequestError(
            f"tensor_parallel_size {num_ranks} needs as many GPUs from {device} on, but torch sees "
            f"{torch.cuda.device_count()} in all; lower it, or choose device 'cpu'"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; choose one of them, "
            "or 'cpu'"
        )
    return chosen


def _choose_ops(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> Ops:
    backend = options.backend_on(device)
    if options.batch_invariant and backend != "triton":
        raise RequestError(
            f"batch_invariant needs the kernels, but on {device} backend {options.backend!r} means torch, whose "
            "products add up in an order of its own; choose backend 'triton' on a GPU, or leave batch_invariant out"
        )
    if options.batch_invariant and options.tensor_parallel_size > 1:
        raise RequestError(
            "batch_invariant needs one rank, because the order in which several add up depends on the number of rows; "
            "leave it or tensor_parallel_size out"
        )
    if backend == "torch":
        return TORCH
    if backend == "onednn":
        return cpu_ops(device, dtype)
    if options.batch_invariant:
        return invariant_ops(device)
    experiments = dict.fromkeys(set(options.experiments) - {ONE_SHOT}, True)
    return triton_ops(device, Switches(programmatic_launch=options.programmatic_launch, **experiments))


def choose_kv_dtype(kv_cache_dtype: str, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """Takes for "auto" what a quantised checkpoint has scales for, or the model's dtype."""
    if kv_cache_dtype == "model":
        return dtype
    if kv_cache_dtype != "auto":
        return KV_FORMATS[kv_cache_dtype]
    stored = None if config.quantization is None else config.quantization.kv_cache
    return dtype if stored is None else KV_FORMATS[stored]


def choose_dtype(dtype: str | torch.dtype, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Takes for "auto" the checkpoint's dtype on CUDA, and on the CPU what the processor multiplies fast."""
    if dtype == "auto":
        dtype = config.dtype if device.type == "cuda" else default_dtype()
    chosen: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return chosen
