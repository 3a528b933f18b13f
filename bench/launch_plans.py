"""Plans every launch of a decode step on an H200 and predicts its share of the roofline; nothing is measured.

    python bench/launch_plans.py [--out FILE.md]

The steps are those of the seven sizes at batch 1, 8 and 64, with 2,048 tokens of context, in bfloat16. The launches
come from the kernels' own plan functions, chosen as `ops_triton` chooses, and the split of attention from the cache's
bookkeeping in C++; no GPU is needed. `predict` models the time of a launch. The rows that logits are computed for need
no gathering here, because a step of decodes uses all of them.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_rt._C import PagedKVCache
from internvl_rt.checkpoint.config import KNOWN_MODELS, DecoderConfig, load_config
from internvl_rt.kernels._contract import Case, Cost, KernelSpec
from internvl_rt.kernels._gemv_plan import MAX_ROWS
from internvl_rt.kernels._launch import TARGETS, Launch
from internvl_rt.kernels._split_plan import num_split_items
from internvl_rt.kernels.decode_attention import SPEC as DECODE_ATTENTION
from internvl_rt.kernels.embed_tokens import SPEC as EMBED_TOKENS
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as GEMV_QKV
from internvl_rt.kernels.qkv_rope_kv import SPEC as QKV_ROPE_KV
from internvl_rt.kernels.rms_norm import SPEC as RMS_NORM
from internvl_rt.kernels.sample import PLAIN
from internvl_rt.kernels.sample import SPEC as SAMPLE
from internvl_rt.kernels.swiglu import SPEC as SWIGLU

TARGET, DTYPE = TARGETS[90], torch.bfloat16
BATCHES, CONTEXT, BLOCK_SIZE = (1, 8, 64), 2048, 64
GOALS_MS = {("InternVL3-1B", 1): 0.45, ("InternVL3-8B", 1): 4.2}

# From an H200's data sheet; the floors are computed from these.
SHEET_BYTES_PER_US = 4.8e6
SHEET_FLOPS_PER_US = 989e6  # dense bfloat16
# Assumptions about an H200, to be replaced by measurements; the predictions are computed from these.
BYTES_PER_US = 4.3e6  # of a copy
FLOPS_PER_US = 780e6  # of a large product
SM_BYTES_PER_US = 64 * 1755.0  # 64 bytes a clock for one multiprocessor
LATENCY_US = 0.9  # of device memory under load, as gemv.py assumes
LAUNCH_US = 2.0  # from the end of a kernel to the first load of the next, which waits for that end
PDL_LAUNCH_US = 1.0  # the same in a graph, if the next kernel has started already
CUBLAS_SHARE = 0.8  # what cuBLAS reaches of the roof, for a product of some tens of rows
RESIDENT_WARPS = 16  # warps of a multiprocessor with 128 registers a thread
# The work of sampling's second kernel, by the estimate in kernels/sample.py: 8 to 10 us for a row without filters.
SAMPLE_WEIGHTS_US, SAMPLE_DRAW_US = 2.0, 3.0


@dataclass(frozen=True, slots=True)
class Operation:
    """A part of a step: the launches of one SPEC, or a torch product if `launches` is empty."""

    name: str
    times: int  # how often a step runs it
    case: Case
    cost: Cost
    launches: tuple[Launch, ...]
    weight_bytes: int = 0

    @property
    def floor_us(self) -> float:
        """A lower bound: the time by the data sheet's bandwidth or its arithmetic, whichever is longer."""
        return max(self.cost.bytes / SHEET_BYTES_PER_US, self.cost.flops / SHEET_FLOPS_PER_US)

    @property
    def terms_us(self) -> dict[str, float]:
        """The predicted time by what it is spent on."""
        if not self.launches:
            work = max(self.cost.bytes / BYTES_PER_US, self.cost.flops / FLOPS_PER_US)
            first = {"its launch": LAUNCH_US, "the first load's latency": LATENCY_US}
            return first | {"its work": work, "what cuBLAS leaves of the roof": work / CUBLAS_SHARE - work}
        each = [predict(launch, self.case, self.cost) for launch in self.launches]
        return {name: sum(terms.get(name, 0.0) for terms in each) for name in each[-1]}

    @property
    def predicted_us(self) -> float:
        return sum(self.terms_us.values())

    @property
    def share(self) -> float:
        return self.floor_us / self.predicted_us


def kernel_name(launch: Launch) -> str:
    name: str = launch.kernel.fn.__name__.strip("_")
    return name


def predict(launch: Launch, case: Case, cost: Cost) -> dict[str, float]:
    """Predicts the microseconds of one launch, by what they are spent on.

    Launch and first load come first. Then the bytes stream at the rate of the device or of its busiest multiprocessor;
    by Little's law its rate is its bytes in flight divided by the latency. Partial results cost two latencies more.
    """
    constexprs, itemsize = launch.constexprs, DTYPE.itemsize
    programs = launch.grid[0] * launch.grid[1]
    resident = max(1, RESIDENT_WARPS // launch.num_warps)
    in_flight = cost.bytes / programs  # kernels that work by row ask for a whole row at once
    prefetched = exchanged = False
    if "split_items" in launch.args:  # attention
        piece_bytes = 2 * constexprs["BLOCK"] * constexprs["C"] * itemsize  # keys and values
        in_flight = (launch.num_stages - 1) * piece_bytes
        resident = min(resident, TARGET.shared_bytes // (launch.num_stages * piece_bytes))
        programs = case["num_items"] * launch.grid[1]  # the other programs have nothing to do
        exchanged = case["num_items"] > len(case["seq_lens"])
    elif "GROUP_M" in constexprs:  # the fused product
        stage_bytes = (constexprs["BLOCK_M"] + constexprs["BLOCK_N"]) * constexprs["BLOCK_K"] * itemsize
        in_flight = (launch.num_stages - 1) * stage_bytes
    elif "BLOCK_K" in constexprs:  # gemv, gemv_qkv load chunks of the weight, the first before the previous kernel ends
        in_flight = constexprs["BLOCK_N"] * constexprs["BLOCK_K"] * itemsize * max(1, launch.num_stages - 1)
        if constexprs["STAGES"]:
            stage_bytes = (constexprs["BLOCK_N"] + constexprs["ROWS"]) * constexprs["BLOCK_K"] * itemsize
            resident = TARGET.shared_bytes // (launch.num_stages * stage_bytes)
        prefetched, exchanged = launch.pdl, constexprs["SPLIT"]
    elif "SLICES" in constexprs:  # sample has two loads on their way
        in_flight = 2 * constexprs["BLOCK"] * itemsize
    on_busiest = -(-programs // TARGET.num_sms)
    its_bytes = on_busiest * cost.bytes / programs
    flying = min(its_bytes, min(resident, on_busiest) * in_flight)
    busiest = flying / SM_BYTES_PER_US + (its_bytes - flying) / min(SM_BYTES_PER_US, flying / LATENCY_US)
    device = max(cost.bytes / BYTES_PER_US, cost.flops / FLOPS_PER_US)
    terms = {
        "its launch": PDL_LAUNCH_US if launch.pdl else LAUNCH_US,
        "the first load's latency": 0.0 if prefetched else LATENCY_US,
        "its work": device,
        "the load of its busiest multiprocessor": max(0.0, busiest - device),
        "the exchange of partial results": 2 * LATENCY_US * exchanged,
    }
    if kernel_name(launch) == "draw_kernel":
        waves = -(-programs // (TARGET.num_sms * resident))
        terms["its arithmetic"] = waves * SAMPLE_WEIGHTS_US + SAMPLE_DRAW_US
        terms["the load of its busiest multiprocessor"] = 0.0  # SAMPLE_WEIGHTS_US includes it
    return terms


def planned(spec: KernelSpec, sizes: dict[str, Any], name: str, times: int = 1, weight_elements: int = 0) -> Operation:
    case = Case(name, sizes)
    inputs = spec.make_inputs(case, DTYPE, torch.device("meta"))
    launches = spec.plan(**inputs, out=torch.empty_like(spec.reference(**inputs)), target=TARGET)
    return Operation(name, times, case, spec.cost(case, DTYPE), launches, weight_elements * DTYPE.itemsize)


def split_plan(batch: int, num_kv_heads: int) -> tuple[int, int, int]:
    """How the cache splits decode attention: items with work, room for items, and blocks of an item."""
    room = num_split_items(batch, num_kv_heads, TARGET.num_sms)
    blocks = PagedKVCache(batch * -(-CONTEXT // BLOCK_SIZE), BLOCK_SIZE)
    for seq_id in range(batch):
        blocks.admit(seq_id, np.zeros(CONTEXT, np.int32), identity=None)
    seq_ids, one_each = np.arange(batch, dtype=np.int32), np.ones(batch, np.int32)
    blocks.append(seq_ids, (CONTEXT - 1) * one_each)
    blocks.append(seq_ids, one_each)
    shapes = {"query_start_S1": batch + 1, "seq_len_S": batch, "block_table_SN": (batch, CONTEXT // BLOCK_SIZE)}
    shapes |= {"slot_T": batch, "split_start_S1": batch + 1, "split_W3": (room, 3)}
    step = {name: np.empty(shape, np.int32) for name, shape in shapes.items()}
    blocks.fill_step(seq_ids, one_each, **step)
    row, first, end = step["split_W3"].T
    return int((row >= 0).sum()), room, int(end[0] - first[0])


def plan_step(c: DecoderConfig, batch: int) -> list[Operation]:
    """The operations of one decode step in order; operations of a layer appear once."""
    times, width, mlp, heads, groups = c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    channels, num_qkv = c.head_dim, (heads + 2 * groups) * c.head_dim
    token = {"H": heads, "G": groups, "C": channels, "P": BLOCK_SIZE}
    num_items, room, split = split_plan(batch, groups)
    lens = {"seq_lens": [CONTEXT] * batch, "split": split, "spare": room - num_items, "num_items": num_items}
    attention = planned(DECODE_ATTENTION, token | lens, "attention", times)
    embedding = planned(EMBED_TOKENS, {"T": batch, "R": batch, "V": c.vocab_size, "D": width}, "embedding")
    if batch <= MAX_ROWS and not c.qk_norm:
        sizes = token | {"R": batch, "D": width, "bias": c.qkv_bias}
        found = [planned(GEMV_QKV, sizes, "norm, qkv, rotary, KV write", times, num_qkv * width), attention]
        products: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
            ("o, residual", width, heads * channels, {"residual": True}),
            ("norm, gate/up, SwiGLU", 2 * mlp, width, {"norm": True, "activation": "swiglu"}),
            ("down, residual", width, mlp, {"residual": True}),
            ("norm, lm_head", c.vocab_size, width, {"norm": True}),
        )
        for name, n, k, how in products:
            sizes = {"R": batch, "N": n, "K": k, **how}
            found.append(planned(GEMV, sizes, name, 1 if n == c.vocab_size else times, n * k))
    else:
        norm = {"R": batch, "D": width}
        found = [
            planned(RMS_NORM, norm, "norm", times),
            _product("qkv", times, batch, num_qkv, width, bias=c.qkv_bias),
            planned(QKV_ROPE_KV, token | {"T": batch, "norms": c.qk_norm}, "rotary, KV write", times),
            attention,
            _product("o, residual", times, batch, width, heads * channels, "residual"),
            planned(RMS_NORM, norm, "norm", times),
            _product("gate/up", times, batch, 2 * mlp, width),
            planned(SWIGLU, {"T": batch, "F": mlp}, "SwiGLU", times),
            _product("down, residual", times, batch, width, mlp, "residual"),
            planned(RMS_NORM, norm, "final norm"),
            _product("lm_head", 1, batch, c.vocab_size, width),
        ]
    return [embedding, *found, planned(SAMPLE, {"R": batch, "V": c.vocab_size, "parameters": (PLAIN,)}, "sample")]


def _product(name: str, times: int, rows: int, n: int, k: int, epilogue: str = "none", bias: bool = False) -> Operation:
    """The torch product, or the fused kernel if a table has one that is faster."""
    sizes = {"R": rows, "N": n, "K": k, "epilogue": epilogue, "bias": bias, "scale": False}
    operation = planned(GEMM_EPILOGUE, sizes, name, times, n * k)
    assert all("GROUP_M" in launch.constexprs for launch in operation.launches), "nothing follows these torch products"
    return operation


@cache
def plans() -> dict[tuple[str, int], list[Operation]]:
    return {
        (name, batch): plan_step(load_config(path).decoder, batch)
        for name, path in KNOWN_MODELS.items()
        for batch in BATCHES
    }


def step_us(operations: list[Operation]) -> tuple[float, float]:
    """The floor and the predicted time of a whole step."""
    return sum(op.times * op.floor_us for op in operations), sum(op.times * op.predicted_us for op in operations)


def _lost_us(operation: Operation) -> float:
    return operation.times * (operation.predicted_us - operation.floor_us)


def _reason(operation: Operation) -> str:
    """Names what takes most of the time beyond the floor."""
    beyond = operation.terms_us
    beyond["its work"] -= operation.floor_us
    term, lost = max(beyond.items(), key=lambda item: item[1])
    what = "a copy's bandwidth, below the data sheet's" if term == "its work" else term
    return f"{what} ({lost:.1f} us)"


def render() -> str:
    found = plans()
    lines = [
        "# Launch plans of a decode step",
        "",
        "Predicted, not measured: an H200, bfloat16, 2,048 tokens of context.",
    ]
    lines += [
        "Written by `python bench/launch_plans.py`, whose head says what is left out and how times are predicted."
    ]
    lines += [""]
    for (name, batch), goal in GOALS_MS.items():
        operations = found[name, batch]
        predicted, launches = step_us(operations)[1], sum(op.times * op.terms_us["its launch"] for op in operations)
        verdict = "within" if predicted <= 1000 * goal else "beyond"
        lines.append(
            f"* {name}, batch {batch}: {predicted / 1000:.3f} ms a step, {verdict} the goal of {goal} ms; "
            f"launches take {launches / 1000:.2f} ms of it."
        )
    (name, batch), worst = min(
        ((key, op) for key, ops in found.items() for op in ops if op.weight_bytes or op.name == "attention"),
        key=lambda pair: pair[1].share,
    )
    lines.append(
        f"* Furthest from its roof of what reads weights or the KV cache: {worst.name} of {name} at batch {batch}, "
        f"{worst.share:.1%} of it; most of the rest is {_reason(worst)}."
    )
    losers = Counter(max(ops, key=_lost_us).name for ops in found.values())
    lost, count = losers.most_common(1)[0]
    lines += [f"* What loses a step most time beyond its floor is {lost} in {count} of {len(found)} steps.", ""]
    lines += ["Floors are of the data sheet: 4.8 TB/s, 989 TFLOP/s. `share` is floor / predicted.", ""]
    lines += ["| model | batch | floor ms | predicted ms | share | loses most | of it, us | because of |"]
    lines += ["|---|---:|---:|---:|---:|---|---:|---|"]
    for (name, batch), operations in found.items():
        floor, predicted = step_us(operations)
        loser = max(operations, key=_lost_us)
        lines.append(
            f"| {name} | {batch} | {floor / 1000:.3f} | {predicted / 1000:.3f} | {floor / predicted:.0%} "
            f"| {loser.name} | {_lost_us(loser):.0f} | {_reason(loser)} |"
        )
    for (name, batch), operations in found.items():
        lines += ["", f"## {name}, batch {batch}", ""]
        lines += [
            "| operation | kernel | grid | warps | stages | times | MB | GFLOP | floor us | predicted us | share |"
        ]
        lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|", *map(_row, operations)]
    return "\n".join(lines) + "\n"


def _row(op: Operation) -> str:
    columns: list[list[object]] = [
        [kernel_name(launch) for launch in op.launches] or ["cuBLAS"],
        [" x ".join(map(str, launch.grid[:2])) for launch in op.launches],
        [launch.num_warps for launch in op.launches],
        [launch.num_stages for launch in op.launches],
    ]
    how = " | ".join(", ".join(map(str, dict.fromkeys(column))) or "-" for column in columns)
    return (
        f"| {op.name} | {how} | {op.times} | {op.cost.bytes / 1e6:.2f} | {op.cost.flops / 1e9:.3f} "
        f"| {op.floor_us:.2f} | {op.predicted_us:.2f} | {op.share:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file instead of the screen")
    out: Path | None = parser.parse_args().out
    if out is None:
        print(render(), end="")
    else:
        out.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
