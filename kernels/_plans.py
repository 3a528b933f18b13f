"""Chooses how products and vision attention are computed: from measured tables, never by trying at the first call.

Each target has a file such as kernels/plans/sm_90.json; `measured` is null if nothing was measured:

    {"measured": {"date": "...", "gpu": "...", "triton": "...", "torch": "..."},
     "gemm_epilogue": [{"m_max": 1025, "n": 4096, "k": 1024, "epilogue": "gelu",
                        "plan": {"kind": "fused", "block_m": 128, ...}}, ...],
     "unshuffle_project": [{"m_max": 3328, "n": 896, "k": 4096, "plan": {"kind": "fused", ...}}, ...],
     "vit_attention": [{"tiles_max": 13, "patches": 1024, "heads": 16, "channels": 64,
                        "plan": {"block_m": 128, ...}}, ...]}

A product of some rows takes the entry with its n, k and epilogue whose m_max is the smallest that is not below the
number of rows. A product without an entry, or a target without a file, takes CUBLAS. `unshuffle_project` chooses by the
number of visual tokens in the same way, and takes APART without an entry.

Attention chooses by the number of tiles in the same way, but its last entry also serves more tiles than were measured,
because they only add more of the same blocks. Attention without an entry takes vit_attention's own default.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from internvl_rt.kernels._launch import Target

FOLDER = Path(__file__).parent / "plans"
EPILOGUES = ("none", "gelu", "residual", "rows")
MEASURED = {"date", "gpu", "triton", "torch"}


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """kind "cublas": a torch product, then at most one element-wise kernel; the other fields are 0.
    kind "cublas_twice": the same with two torch products, if a few rows are left over of blocks of 128 rows.
    kind "apart", of unshuffle_project only: unshuffle_norm, then gemm_epilogue by its own plan; the other fields are 0.
    kind "fused": one Triton kernel with the epilogue in registers.
    """

    kind: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0  # rows of blocks that are computed together, so that they share operands in L2
    num_warps: int = 0
    num_stages: int = 0
    use_tma: bool = False  # use the copy engine where the target has it and rows begin at multiples of 16 bytes

    def shared_bytes(self, itemsize: int) -> int:
        """Returns the most that the kernel needs: every stage holds a block of each operand."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How vit_attention walks over one tile and head."""

    block_m: int  # queries of a program
    block_n: int  # keys of one step of a program's loop
    num_warps: int
    num_stages: int
    host_descriptor: bool = False  # if the copy engine can be used, the host makes one descriptor for all programs

    def shared_bytes(self, channels: int, itemsize: int) -> int:
        """Returns the least that the kernel needs: every stage holds a block of keys and a block of values."""
        return self.num_stages * 2 * self.block_n * channels * itemsize


CUBLAS, CUBLAS_TWICE, APART = map(GemmPlan, ("cublas", "cublas_twice", "apart"))
_OF_PRODUCTS, _OF_PROJECTIONS = (CUBLAS, CUBLAS_TWICE), (APART,)  # plans without blocks
Plan = GemmPlan | str | None  # None: the plan of the tables; a name: of a plan without blocks or of a tiling
GemmKey = tuple[int, int, str]  # n, k, epilogue
ProjectionKey = tuple[int, int]  # n, k
AttentionKey = tuple[int, int, int]  # patches, heads, channels


@dataclass(frozen=True, slots=True)
class Tables:
    """The plans measured on a target, by key: the most rows (or tiles) a plan serves, ascending, and the plan."""

    gemm_epilogue: Mapping[GemmKey, tuple[tuple[int, GemmPlan], ...]] = field(default_factory=dict)
    unshuffle_project: Mapping[ProjectionKey, tuple[tuple[int, GemmPlan], ...]] = field(default_factory=dict)
    vit_attention: Mapping[AttentionKey, tuple[tuple[int, AttentionPlan], ...]] = field(default_factory=dict)


_Allowed = Mapping[str, tuple[object, ...]]
_ALLOWED_GEMM: _Allowed = {
    "kind": ("fused",),
    **dict.fromkeys(("block_m", "block_n", "block_k"), (16, 32, 64, 128, 256)),
    "group_m": tuple(range(1, 65)),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "use_tma": (True, False),
}
_ALLOWED_ATTENTION: _Allowed = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (4, 8, 16),
    "num_stages": tuple(range(1, 6)),
    "host_descriptor": (True, False),
}


def tilings(target: Target) -> dict[str, GemmPlan]:
    """Returns the fused plans that are worth measuring on `target`, by name."""
    if target.capability in (90, 100, 103):
        wide = GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=4, use_tma=True)
        # Two programs share a multiprocessor, so that one multiplies while the other writes its results.
        square = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=4, num_stages=3, use_tma=True)
        warps = 4 if target.capability == 90 else 8  # with 4, triton 3.9 spills two registers of the GELU on sm_100
        low = GemmPlan("fused", 64, 128, 64, group_m=8, num_warps=warps, num_stages=4, use_tma=True)
        pointers = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=3)
    else:
        deep = 4 if target.shared_bytes > 128 * 1024 else 3  # stages that fit shared memory
        wide = GemmPlan("fused", 128, 256, 32, group_m=8, num_warps=8, num_stages=deep)
        square = pointers = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=3)
        low = GemmPlan("fused", 64, 128, 64, group_m=8, num_warps=4, num_stages=deep)
    return {"wide": wide, "square": square, "low": low, "pointers": pointers}


def projection_tilings(target: Target) -> dict[str, GemmPlan]:
    """Returns the fused plans of unshuffle_project that are worth measuring on `target`, by name.

    A thread also holds the rows that it normalises, so most of `tilings` would spill.
    """
    if target.capability in (90, 100, 103):
        wide = GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=4, use_tma=True)
        square = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=3, use_tma=True)
        low = GemmPlan("fused", 64, 128, 128, group_m=8, num_warps=4, num_stages=4, use_tma=True)
    else:
        wide = GemmPlan("fused", 64, 256, 32, group_m=8, num_warps=8, num_stages=3)
        square = GemmPlan("fused", 128, 128, 32, group_m=8, num_warps=8, num_stages=3)
        low = GemmPlan("fused", 64, 128, 32, group_m=8, num_warps=4, num_stages=4)
    return {"wide": wide, "square": square, "low": low}


def check_plan(plan: GemmPlan, itemsize: int, target: Target, *, unfused: tuple[GemmPlan, ...] = _OF_PRODUCTS) -> None:
    """Raises ValueError for a plan that cannot be built for `target`. unfused: the plans without blocks."""
    if plan.kind in [each.kind for each in unfused]:
        if plan not in unfused:
            raise ValueError(f"expected the plan {plan.kind!r} without blocks, got {plan}")
        return
    _check_fields(plan, _ALLOWED_GEMM)
    _check_shared(plan.shared_bytes(itemsize), target)


def check_attention_plan(plan: AttentionPlan, channels: int, itemsize: int, target: Target) -> None:
    """Raises ValueError for a plan that cannot be built for `target`."""
    _check_fields(plan, _ALLOWED_ATTENTION)
    _check_shared(plan.shared_bytes(channels, itemsize), target)


def _check_fields(plan: object, allowed_by_name: _Allowed) -> None:
    for name, allowed in allowed_by_name.items():
        value = getattr(plan, name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _check_shared(num_bytes: int, target: Target) -> None:
    if num_bytes > target.shared_bytes:
        raise ValueError(
            f"expected at most {target.shared_bytes} bytes of shared memory on sm_{target.capability}, got {num_bytes}"
        )


def load_tables(path: Path, target: Target) -> Tables:
    """Reads a file of plans. Raises ValueError naming the file and the entry if `target` could not run one of them."""
    where = "the tables"
    try:
        values = json.loads(path.read_bytes())
        _require_keys(values, {"measured", *(each.name for each in fields(Tables))})
        if values["measured"] is not None:
            _require_keys(values["measured"], MEASURED)
            if not all(isinstance(value, str) for value in values["measured"].values()):
                raise ValueError(f"measured: expected texts, got {values['measured']!r:.200}")
        loaded = {}
        for name, read_entry in _READERS.items():
            where, entries = "the tables", values[name]
            if not isinstance(entries, list):
                raise ValueError(f"{name}: expected a list, got {entries!r:.200}")
            if entries and values["measured"] is None:
                raise ValueError("expected no plans where `measured` is null")
            found: dict[Any, dict[int, Any]] = {}
            for number, item in enumerate(entries):
                where = f"{name}[{number}]"
                key, limit, plan = read_entry(item, target)
                if limit in found.setdefault(key, {}):
                    raise ValueError(f"a plan for up to {limit} is there twice")
                found[key][limit] = plan
            loaded[name] = {key: tuple(sorted(plans.items(), key=lambda pair: pair[0])) for key, plans in found.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from error
    return Tables(**loaded)


def _require_keys(values: Any, keys: set[str]) -> None:
    if not isinstance(values, dict) or set(values) != keys:
        raise ValueError(f"expected an object with the keys {sorted(keys)}, got {values!r:.200}")


def _require_positive(item: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if type(item[name]) is not int or item[name] < 1:
            raise ValueError(f"{name}: expected a positive integer, got {item[name]!r}")


def _read_product(item: Any, target: Target) -> tuple[GemmKey, int, GemmPlan]:
    _require_keys(item, {"m_max", "n", "k", "epilogue", "plan"})
    if item["epilogue"] not in EPILOGUES:
        raise ValueError(f"epilogue: expected one of {EPILOGUES}, got {item['epilogue']!r}")
    return (item["n"], item["k"], item["epilogue"]), item["m_max"], _read_gemm_plan(item, _OF_PRODUCTS, target)


def _read_projection(item: Any, target: Target) -> tuple[ProjectionKey, int, GemmPlan]:
    _require_keys(item, {"m_max", "n", "k", "plan"})
    return (item["n"], item["k"]), item["m_max"], _read_gemm_plan(item, _OF_PROJECTIONS, target)


def _read_gemm_plan(item: Mapping[str, Any], unfused: tuple[GemmPlan, ...], target: Target) -> GemmPlan:
    _require_positive(item, ("m_max", "n", "k"))
    for each in unfused:
        if item["plan"] == {"kind": each.kind}:
            return each
    _require_keys(item["plan"], {each.name for each in fields(GemmPlan)})
    plan = GemmPlan(**item["plan"])
    if plan.kind != "fused":
        kinds = " or ".join(repr(each.kind) for each in unfused)
        raise ValueError(f"kind: expected 'fused' with blocks or {kinds} alone, got {plan.kind!r}")
    check_plan(plan, 2, target)
    return plan


def _read_attention(item: Any, target: Target) -> tuple[AttentionKey, int, AttentionPlan]:
    _require_keys(item, {"tiles_max", "patches", "heads", "channels", "plan"})
    _require_positive(item, ("tiles_max", "patches", "heads", "channels"))
    _require_keys(item["plan"], {each.name for each in fields(AttentionPlan)})
    plan = AttentionPlan(**item["plan"])
    check_attention_plan(plan, item["channels"], 2, target)
    return (item["patches"], item["heads"], item["channels"]), item["tiles_max"], plan


_READERS = {"gemm_epilogue": _read_product, "unshuffle_project": _read_projection, "vit_attention": _read_attention}


@cache
def _tables_of(folder: Path, target: Target) -> Tables:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the installation lacks its tables of plans; install internvl_rt again")
    path = folder / f"sm_{target.capability}.json"
    return load_tables(path, target) if path.exists() else Tables()


def choose_plan(
    rows: int, n: int, k: int, epilogue: str, dtype: torch.dtype, target: Target, *, folder: Path = FOLDER
) -> GemmPlan:
    """Returns the measured plan for x [rows, k] times weight [n, k]; CUBLAS where none was measured, and in float32."""
    if dtype.itemsize != 2:  # the tables were measured in bfloat16; float16 takes the same time
        return CUBLAS
    plans = _tables_of(folder, target).gemm_epilogue.get((n, k, epilogue), ())
    return next((plan for m_max, plan in plans if rows <= m_max), CUBLAS)


def choose_projection_plan(
    tokens: int, n: int, k: int, dtype: torch.dtype, target: Target, *, folder: Path = FOLDER
) -> GemmPlan:
    """Returns the measured plan for visual tokens [tokens, k] times weight [n, k]; APART where `choose_plan` says
    CUBLAS."""
    if dtype.itemsize != 2:
        return APART
    plans = _tables_of(folder, target).unshuffle_project.get((n, k), ())
    return next((plan for m_max, plan in plans if tokens <= m_max), APART)


def choose_attention_plan(
    tiles: int, patches: int, heads: int, channels: int, dtype: torch.dtype, target: Target, *, folder: Path = FOLDER
) -> AttentionPlan | None:
    """Returns the measured plan; None where none was measured, and in float32."""
    plans = _tables_of(folder, target).vit_attention.get((patches, heads, channels), ())
    if not plans or dtype.itemsize != 2:
        return None
    return next((plan for tiles_max, plan in plans if tiles <= tiles_max), plans[-1][1])


def resolve_plan(plan: Plan, rows: int, n: int, k: int, epilogue: str, dtype: torch.dtype, target: Target) -> GemmPlan:
    """Returns the plan to use. Raises ValueError for an unknown name and for a plan that `target` cannot run."""
    if plan is None:
        return choose_plan(rows, n, k, epilogue, dtype, target)
    return _given_plan(plan, _OF_PRODUCTS, tilings(target), dtype, target)


def resolve_projection_plan(plan: Plan, tokens: int, n: int, k: int, dtype: torch.dtype, target: Target) -> GemmPlan:
    """Does for unshuffle_project what `resolve_plan` does for gemm_epilogue."""
    if plan is None:
        return choose_projection_plan(tokens, n, k, dtype, target)
    return _given_plan(plan, _OF_PROJECTIONS, projection_tilings(target), dtype, target)


def _given_plan(
    plan: GemmPlan | str,
    unfused: tuple[GemmPlan, ...],
    fused: Mapping[str, GemmPlan],
    dtype: torch.dtype,
    target: Target,
) -> GemmPlan:
    if isinstance(plan, str):
        named = {**{each.kind: each for each in unfused}, **fused}
        if plan not in named:
            raise ValueError(f"plan: expected one of {list(named)}, got {plan!r}")
        plan = named[plan]
    try:
        check_plan(plan, dtype.itemsize, target, unfused=unfused)
    except ValueError as error:
        raise ValueError(f"plan: {error}") from None
    return plan
