"""How a matrix product is computed: by tables measured beforehand, never by trying at the first call.

kernels/plans/sm_90.json and its like:

    {"measured": {"date": "...", "gpu": "...", "triton": "...", "torch": "..."},     null: nothing was measured
     "gemm_epilogue": [{"m_max": 1025, "n": 4096, "k": 1024, "epilogue": "gelu",
                        "plan": {"kind": "fused", "block_m": 128, ...}}, ...]}

Of the entries with exactly this n, k and epilogue, the one with the smallest m_max that is not below the rows counts.
Where there is none, or no file for the target, nothing shows that another plan is faster than CUBLAS.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
    kind "fused": one Triton kernel with the epilogue in registers.
    """

    kind: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0  # rows of blocks that are walked together, for L2
    num_warps: int = 0
    num_stages: int = 0
    use_tma: bool = False  # where the target has it and rows begin at multiples of 16 bytes; else pointers

    def shared_bytes(self, itemsize: int) -> int:
        """At most: every stage holds a block of each operand."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


CUBLAS = GemmPlan("cublas")
Plan = GemmPlan | str | None  # None: what the table says; a name: "cublas" or one of `tilings`
Table = Mapping[tuple[int, int, str], tuple[tuple[int, GemmPlan], ...]]  # (n, k, epilogue) -> (m_max, plan), ascending
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "kind": ("fused",),
    **dict.fromkeys(("block_m", "block_n", "block_k"), (16, 32, 64, 128, 256)),
    "group_m": tuple(range(1, 65)),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "use_tma": (True, False),
}


def tilings(target: Target) -> dict[str, GemmPlan]:
    """The fused plans that are worth measuring on `target`, by name."""
    if target.capability in (90, 100, 103):
        wide = GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=4, use_tma=True)
        # Two blocks of each share a multiprocessor, so that one multiplies while the other writes its results.
        square = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=4, num_stages=3, use_tma=True)
        low = GemmPlan("fused", 64, 128, 64, group_m=8, num_warps=4, num_stages=4, use_tma=True)
        pointers = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=3)
    else:
        deep = 4 if target.shared_bytes > 128 * 1024 else 3  # stages that fit
        wide = GemmPlan("fused", 128, 256, 32, group_m=8, num_warps=8, num_stages=deep)
        square = pointers = GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=3)
        low = GemmPlan("fused", 64, 128, 64, group_m=8, num_warps=4, num_stages=deep)
    return {"wide": wide, "square": square, "low": low, "pointers": pointers}


def check_plan(plan: GemmPlan, itemsize: int, target: Target) -> None:
    """Raises ValueError for a plan that cannot be built for `target`."""
    if plan.kind == "cublas":
        if plan != CUBLAS:
            raise ValueError(f"expected a cublas plan without blocks, got {plan}")
        return
    for name, allowed in _ALLOWED.items():
        value = getattr(plan, name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")
    if plan.shared_bytes(itemsize) > target.shared_bytes:
        raise ValueError(
            f"expected at most {target.shared_bytes} bytes of shared memory on sm_{target.capability}, "
            f"got {plan.shared_bytes(itemsize)}"
        )


def load_table(path: Path, target: Target) -> Table:
    """Raises ValueError naming the file, and the entry, for anything but a table that `target` can run."""
    entry = "the table"
    try:
        values = json.loads(path.read_bytes())
        _require_keys(values, {"measured", "gemm_epilogue"})
        if not isinstance(values["gemm_epilogue"], list):
            raise ValueError(f"gemm_epilogue: expected a list, got {values['gemm_epilogue']!r:.200}")
        if values["measured"] is not None:
            _require_keys(values["measured"], MEASURED)
            if not all(isinstance(value, str) for value in values["measured"].values()):
                raise ValueError(f"measured: expected texts, got {values['measured']!r:.200}")
        elif values["gemm_epilogue"]:
            raise ValueError("expected no plans where `measured` is null")
        found: dict[tuple[int, int, str], dict[int, GemmPlan]] = {}
        for number, item in enumerate(values["gemm_epilogue"]):
            entry = f"gemm_epilogue[{number}]"
            m_max, key, plan = _read_entry(item)
            check_plan(plan, 2, target)
            plans = found.setdefault(key, {})
            if m_max in plans:
                raise ValueError(f"m_max {m_max} is there twice")
            plans[m_max] = plan
    except ValueError as error:
        raise ValueError(f"{path}: {entry}: {error}") from error
    return {key: tuple(sorted(plans.items(), key=lambda pair: pair[0])) for key, plans in found.items()}


def _require_keys(values: Any, keys: set[str]) -> None:
    if not isinstance(values, dict) or set(values) != keys:
        raise ValueError(f"expected an object with the keys {sorted(keys)}, got {values!r:.200}")


def _read_entry(item: Any) -> tuple[int, tuple[int, int, str], GemmPlan]:
    _require_keys(item, {"m_max", "n", "k", "epilogue", "plan"})
    for name in ("m_max", "n", "k"):
        if type(item[name]) is not int or item[name] < 1:
            raise ValueError(f"{name}: expected a positive integer, got {item[name]!r}")
    if item["epilogue"] not in EPILOGUES:
        raise ValueError(f"epilogue: expected one of {EPILOGUES}, got {item['epilogue']!r}")
    if item["plan"] == {"kind": "cublas"}:
        plan = CUBLAS
    else:
        _require_keys(item["plan"], {field.name for field in fields(GemmPlan)})
        plan = GemmPlan(**item["plan"])
        if plan.kind != "fused":
            raise ValueError(f"kind: expected 'fused' with blocks or 'cublas' alone, got {plan.kind!r}")
    return item["m_max"], (item["n"], item["k"], item["epilogue"]), plan


@cache
def _table_of(folder: Path, target: Target) -> Table:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the installation lacks its tables of plans; install internvl_rt again")
    path = folder / f"sm_{target.capability}.json"
    return load_table(path, target) if path.exists() else {}


def choose_plan(
    rows: int, n: int, k: int, epilogue: str, dtype: torch.dtype, target: Target, *, folder: Path = FOLDER
) -> GemmPlan:
    """The measured plan for x [rows, k] times weight [n, k]; CUBLAS where none was measured, and in float32."""
    if dtype.itemsize != 2:  # the tables hold what was measured in bfloat16; float16 costs the same
        return CUBLAS
    plans = _table_of(folder, target).get((n, k, epilogue), ())
    return next((plan for m_max, plan in plans if rows <= m_max), CUBLAS)


def resolve_plan(plan: Plan, rows: int, n: int, k: int, epilogue: str, dtype: torch.dtype, target: Target) -> GemmPlan:
    """Raises ValueError for a name that is not there, and for a plan that `target` cannot run."""
    if plan is None:
        return choose_plan(rows, n, k, epilogue, dtype, target)
    if isinstance(plan, str):
        named = {"cublas": CUBLAS, **tilings(target)}
        if plan not in named:
            raise ValueError(f"plan: expected one of {list(named)}, got {plan!r}")
        plan = named[plan]
    try:
        check_plan(plan, dtype.itemsize, target)
    except ValueError as error:
        raise ValueError(f"plan: {error}") from None
    return plan
