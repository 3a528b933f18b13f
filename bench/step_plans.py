"""The launches of a step, as the engine makes them: from the kernels' own plan functions, chosen as `ops_triton` does.

No GPU is needed: plans are made for tensors without memory. A step of decodes is one graph. A step with a prompt is the
graph of its layers, in which sequences may decode beside the prompt, each padded to its bucket, and that of its head.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from launch_model import NUM_SMS, PREFETCHED_BYTES, Device, Work, predict

from internvl_rt.checkpoint.config import KNOWN_MODELS, DecoderConfig, load_config
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._contract import Case, Cost, KernelSpec
from internvl_rt.kernels._gemv_plan import MAX_ROWS
from internvl_rt.kernels._launch import TARGETS, Launch
from internvl_rt.kernels._split_plan import num_split_items, plan_splits
from internvl_rt.kernels.decode_attention import SPEC as DECODE_ATTENTION
from internvl_rt.kernels.embed_tokens import SPEC as EMBED_TOKENS
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as GEMV_QKV
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL_ATTENTION
from internvl_rt.kernels.qkv_rope_kv import SPEC as QKV_ROPE_KV
from internvl_rt.kernels.rms_norm import SPEC as RMS_NORM
from internvl_rt.kernels.sample import PLAIN
from internvl_rt.kernels.sample import SPEC as SAMPLE
from internvl_rt.kernels.swiglu import SPEC as SWIGLU
from internvl_rt.steps.step_graph import decode_buckets, layer_buckets

TARGET, DTYPE, BLOCK_SIZE = TARGETS[90], torch.bfloat16, 64
MAX_TOKENS, MAX_SEQS = 8192, 256  # of a step: the graphs of an engine
RESIDENT_WARPS = 16  # warps of a multiprocessor with 128 registers a thread
LIGHT_WARPS = 32  # the same with 64, of kernels that multiply nothing
LEAST_KEY_BLOCKS = 4  # blocks of 64 keys that a split of prefill attention has at least
# What a step without a graph launches besides its layers. By torch: a copy of the wanted row's number, and that row. By
# Triton: the embedding, the row's logits, and the two kernels of its draw.
EAGER_TORCH, EAGER_TRITON = 2, 4


@dataclass(frozen=True, slots=True)
class Operation:
    """A part of a step: the launches of one SPEC, or a product of torch if `launches` is empty."""

    name: str
    times: int  # how often a step runs it
    case: Case
    cost: Cost
    launches: tuple[Launch, ...]
    works: tuple[Work, ...]
    weight_bytes: int = 0

    def floor_us(self, device: Device) -> float:
        """A lower bound: the time by the data sheet's bandwidth or its arithmetic, whichever is longer."""
        return max(self.cost.bytes / (1e3 * device.sheet_gb_s), self.cost.flops / (1e6 * device.sheet_tflops))

    def terms_us(self, device: Device, **how: Any) -> dict[str, float]:
        """The predicted time of one run by what it is spent on."""
        each = [predict(work, device, **how) for work in self.works]
        return {name: sum(terms[name] for terms in each) for name in each[0]}


@dataclass(frozen=True, slots=True)
class Step:
    """The operations of a step in order; those of a layer appear once."""

    operations: tuple[Operation, ...]
    num_replays: int = 1
    num_eager: tuple[int, int] = (0, 0)  # launches of torch and of Triton outside of graphs
    num_sequences: int = 1

    def floor_us(self, device: Device) -> float:
        return sum(op.times * op.floor_us(device) for op in self.operations)

    def terms_us(
        self, device: Device, *, prefetch: bool = False, **how: Any
    ) -> list[tuple[Operation, dict[str, float]]]:
        """The terms of each operation. prefetch: attention of decodes brings the next weights to L2 meanwhile."""
        found, spare = [], 0.0
        for op in self.operations:
            in_l2 = min(spare, op.weight_bytes) if prefetch and op.weight_bytes else 0.0
            spare -= in_l2
            terms = op.terms_us(device, in_l2=in_l2, **how)
            if "split_items" in (op.launches[0].args if op.launches else {}):
                idle_us = sum(terms.values()) - terms["boundary"] - terms["bytes"]
                spare = min(PREFETCHED_BYTES, 1e3 * device.read_gb_s * max(0.0, idle_us))
            found.append((op, terms))
        return found

    def gpu_us(self, device: Device, **how: Any) -> float:
        """The time of the device, with the start of each graph."""
        ran = sum(op.times * sum(terms.values()) for op, terms in self.terms_us(device, **how))
        return ran + self.num_replays * device.graph_start_us

    def host_us(self, device: Device) -> float:
        """The time of the host's thread, which overlaps that of the device unless it is longer."""
        torch_launches, triton_launches = self.num_eager
        eager = torch_launches * device.eager_us + triton_launches * device.eager_triton_us
        replays = (self.num_replays - 1) * device.replay_us
        return device.host_step_us + (self.num_sequences - 1) * device.host_sequence_us + eager + replays


def kernel_name(launch: Launch) -> str:
    name: str = launch.kernel.fn.__name__
    return name


def work_of(launch: Launch, case: Case, cost: Cost) -> Work:
    """Describes a launch to the model. Whatever a plan function decides is read from the launch, not assumed here."""
    constexprs, itemsize = launch.constexprs, DTYPE.itemsize
    programs, moved = math.prod(launch.grid), cost.bytes
    found: dict[str, Any] = {"kernel": kernel_name(launch), "bytes": moved, "flops": cost.flops, "pdl": launch.pdl}
    found |= {"resident": max(1, RESIDENT_WARPS // launch.num_warps), "programs": programs}
    if "split_items" in launch.args:  # decode attention: programs without an item do nothing
        splits = plan_splits([-(-length // case["P"]) for length in case["seq_lens"]], launch.grid[0])
        parts = max(map(len, splits))
        piece_bytes = 2 * constexprs["BLOCK"] * constexprs["C"] * itemsize  # keys and values
        found["resident"] = min(found["resident"], TARGET.shared_bytes // (launch.num_stages * piece_bytes))
        found |= {"programs": sum(map(len, splits)) * launch.grid[1], "unit": "attention", "looks_up": True}
        found |= {"in_flight": (launch.num_stages - 1) * piece_bytes}
        found |= {"exchanges": parts > 1, "parts": parts if parts > 1 else 0}
    elif "block_table" in launch.args:  # prefill attention; more programs than blocks of queries share their keys
        new_lens, num_keys = [new for _, new in case["chunks"]], max(map(sum, case["chunks"]))
        queries = constexprs["BLOCK_M"] // (case["H"] // case["G"])
        blocks = -(-max(new_lens) // queries) * case["G"] * len(new_lens)
        key_blocks = -(-num_keys // constexprs["BLOCK_N"])
        splits = max(1, min(programs // blocks, key_blocks // LEAST_KEY_BLOCKS))
        found |= {"key_blocks": -(-key_blocks // splits), "looks_up": True}
        found |= {"exponentials": cost.flops / (4 * case["C"]), "exchanges": splits > 1}
        found |= {"parts": splits if splits > 1 else 0}
    elif "GROUP_M" in constexprs:  # the fused product
        stage_bytes = (constexprs["BLOCK_M"] + constexprs["BLOCK_N"]) * constexprs["BLOCK_K"] * itemsize
        blocks = -(-case["R"] // constexprs["BLOCK_M"]) * -(-case["N"] // constexprs["BLOCK_N"])
        found |= {"unit": "matrix", "rounds": -(-blocks // NUM_SMS), "in_flight": (launch.num_stages - 1) * stage_bytes}
    elif "BLOCK_K" in constexprs:  # gemv, gemv_qkv load chunks of the weight, the first before the previous kernel ends
        found["in_flight"] = constexprs["BLOCK_N"] * constexprs["BLOCK_K"] * itemsize * max(1, launch.num_stages - 1)
        if constexprs["STAGES"]:
            stage_bytes = (constexprs["BLOCK_N"] + constexprs["ROWS"]) * constexprs["BLOCK_K"] * itemsize
            found["resident"] = TARGET.shared_bytes // (launch.num_stages * stage_bytes)
        found |= {"unit": "matrix" if constexprs["MATRIX"] else "cores", "weights_first": True}
        found |= {"rounds": -(-programs // NUM_SMS), "exchanges": constexprs["SPLIT"]}
    elif "SLICES" in constexprs:  # sample has two loads on their way; its second kernel reads from L2
        draws = kernel_name(launch) == "draw_kernel"
        found |= {"draws": draws, "in_flight": 2 * constexprs["BLOCK"] * itemsize, "bytes": 0 if draws else moved}
    else:  # kernels that work by row or by block ask for all of it at once
        found |= {"resident": LIGHT_WARPS // launch.num_warps, "in_flight": moved / max(1, programs)}
        found |= {"looks_up": not {"slot", "token_id"}.isdisjoint(launch.args)}
    return Work(**found)


def planned(spec: KernelSpec, sizes: dict[str, Any], name: str, times: int = 1, weight_elements: int = 0) -> Operation:
    case = Case(name, sizes)
    cost, launches = spec.cost(case, DTYPE), launches_of(spec, case)
    works = tuple(work_of(launch, case, cost) for launch in launches)
    works = works or (Work(kernel="cuBLAS", bytes=cost.bytes, flops=cost.flops, unit="cublas"),)
    return Operation(name, times, case, cost, launches, works, weight_elements * DTYPE.itemsize)


def launches_of(spec: KernelSpec, case: Case) -> tuple[Launch, ...]:
    return spec.plan(**arguments_of(spec, case, DTYPE, torch.device("meta")), target=TARGET)


def _layers(c: DecoderConfig, rows: int, *attention: Operation) -> list[Operation]:
    """The operations of all layers for `rows` tokens. attention: that of decodes, and that of a prompt."""
    times, width, mlp, heads, groups = c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    channels, num_qkv = c.head_dim, (heads + 2 * groups) * c.head_dim
    token = _heads(c)
    rotary = planned(QKV_ROPE_KV, token | {"T": rows, "norms": c.qk_norm}, "rotary, KV write", times)
    if rows <= MAX_ROWS:
        sizes = token | {"R": rows, "D": width, "bias": c.qkv_bias}
        swiglu = {"norm": True, "activation": "swiglu"}
        first = [planned(GEMV_QKV, sizes, "norm, qkv, rotary, KV write", times, num_qkv * width)]
        if c.qk_norm:
            first = [_gemv("norm, qkv", times, rows, num_qkv, width, norm=True, bias=c.qkv_bias), rotary]
        return [
            *first,
            *attention,
            _gemv("o, residual", times, rows, width, heads * channels, residual=True),
            _gemv("norm, gate/up, SwiGLU", times, rows, 2 * mlp, width, **swiglu),
            _gemv("down, residual", times, rows, width, mlp, residual=True),
        ]
    norm = {"R": rows, "D": width}
    return [
        planned(RMS_NORM, norm, "norm", times),
        _product("qkv", times, rows, num_qkv, width, bias=c.qkv_bias),
        rotary,
        *attention,
        _product("o, residual", times, rows, width, heads * channels, "residual"),
        planned(RMS_NORM, norm, "norm", times),
        _product("gate/up", times, rows, 2 * mlp, width),
        planned(SWIGLU, {"T": rows, "F": mlp}, "SwiGLU", times),
        _product("down, residual", times, rows, width, mlp, "residual"),
    ]


def _gemv(name: str, times: int, rows: int, n: int, k: int, **how: Any) -> Operation:
    return planned(GEMV, {"R": rows, "N": n, "K": k, **how}, name, times, n * k)


def _product(name: str, times: int, rows: int, n: int, k: int, epilogue: str = "none", bias: bool = False) -> Operation:
    """The torch product, or the fused kernel if a table has one that is faster."""
    sizes = {"R": rows, "N": n, "K": k, "epilogue": epilogue, "bias": bias, "scale": False}
    operation = planned(GEMM_EPILOGUE, sizes, name, times, n * k)
    assert all("GROUP_M" in launch.constexprs for launch in operation.launches), "nothing follows these torch products"
    return operation


def _logits_and_draw(c: DecoderConfig, rows: int) -> list[Operation]:
    if rows <= MAX_ROWS:
        logits = [_gemv("norm, lm_head", 1, rows, c.vocab_size, c.hidden_size, norm=True)]
    else:
        norm = planned(RMS_NORM, {"R": rows, "D": c.hidden_size}, "final norm")
        logits = [norm, _product("lm_head", 1, rows, c.vocab_size, c.hidden_size)]
    return [*logits, planned(SAMPLE, {"R": rows, "V": c.vocab_size, "parameters": (PLAIN,)}, "sample")]


def _decode_attention(c: DecoderConfig, seq_lens: list[int]) -> Operation:
    room = num_split_items(len(seq_lens), c.num_kv_heads, TARGET.num_sms)
    return planned(DECODE_ATTENTION, _heads(c) | {"seq_lens": seq_lens, "room": room}, "attention", c.num_layers)


def _prompt_attention(c: DecoderConfig, tokens: int, cached: int) -> Operation:
    return planned(PREFILL_ATTENTION, _heads(c) | {"chunks": ((cached, tokens),)}, "prompt's attention", c.num_layers)


def _heads(c: DecoderConfig) -> dict[str, int]:
    return {"H": c.num_heads, "G": c.num_kv_heads, "C": c.head_dim, "P": BLOCK_SIZE}


def _embedding(c: DecoderConfig, rows: int) -> Operation:
    return planned(EMBED_TOKENS, {"T": rows, "R": rows, "V": c.vocab_size, "D": c.hidden_size}, "embedding")


def config_of(model: str) -> DecoderConfig:
    decoder = load_config(KNOWN_MODELS[model]).decoder
    if decoder.experts is not None:
        raise ValueError(f"{model} has experts, whose launches are not planned; choose another model")
    return decoder


@cache
def decode_step(model: str, batch: int, context: int) -> Step:
    """A step in which each of `batch` sequences has `context` tokens. Pictures and prompts have no part in it."""
    c = config_of(model)
    rows = next(bucket for bucket in decode_buckets(max(MAX_SEQS, batch)) if bucket >= batch)
    attention = _decode_attention(c, [context] * batch + [0] * (rows - batch))
    operations = (_embedding(c, rows), *_layers(c, rows, attention), *_logits_and_draw(c, rows))
    return Step(operations, num_sequences=batch)


@cache
def prompt_step(model: str, tokens: int, cached: int = 0, *, batch: int = 0, context: int = 0) -> Step:
    """A step of one prompt: `tokens` of it behind `cached` ones, beside `batch` decodes of `context` tokens each.

    Its layers are one graph if there is a bucket for them, and its head is another one.
    """
    c = config_of(model)
    holding = [
        size
        for size in layer_buckets(c, MAX_SEQS, MAX_TOKENS)
        if size[0] >= batch and size[1] == 1 and size[2] >= tokens
    ]
    beside, _, bucket = min(holding, default=(batch, 1, tokens))
    prompt = _prompt_attention(c, bucket, cached)
    decodes = [_decode_attention(c, [context] * batch + [0] * (beside - batch))] if beside else []
    layers = _layers(c, beside + bucket, *decodes, prompt)
    draws = next(n for n in decode_buckets(MAX_SEQS) if n > batch) if holding else batch + 1
    operations = (_embedding(c, beside + bucket), *layers, *_logits_and_draw(c, draws))
    if holding:
        return Step(operations, num_replays=2, num_sequences=batch + 1)
    by_torch = sum(op.times for op in layers if not op.launches)
    by_triton = sum(op.times for op in layers) - by_torch
    eager = EAGER_TORCH + by_torch, EAGER_TRITON + by_triton
    return Step(operations, num_replays=0, num_eager=eager, num_sequences=batch + 1)
