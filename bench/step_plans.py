"""The launches of a step, as the engine makes them: from the kernels' own plan functions, chosen as `ops_triton` does.

No GPU is needed: plans are made for tensors without memory. A step of decodes is one graph. A step with a prompt is the
graph of its layers, in which sequences may decode beside the prompt, each padded to its bucket, and that of its head.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from launch_model import PREFETCHED_BYTES, Device, Work, predict
from launch_work import DTYPE, TARGET, is_fused_product, torch_product, work_of

from internvl_rt.checkpoint.config import KNOWN_MODELS, DecoderConfig, ExpertsConfig, load_config
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._contract import Case, Cost, KernelSpec
from internvl_rt.kernels._expert_cases import touched_bytes
from internvl_rt.kernels._expert_plan import choose_block
from internvl_rt.kernels._gemv_plan import MAX_ROWS
from internvl_rt.kernels._launch import Launch
from internvl_rt.kernels._split_plan import num_split_items
from internvl_rt.kernels.decode_attention import SPEC as DECODE_ATTENTION
from internvl_rt.kernels.embed_tokens import SPEC as EMBED_TOKENS
from internvl_rt.kernels.expert_down import SPEC as EXPERT_DOWN
from internvl_rt.kernels.expert_gate_up import SPEC as EXPERT_GATE_UP
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as GEMV_QKV
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL_ATTENTION
from internvl_rt.kernels.qkv_rope_kv import SPEC as QKV_ROPE_KV
from internvl_rt.kernels.rms_norm import SPEC as RMS_NORM
from internvl_rt.kernels.route_experts import SPEC as ROUTE_EXPERTS
from internvl_rt.kernels.sample import PLAIN
from internvl_rt.kernels.sample import SPEC as SAMPLE
from internvl_rt.kernels.swiglu import SPEC as SWIGLU
from internvl_rt.steps.step_graph import decode_buckets, layer_buckets

BLOCK_SIZE = 64
MAX_TOKENS, MAX_SEQS = 8192, 256  # of a step: the graphs of an engine
# What a step without a graph launches besides its layers. By torch: a copy of the wanted row's number, and that row. By
# Triton: the embedding, the row's logits, and the two kernels of its draw.
EAGER_TORCH, EAGER_TRITON = 2, 4


@dataclass(frozen=True, slots=True)
class Operation:
    """A part of a step: the launches of one SPEC, with a product of torch before them if `by_torch` says so."""

    name: str
    times: int  # how often a step runs it
    case: Case
    cost: Cost
    launches: tuple[Launch, ...]
    works: tuple[Work, ...]
    weight_bytes: int = 0
    by_torch: bool = False

    def floor_us(self, device: Device) -> float:
        """A lower bound: the time by the data sheet's bandwidth or its arithmetic, whichever is longer."""
        return max(self.cost.bytes / (1e3 * device.sheet_gb_s), self.cost.flops / (1e6 * device.sheet_tflops))

    @property
    def args(self) -> Mapping[str, Any]:
        """The arguments of the first launch."""
        return self.launches[0].args if self.launches else {}

    def terms_us(self, device: Device, *, in_l2: float = 0.0, **how: Any) -> dict[str, float]:
        """The predicted time of one run by what it is spent on. in_l2: bytes of its weight that were brought to L2."""
        first, *later = self.works
        each = [predict(first, device, in_l2=in_l2, **how), *(predict(work, device, **how) for work in later)]
        return {name: sum(terms[name] for terms in each) for name in each[0]}


@dataclass(frozen=True, slots=True)
class Step:
    """The operations of a step in order; those of a layer appear once, with attention of each window that there is."""

    operations: tuple[Operation, ...]
    num_replays: int = 1
    num_eager: tuple[int, int] = (0, 0)  # launches of torch and of Triton outside of graphs
    num_sequences: int = 1

    def floor_us(self, device: Device) -> float:
        return sum(op.times * op.floor_us(device) for op in self.operations)

    def terms_us(
        self, device: Device, *, prefetch: bool = False, **how: Any
    ) -> list[tuple[Operation, dict[str, float]]]:
        """The terms of each operation. prefetch: attention of decodes brings the next weights to L2 meanwhile.

        Where only some layers have a window, what attention of either kind has time for counts by its share of them.
        """
        found, spare = [], 0.0
        num_layers = sum(op.times for op in self.operations if "split_items" in op.args)
        for op in self.operations:
            if "block_expert" in op.args:
                spare = 0.0  # nobody knows before the routing which weights will be read
            in_l2 = min(spare, op.weight_bytes) if prefetch and op.weight_bytes else 0.0
            spare -= in_l2
            terms = op.terms_us(device, in_l2=in_l2, **how)
            if "split_items" in op.args:
                idle_us = sum(terms.values()) - terms["boundary"] - terms["bytes"]
                brought = min(PREFETCHED_BYTES, 1e3 * device.read_gb_s * max(0.0, idle_us))
                spare += brought * op.times / num_layers
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


def planned(
    spec: KernelSpec,
    sizes: dict[str, Any],
    name: str,
    times: int = 1,
    weight_elements: int = 0,
    counted: dict[str, Any] | None = None,
) -> Operation:
    """Plans the launches of a case. counted: the sizes by which its work is counted, if they are others."""
    case, of_work = Case(name, sizes), Case(name, sizes if counted is None else counted)
    cost, launches = spec.cost(of_work, DTYPE), launches_of(spec, case)
    by_torch = spec is GEMM_EPILOGUE and not any(map(is_fused_product, launches))
    works = tuple(work_of(launch, of_work, cost) for launch in launches)
    works = (torch_product(launches, cost), *works) if by_torch else works
    return Operation(name, times, case, cost, launches, works, weight_elements * DTYPE.itemsize, by_torch)


def launches_of(spec: KernelSpec, case: Case) -> tuple[Launch, ...]:
    return spec.plan(**arguments_of(spec, case, DTYPE, torch.device("meta")), target=TARGET)


def _layers(c: DecoderConfig, rows: int, choices: int, attention: list[Operation]) -> list[Operation]:
    """The operations of all layers for `rows` tokens, of which `choices` choose their experts independently."""
    times, width, heads_width = c.num_layers, c.hidden_size, c.num_heads * c.head_dim
    o = "o, residual", times, rows, width, heads_width
    if rows <= MAX_ROWS:
        attended = [*attention, _gemv(*o, residual=True, bias=c.o_bias)]
    else:
        attended = [*attention, _product(*o, "residual", bias=c.o_bias)]
    second = _mlp(c, rows) if c.experts is None else _mixture(c, c.experts, rows, choices)
    return [*_qkv(c, rows), *attended, *second]


def _qkv(c: DecoderConfig, rows: int) -> list[Operation]:
    """What comes before attention. It is one kernel for few rows, unless q and k have norms or are scaled."""
    times, width, num_qkv = c.num_layers, c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    rope_scale = 1.0 if c.yarn is None else c.yarn.scale
    if rows <= MAX_ROWS and not c.qk_norm and rope_scale == 1:
        sizes = _heads(c) | {"R": rows, "D": width, "bias": c.qkv_bias}
        return [planned(GEMV_QKV, sizes, "norm, qkv, rotary, KV write", times, num_qkv * width)]
    if rows <= MAX_ROWS:
        product = [_gemv("norm, qkv", times, rows, num_qkv, width, norm=True, bias=c.qkv_bias)]
    else:
        product = [_norm(c, rows), _product("qkv", times, rows, num_qkv, width, bias=c.qkv_bias)]
    sizes = _heads(c) | {"T": rows, "norms": c.qk_norm, "rope_scale": rope_scale}
    return [*product, planned(QKV_ROPE_KV, sizes, "rotary, KV write", times)]


def _mlp(c: DecoderConfig, rows: int) -> list[Operation]:
    times, width, mlp = c.num_layers, c.hidden_size, c.intermediate_size
    if rows <= MAX_ROWS:
        swiglu = {"norm": True, "activation": "swiglu"}
        return [
            _gemv("norm, gate/up, SwiGLU", times, rows, 2 * mlp, width, **swiglu),
            _gemv("down, residual", times, rows, width, mlp, residual=True),
        ]
    return [
        _norm(c, rows),
        _product("gate/up", times, rows, 2 * mlp, width),
        planned(SWIGLU, {"T": rows, "F": mlp}, "SwiGLU", times),
        _product("down, residual", times, rows, width, mlp, "residual"),
    ]


def _mixture(c: DecoderConfig, e: ExpertsConfig, rows: int, choices: int) -> list[Operation]:
    """A mixture of experts. Only the router's product is another for few rows."""
    times, width, mlp = c.num_layers, c.hidden_size, c.intermediate_size
    router = _gemv if rows <= MAX_ROWS else _product
    sizes: dict[str, Any] = {"T": rows, "X": e.num_experts, "J": e.num_chosen, "D": width, "F": mlp}
    sizes |= {"block": choose_block(rows, e.num_chosen, e.num_experts), "renormalise": e.renormalises}
    sizes |= {"bias": e.biases, "gate": e.gate}

    def product(spec: KernelSpec, name: str, n: int, k: int) -> Operation:
        counted = sizes | {"T": choices}
        read = touched_bytes(Case(name, counted), n, k, DTYPE)
        return planned(spec, sizes, name, times, read // DTYPE.itemsize, counted)

    return [
        _norm(c, rows),
        router("router", times, rows, e.num_experts, width, bias=e.biases),
        planned(ROUTE_EXPERTS, sizes, "routing", times),
        product(EXPERT_GATE_UP, "experts' gate/up, SwiGLU", 2 * mlp, width),
        product(EXPERT_DOWN, "experts' down, residual", width, mlp),
    ]


def _norm(c: DecoderConfig, rows: int) -> Operation:
    return planned(RMS_NORM, {"R": rows, "D": c.hidden_size}, "norm", c.num_layers)


def _gemv(name: str, times: int, rows: int, n: int, k: int, **how: Any) -> Operation:
    return planned(GEMV, {"R": rows, "N": n, "K": k, **how}, name, times, n * k)


def _product(name: str, times: int, rows: int, n: int, k: int, epilogue: str = "none", bias: bool = False) -> Operation:
    """The torch product and what follows it, or the fused kernel if a table has one that is faster."""
    sizes = {"R": rows, "N": n, "K": k, "epilogue": epilogue, "bias": bias, "scale": False}
    return planned(GEMM_EPILOGUE, sizes, name, times, n * k)


def _logits_and_draw(c: DecoderConfig, rows: int) -> list[Operation]:
    if rows <= MAX_ROWS:
        logits = [_gemv("norm, lm_head", 1, rows, c.vocab_size, c.hidden_size, norm=True)]
    else:
        norm = planned(RMS_NORM, {"R": rows, "D": c.hidden_size}, "final norm")
        logits = [norm, _product("lm_head", 1, rows, c.vocab_size, c.hidden_size)]
    return [*logits, planned(SAMPLE, {"R": rows, "V": c.vocab_size, "parameters": (PLAIN,)}, "sample")]


def _attention(c: DecoderConfig, seq_lens: list[int], chunk: tuple[int, int] | None = None) -> list[Operation]:
    """Attention of layers without a window and of those with one. chunk: cached and new tokens of a prompt."""
    found = []
    for window, times in Counter(c.windows or (None,) * c.num_layers).items():
        name = "attention" if window is None else "window attention"
        heads: dict[str, Any] = _heads(c) | ({"sinks": "own"} if c.sinks else {})
        heads |= {} if window is None else {"window": window}
        if seq_lens:
            room = num_split_items(len(seq_lens), c.num_kv_heads, TARGET.num_sms)
            found.append(planned(DECODE_ATTENTION, heads | {"seq_lens": seq_lens, "room": room}, name, times))
        if chunk is not None:
            found.append(planned(PREFILL_ATTENTION, heads | {"chunks": (chunk,)}, f"prompt's {name}", times))
    return found


def _heads(c: DecoderConfig) -> dict[str, int]:
    return {"H": c.num_heads, "G": c.num_kv_heads, "C": c.head_dim, "P": BLOCK_SIZE}


def _embedding(c: DecoderConfig, rows: int) -> Operation:
    return planned(EMBED_TOKENS, {"T": rows, "R": rows, "V": c.vocab_size, "D": c.hidden_size}, "embedding")


def config_of(model: str) -> DecoderConfig:
    return load_config(KNOWN_MODELS[model]).decoder


@cache
def decode_step(model: str, batch: int, context: int) -> Step:
    """A step in which each of `batch` sequences has `context` tokens. Pictures and prompts have no part in it.

    The rows that pad it are alike, so that all of them choose the same experts.
    """
    c = config_of(model)
    rows = next(bucket for bucket in decode_buckets(max(MAX_SEQS, batch)) if bucket >= batch)
    attention = _attention(c, [context] * batch + [0] * (rows - batch))
    layers = _layers(c, rows, batch + (rows > batch), attention)
    operations = (_embedding(c, rows), *layers, *_logits_and_draw(c, rows))
    return Step(operations, num_sequences=batch)


@cache
def prompt_step(model: str, tokens: int, cached: int = 0, *, batch: int = 0, context: int = 0) -> Step:
    """A step of one prompt: `tokens` of it behind `cached` ones, beside `batch` decodes of `context` tokens each.

    Its layers are one graph if there is a bucket for them, and its head is another one. Attention writes nothing for
    the tokens that pad a prompt, so they may choose any experts.
    """
    c = config_of(model)
    holding = [
        size
        for size in layer_buckets(c, MAX_SEQS, MAX_TOKENS)
        if size[0] >= batch and size[1] == 1 and size[2] >= tokens
    ]
    beside, _, bucket = min(holding, default=(batch, 1, tokens))
    attention = _attention(c, [context] * batch + [0] * (beside - batch), (cached, bucket))
    layers = _layers(c, beside + bucket, batch + (beside > batch) + bucket, attention)
    draws = next(n for n in decode_buckets(MAX_SEQS) if n > batch) if holding else batch + 1
    operations = (_embedding(c, beside + bucket), *layers, *_logits_and_draw(c, draws))
    if holding:
        return Step(operations, num_replays=2, num_sequences=batch + 1)
    by_torch = sum(op.times * op.by_torch for op in layers)
    by_triton = sum(op.times * len(op.launches) for op in layers)
    eager = EAGER_TORCH + by_torch, EAGER_TRITON + by_triton
    return Step(operations, num_replays=0, num_eager=eager, num_sequences=batch + 1)
