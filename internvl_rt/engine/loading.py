"""Loads what an engine runs: the model, its tokenizer, and a KV cache in the memory that is left."""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.checkpoint.find import RANDOM_PREFIX, is_random, random_config, resolve_model
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.checkpoint.quantization import Quantization, cast
from internvl_rt.engine.host_memory import give_back_large_buffers, keep_large_buffers
from internvl_rt.engine.memory import MemoryPlan, memory_errors, plan_memory
from internvl_rt.engine.options import EngineOptions
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
from internvl_rt.model.weights import find_schemes, load_weights, shape_weights
from internvl_rt.steps.kv_cache import KVCache

LOG = logging.getLogger("internvl_rt")

_loaded_in: int | None = None  # id of the process, this one or one that it was forked from, that last loaded weights


def load_parts(model: str | Path, options: EngineOptions) -> tuple[InternVL, Tokenizer, KVCache, MemoryPlan]:
    """Raises ConfigError, CheckpointError or RequestError, and EngineDeadError in a fork of a process that loaded."""
    global _loaded_in
    if _loaded_in is not None and _loaded_in != os.getpid():  # torch would wait for its threads, which stayed behind
        raise forked(_loaded_in)
    target = choose_device(options.device)
    config, tokenizer, load = _open(model, options.revision, options.seed or 0)
    chosen = choose_dtype(options.dtype, config, target)
    ops = _choose_ops(options, target, chosen)
    quantization = choose_quantization(config, options.quantization, vision=options.quantize_vision)
    kv_dtype = choose_kv_dtype(options.kv_cache_dtype, config, chosen)
    plan = _planning(config, chosen, target, ops, options)
    plan(weights_are_loaded=False)  # raises before memory is taken
    _loaded_in = os.getpid()
    on_host = target.type == "cpu"
    with memory_errors(target):
        if on_host:
            give_back_large_buffers()
        weights = load(chosen, target, ops, quantization)
        if on_host:
            keep_large_buffers()
        memory = plan()
        cache = KVCache(
            config.decoder,
            num_blocks=memory.num_blocks,
            block_size=options.block_size,
            dtype=kv_dtype,
            device=target,
            ops=ops,
            static_scale_L2=weights.decoder.kv_scale_L2 if options.kv_cache_dtype == "auto" else None,
        )
        how = {"device": str(target), "dtype": str(chosen).removeprefix("torch."), "backend": ops.name}
        how |= {"kv_cache_dtype": str(kv_dtype).removeprefix("torch.")} if kv_dtype != chosen else {}
        how |= {"instructions": instructions()} if on_host else {}
        if quantization:
            how["quantization"] = quantization.method
            if on_host and any(scheme.is_float for _, scheme in quantization.groups):
                faster = "quantization='int8'" if options.quantization else "the dense model with quantization='int8'"
                LOG.warning(f"a CPU converts FP8 weights for each product, which is slow; {faster} is faster")
        LOG.info(json.dumps({"loaded": str(model), **how}))
        return InternVL(config, weights, ops), tokenizer, cache, memory


def plan_parts(model: str | Path, options: EngineOptions) -> MemoryPlan:
    """Plans what `load_parts` will take, and takes nothing. Raises the same errors."""
    target = choose_device(options.device)
    config, _, _ = _open(model, options.revision, 0)
    chosen = choose_dtype(options.dtype, config, target)
    return _planning(config, chosen, target, _choose_ops(options, target, chosen), options)(weights_are_loaded=False)


def _planning(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, ops: Ops, options: EngineOptions
) -> Callable[..., MemoryPlan]:
    quantization = choose_quantization(config, options.quantization, vision=options.quantize_vision)
    schemes, kv_dtype = find_schemes(config, quantization), choose_kv_dtype(options.kv_cache_dtype, config, dtype)
    ops.check_cache(kv_dtype, device)
    shaped = shape_weights(config, dtype, schemes)
    shapes, linears = named_parameters(shaped).values(), named_linears(shaped).values()
    quantised = (each.num_outputs * each.num_inputs for each in linears if not isinstance(each, Linear))
    return partial(
        plan_memory, config, dtype, device, options, kv_dtype=kv_dtype,
        weight_bytes=sum(tensor.nbytes for tensor in shapes), dense_bytes=max(quantised, default=0) * dtype.itemsize,
        graphs=options.cuda_graphs and ops.captures_graphs,
    )  # fmt: skip


def _open(
    model: str | Path, revision: str | None, seed: int
) -> tuple[ModelConfig, Tokenizer, Callable[[torch.dtype, torch.device, Ops, Quantization | None], ModelWeights]]:
    """Returns configuration, tokenizer and a function that loads the weights. seed: for random weights."""
    if is_random(model):
        if revision is not None:
            raise CheckpointError(f"revision {quoted(revision)} was given, but {model} has none; leave it out")
        config = random_config(str(model).removeprefix(RANDOM_PREFIX))
        with TemporaryDirectory() as scratch:
            write_random_tokenizer(Path(scratch), config.decoder.vocab_size)
            tokenizer = load_tokenizer(Path(scratch))

        def make(dtype: torch.dtype, device: torch.device, ops: Ops, quantization: Quantization | None) -> ModelWeights:
            return random_weights(config, dtype=dtype, device=device, seed=seed, ops=ops, quantization=quantization)

        return config, tokenizer, make
    folder = resolve_model(model, revision=revision)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise RequestError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {config.decoder.vocab_size} "
            "embeddings; the folder mixes files of different models"
        )
    checkpoint = open_checkpoint(folder)

    def load(dtype: torch.dtype, device: torch.device, ops: Ops, quantization: Quantization | None) -> ModelWeights:
        return load_weights(checkpoint, config, dtype=dtype, device=device, ops=ops, quantization=quantization)

    return config, tokenizer, load


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


def choose_device(device: str) -> torch.device:
    """Takes CUDA for "auto" if there is a GPU. Raises RequestError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
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
    if backend == "torch":
        return TORCH
    if backend == "onednn":
        return cpu_ops(device, dtype)
    if options.batch_invariant:
        return invariant_ops(device)
    experiments = dict.fromkeys(options.experiments, True)
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
