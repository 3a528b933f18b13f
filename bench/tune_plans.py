"""Tries other launches of the operations whose plans are functions, not tables, for tune.py; recommends the fastest."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from internvl_rt.bench.kernel_cases import (
    Work,
    compare,
    first_line,
    importance,
    make_rotated_inputs,
    poisoned_like,
    real_work,
    run_reference,
)
from internvl_rt.bench.timing import Timing, time_variants
from internvl_rt.kernels._gemv_plan import GemvPlan, GemvWorkspace, choose_gemv_plan
from internvl_rt.kernels._launch import run, target_of
from internvl_rt.kernels.catalogue import discover_specs

RECOMMENDED = ("gemv", "gemv_qkv", "decode_attention", "prefill_attention")
MOST_IMPORTANT = 4  # classes of importance that are swept
BUDGET_S = 0.03  # seconds of a plan's samples
Row = dict[str, Any]
Calls = list[Callable[[], Any]]


def gemv_plans(rows: int, chosen: GemvPlan) -> dict[str, GemvPlan]:
    """The chosen plan, by the name "chosen", and a few neighbours; only a few, because each must be compiled."""
    plans = {"chosen": chosen}
    if not chosen.matrix:
        for block_n, num_warps in product((4, 8, 16), (4, 8)):
            plans[f"{block_n}x{256 * num_warps}, {num_warps} warps"] = GemvPlan(block_n, 256 * num_warps, num_warps)
        return _others_than_chosen(plans)
    splits = {1} if chosen.split_k == 1 else {chosen.split_k // 2, chosen.split_k, min(64, 2 * chosen.split_k)}
    if chosen.num_stages:
        staged = [(64, 128, 4, 3), (64, 128, 4, 5), (64, 256, 4, 3), (128, 128, 8, 3), (32, 128, 4, 6), (64, 64, 4, 8)]
    else:
        staged = [(16, 128, 4, 8), (16, 256, 4, 4), (32, 128, 4, 8)]
        for block_n, block_k, split_k in product((16, 32), (256, 512), sorted(splits | {2})):
            name = f"{block_n}x{block_k}, 8 warps, {split_k} splits"
            plans[name] = GemvPlan(block_n, block_k, 8, split_k, matrix=True)
    for (block_n, block_k, num_warps, stages), split_k in product(staged, sorted(splits)):
        name = f"{block_n}x{block_k}, {num_warps} warps, {split_k} splits, {stages} stages"
        plans[name] = GemvPlan(block_n, block_k, num_warps, split_k, matrix=True, num_stages=stages)
    return _others_than_chosen(plans)


def _others_than_chosen(plans: dict[str, GemvPlan]) -> dict[str, GemvPlan]:
    return {name: plan for name, plan in plans.items() if name == "chosen" or plan != plans["chosen"]}


def _gemv_calls(work: Work, sets: list[Row], outs: list[torch.Tensor]) -> Iterator[tuple[str, Calls]]:
    x_name, weight_name = ("x_RK", "weight_NK") if work.spec.name == "gemv" else ("x_RD", "weight_KD")
    rows, (n, k), device = len(sets[0][x_name]), sets[0][weight_name].shape, sets[0][x_name].device
    for name, plan in gemv_plans(rows, choose_gemv_plan(rows, n, k, work.dtype, target_of(device))).items():
        programs = -(-n // plan.block_n) * plan.split_k
        partial_sums = torch.empty(programs * 16 * (plan.block_n + 1), device=device)
        workspace = GemvWorkspace(partial_sums, torch.zeros(programs, dtype=torch.int32, device=device))
        given = {"plan": plan, "workspace": workspace}
        yield name, [partial(work.spec.launcher, **{**i, **given}, out=out) for i, out in zip(sets, outs, strict=True)]


def _attention_calls(work: Work, sets: list[Row], outs: list[torch.Tensor]) -> Iterator[tuple[str, Calls]]:
    """Yields calls with other numbers of warps and stages for the last launch, which is the attention itself."""
    device = outs[0].device
    planned = []
    for inputs, out in zip(sets, outs, strict=True):
        given = dict(inputs)
        if work.spec.name == "decode_attention":
            shape = len(inputs["q_SHC"]), inputs["k_cache_BGPC"].shape[1]
            given["counters_SG"] = torch.zeros(shape, dtype=torch.int32, device=device)
        planned.append(work.spec.plan(**given, out=out, target=target_of(device)))
    chosen = planned[0][-1]
    yield "chosen", [partial(run, launches) for launches in planned]
    for num_warps, num_stages in product((4, 8), (2, 3, 4)):
        if (num_warps, num_stages) != (chosen.num_warps, chosen.num_stages):
            how = {"num_warps": num_warps, "num_stages": num_stages}
            changed = [(*launches[:-1], replace(launches[-1], **how)) for launches in planned]
            yield f"{num_warps} warps, {num_stages} stages", [partial(run, launches) for launches in changed]


def sweep_launches(names: Sequence[str], device: torch.device, end: float) -> tuple[list[Row], list[str]]:
    """Returns a row for every plan, and the names of cases for which no time was left."""
    specs = discover_specs()
    works = [work for name in names for work in real_work(specs[name]) if importance(work) < MOST_IMPORTANT]
    works.sort(key=importance)
    rows: list[Row] = []
    for index, work in enumerate(works):
        if time.monotonic() >= end:
            return rows, [each.name for each in works[index:]]
        try:
            timings, wrong = _time_plans(work, device)
        except Exception as error:
            print(f"{work.name}: {first_line(error)}", flush=True)
            rows.append({"name": work.name, "problem": first_line(error)})
            continue
        for name, problem in wrong.items():
            print(f"{work.name}: {name} is wrong: {problem}", file=sys.stderr, flush=True)
            rows.append({"name": work.name, "plan": name, "problem": problem})
        for name, timing in timings.items():
            row = {"name": work.name, "plan": name, "median_us": timing.median_us}
            rows.append({**row, "low_us": timing.low_us, "high_us": timing.high_us})
        print(recommend(work.name, timings), flush=True)
    return rows, []


def recommend(name: str, timings: dict[str, Timing]) -> str:
    """A line for the author of the plan function. It names another plan only if that plan's slow samples are below the
    fast samples of the chosen one."""
    chosen = timings["chosen"]
    best = min(timings, key=lambda each: timings[each].median_us)
    if timings[best].high_us >= chosen.low_us:
        return f"{name}: the plan is the fastest within the noise, {chosen.median_us:.2f} us"
    gain = chosen.median_us / timings[best].median_us
    return f"{name}: {best} is {gain:.2f}x as fast, {timings[best].median_us:.2f} us for {chosen.median_us:.2f} us"


def _time_plans(work: Work, device: torch.device) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times by the plans' names, and what is wrong with plans whose result differs from the reference."""
    sets = make_rotated_inputs(work, device)
    expected, _ = run_reference(work, sets[0])
    assert expected is not None
    outs = [poisoned_like(expected, work.dtype) for _ in sets]
    build = _gemv_calls if work.spec.name.startswith("gemv") else _attention_calls
    variants: dict[str, Calls] = {}
    wrong: dict[str, str] = {}
    for name, calls in build(work, sets, outs):
        outs[0].fill_(torch.nan)
        try:
            calls[0]()
            verdict = compare("the result", outs[0], expected, work.spec.tolerances[work.dtype])
        except Exception as error:  # for example too little shared memory or too few registers
            if name == "chosen":
                raise
            print(f"  {work.name}: not {name}: {first_line(error)}", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if the device takes no more work
            continue
        if not verdict.problem:
            variants[name] = calls
        elif name == "chosen":
            raise ValueError(f"{name}: {verdict.problem}")
        else:
            wrong[name] = verdict.problem
    return time_variants(variants, device, budget_s=BUDGET_S * len(variants)), wrong
