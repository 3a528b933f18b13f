"""What the tuner measures: for each operation with a table of plans, the cases in their order and the plans to try."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from internvl_rt.bench.kernel_cases import PREFILL_ROWS, Work, importance, real_work
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import Target
from internvl_rt.kernels._plans import (
    APART,
    CUBLAS,
    CUBLAS_TWICE,
    AttentionPlan,
    GemmPlan,
    check_attention_plan,
    check_plan,
    projection_tilings,
    tilings,
)
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.kernels.vit_attention import default_plan

REGISTERS = 65536  # registers of a multiprocessor; a thread has at most 256 of them
TILES = (13, 1, 4)  # of a large picture, a small one, and one between; the most important first
VISION = ("300m_qkv", "300m_fc1", "300m_out_alone", "300m_fc2_alone")  # the products of a layer of InternViT-300M
PROJECTORS = ("projector_4096_896", "projector_896_rows", "projector_4096_3584", "projector_3584_rows")
Plans = Mapping[str, Any]  # a GemmPlan or AttentionPlan by a name
Key = tuple[Any, ...]  # as in the table


@dataclass(frozen=True, slots=True)
class Tuned:
    """An operation that reads its plan from a table. The plan called `baseline` is used without an entry."""

    baseline: str
    works: Callable[[], list[Work]]  # the most important come first
    plans: Callable[[Work, Target], Plans]
    key: Callable[[Work], Key]
    size: Callable[[Work], int]  # rows, or tiles; an entry serves up to this many


def product_works() -> list[Work]:
    """One case for each key and number of rows: first the pass of InternViT-300M, then prompts of the 1B and 8B."""
    spec = discover_specs()["gemm_epilogue"]
    found: dict[tuple[Key, int], Work] = {}
    for work in sorted(_with_other_tiles(real_work(spec)), key=_order):
        if "implementation" not in work.case.sizes:
            found.setdefault((product_key(work), work.case["R"]), work)
    return list(found.values())


def _with_other_tiles(works: list[Work]) -> list[Work]:
    """The cases of 13 tiles, repeated with each number of TILES."""
    added = []
    for work in works:
        stem, found, rest = work.case.name.partition("_13_tiles")
        if found and not rest:
            for tiles in TILES[1:]:
                sizes = {**work.case.sizes, "R": work.case["R"] // 13 * tiles}
                added.append(replace(work, case=Case(f"{stem}_{tiles}_tiles", sizes)))
    names = {work.case.name for work in works}
    return [*works, *(work for work in added if work.case.name not in names)]


def _order(work: Work) -> tuple[int, int]:
    name = work.case.name
    for rank, stems in enumerate((VISION, PROJECTORS)):
        for place, tiles in enumerate(TILES):
            if name in {f"{stem}_{tiles}_tiles" for stem in stems}:
                return rank, place
    if name.startswith(("1b_", "8b_")) and work.case["R"] == PREFILL_ROWS:
        return 2, 0
    return 3, importance(work)


def product_key(work: Work) -> Key:
    return work.case["N"], work.case["K"], work.case["epilogue"]


def product_plans(target: Target) -> dict[str, GemmPlan]:
    """cuBLAS, the named tilings and their neighbours, except those that `target` cannot run in 16 bits."""
    tma = target.capability >= 90
    further = {
        "tall": GemmPlan("fused", 256, 128, 64, group_m=4, num_warps=8, num_stages=4, use_tma=tma),
        "wide_3": GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=3, use_tma=tma),
        "square_8": GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=4, use_tma=tma),
        "square_deep": GemmPlan("fused", 128, 128, 128, group_m=8, num_warps=8, num_stages=3, use_tma=tma),
        "low_wide": GemmPlan("fused", 64, 256, 64, group_m=8, num_warps=4, num_stages=4, use_tma=tma),
        "low_deep": GemmPlan("fused", 64, 128, 128, group_m=8, num_warps=4, num_stages=4, use_tma=tma),
        "small": GemmPlan("fused", 64, 64, 64, group_m=8, num_warps=4, num_stages=5, use_tma=tma),
    }
    plans = {"cublas": CUBLAS, "cublas_twice": CUBLAS_TWICE, **tilings(target), **further}
    return {name: plan for name, plan in plans.items() if _fits(check_plan, plan, 2, target)}


def projection_works() -> list[Work]:
    """One case for each model and number of TILES, the most important first: many tiles, then the smallest model."""
    spec = discover_specs()["unshuffle_project"]
    large = [work for work in real_work(spec) if work.case.name.endswith("_13_tiles")]
    found = []
    for tiles in TILES:
        for work in large:
            name = work.case.name.replace("_13_", f"_{tiles}_")
            found.append(replace(work, case=Case(name, {**work.case.sizes, "I": tiles})))
    return found


def projection_key(work: Work) -> Key:
    return work.case["N"], work.case.sizes.get("factor", 2) ** 2 * work.case["E"]


def projection_plans(target: Target) -> dict[str, GemmPlan]:
    """Two launches apart, the named tilings and their neighbours that do not spill where they were compiled."""
    further = {
        "wide_3": GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=3, use_tma=True),
        "square_deep": GemmPlan("fused", 128, 128, 128, group_m=8, num_warps=8, num_stages=3, use_tma=True),
        "low_wide": GemmPlan("fused", 64, 256, 64, group_m=8, num_warps=4, num_stages=2, use_tma=True),
        "low_short": GemmPlan("fused", 64, 128, 64, group_m=8, num_warps=4, num_stages=4, use_tma=True),
        "small": GemmPlan("fused", 64, 64, 64, group_m=8, num_warps=4, num_stages=5, use_tma=True),
    }
    return {"apart": APART, **projection_tilings(target), **(further if target.capability == 90 else {})}


def attention_works() -> list[Work]:
    """The cases, the most important first: many tiles before one, InternViT-300M before the 6B."""
    return sorted(real_work(discover_specs()["vit_attention"]), key=lambda work: (work.case["C"], -work.case["I"]))


def attention_key(work: Work) -> Key:
    return work.case["L"], work.case["H"], work.case["C"]


def attention_plans(work: Work, target: Target) -> dict[str, AttentionPlan]:
    """The default plan and its neighbours, except those that would not fit into shared memory or registers.

    A group of four warps multiplies 64 rows at a time. The sums and scores of a thread must leave a quarter of its
    registers for everything else; compiled for sm_90, no plan that does so spills.
    """
    channels = work.case["C"]
    plans = {"default": default_plan(channels, work.dtype, target)}
    for block_m, block_n, num_warps, num_stages in product((64, 128, 256), (64, 128), (4, 8, 16), (2, 3, 4)):
        plan = AttentionPlan(block_m, block_n, num_warps, num_stages)
        registers = min(256, REGISTERS // (32 * num_warps))
        accumulators = block_m * (block_n + channels) // (32 * num_warps)
        fits = block_m >= 16 * num_warps and 4 * accumulators <= 3 * registers
        if fits and plan != plans["default"] and _fits(check_attention_plan, plan, channels, 2, target):
            plans[f"{block_m}x{block_n}, {num_warps} warps, {num_stages} stages"] = plan
    if target.capability >= 90:  # with descriptors; only for three stages, because they gain the same at any number
        plans |= {f"{name}, host": replace(p, host_descriptor=True) for name, p in plans.items() if p.num_stages == 3}
    return plans


def _fits(check: Callable[..., None], *arguments: object) -> bool:
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


TUNED: dict[str, Tuned] = {  # what takes seconds comes first; products take all remaining time
    "vit_attention": Tuned(
        baseline="default",
        works=attention_works,
        plans=attention_plans,
        key=attention_key,
        size=lambda work: work.case["I"],
    ),
    "unshuffle_project": Tuned(
        baseline="apart",
        works=projection_works,
        plans=lambda work, target: projection_plans(target),
        key=projection_key,
        size=lambda work: work.case["I"] * work.case["side"] ** 2,
    ),
    "gemm_epilogue": Tuned(
        baseline="cublas",
        works=product_works,
        plans=lambda work, target: product_plans(target),
        key=product_key,
        size=lambda work: work.case["R"],
    ),
}
