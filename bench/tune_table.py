"""Writes the tables of plans that the tuner finds and the kernels load, such as kernels/plans/sm_90.json."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from internvl_rt.bench.record import environment
from internvl_rt.kernels._launch import Target
from internvl_rt.kernels._plans import APART, CUBLAS, AttentionPlan, GemmPlan, load_tables

Entry = dict[str, Any]


def product_entries(chosen: Mapping[tuple[int, int, str], Mapping[int, GemmPlan]]) -> list[Entry]:
    """Returns sorted entries, as few as possible. Without an entry cuBLAS is used, so rows that stay with it need none.
    A measurement counts for fewer rows too, down to the next smaller number that was measured, or to half.
    """
    return _gemm_entries(chosen, ("n", "k", "epilogue"), CUBLAS)


def projection_entries(chosen: Mapping[tuple[int, int], Mapping[int, GemmPlan]]) -> list[Entry]:
    """Does for unshuffle_project what `product_entries` does for gemm_epilogue; without an entry APART is used."""
    return _gemm_entries(chosen, ("n", "k"), APART)


def _gemm_entries(
    chosen: Mapping[Any, Mapping[int, GemmPlan]], names: tuple[str, ...], unfused: GemmPlan
) -> list[Entry]:
    entries = []
    for key, by_rows in sorted(chosen.items()):
        steps = sorted(by_rows.items())
        if steps[0][0] > 1:
            steps.insert(0, (steps[0][0] // 2, unfused))
        while steps and steps[-1][1] == unfused:
            steps.pop()
        for m_max, plan in _last_of_equals(steps):
            shown = asdict(plan) if plan.kind == "fused" else {"kind": plan.kind}
            entries.append({"m_max": m_max, **dict(zip(names, key, strict=True)), "plan": shown})
    return entries


def attention_entries(
    chosen: Mapping[tuple[int, int, int], Mapping[int, AttentionPlan]], defaults: Mapping[tuple[int, int, int], Any]
) -> list[Entry]:
    """Returns sorted entries, as few as possible; a key whose default was the fastest everywhere has none."""
    entries = []
    for key, by_tiles in sorted(chosen.items()):
        if set(by_tiles.values()) != {defaults[key]}:
            sizes = dict(zip(("patches", "heads", "channels"), key, strict=True))
            for tiles_max, plan in _last_of_equals(sorted(by_tiles.items())):
                entries.append({"tiles_max": tiles_max, **sizes, "plan": asdict(plan)})
    return entries


def _last_of_equals(steps: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Keeps the last of neighbours with the same plan, which holds for those before it as well."""
    return [
        step for index, step in enumerate(steps) if step[1] not in [plan for _, plan in steps[index + 1 : index + 2]]
    ]


def write_table(
    path: Path, entries: Mapping[str, Sequence[Entry]], measured: Mapping[str, str], target: Target
) -> None:
    """Writes the whole file or nothing; raises ValueError if the kernels could not load it."""
    lists = {name: ",\n  ".join(json.dumps(entry) for entry in each) for name, each in entries.items()}
    parts = [f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else "[]") for name, lines in lists.items()]
    draft = path.with_name(f"{path.name}.new")
    draft.write_text("{\n" + ",\n".join([f' "measured": {json.dumps(measured)}', *parts]) + "\n}\n", encoding="utf-8")
    try:
        load_tables(draft, target)
    except ValueError:
        draft.unlink()
        raise
    os.replace(draft, path)


def measured_on(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Says where and when the table was measured. commit: given if git does not say it."""
    found = environment(device)
    where = f"{found['device']}, driver {found['driver']}"
    return {
        "date": f"{found['date']} at commit {commit or found['commit']}",
        "gpu": where,
        "triton": str(found["triton"]),
        "torch": str(found["torch"]),
    }
