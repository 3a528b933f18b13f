"""What the compiler made of every kernel that a real model needs, for every target: outcomes, not flags."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.kernels._launch import TARGETS
from support.specs import discover_specs

AUDIT = Path(__file__).parent / "support" / "compile_audit.py"
MATRIX_INSTRUCTION = {80: "hmma", 89: "hmma", 90: "hgmma", 100: "tcgen05", 120: "hmma"}
COLUMNS = ("target", "num_warps", "registers", "shared_bytes", "instructions", "hgmma", "hmma", "load_128", "load")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("audit") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, AUDIT, "--out", out], check=True, env=environment)
    return json.loads(out.read_text())["kernels"]


def label(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']} ({kernel['case']}) for sm_{kernel['target']}"


def test_every_operation_is_built_for_every_target(kernels: list[dict[str, Any]]) -> None:
    assert not [f"{label(k)}: {k['error']}" for k in kernels if "error" in k]
    assert {(k["operation"], k["target"]) for k in kernels} == {(op, cc) for op in discover_specs() for cc in TARGETS}
    for kernel in kernels:
        print(f"{kernel['kernel']:32}{kernel['case']:28}", *(f"{name} {kernel[name]}" for name in COLUMNS))


def test_nothing_spills_and_shared_memory_fits(kernels: list[dict[str, Any]]) -> None:
    assert not [label(k) for k in kernels if k["stack"] or k["local_memory"]]
    assert not [label(k) for k in kernels if k["shared_bytes"] > TARGETS[k["target"]].shared_bytes]


def test_matrix_work_runs_on_the_targets_own_matrix_units(kernels: list[dict[str, Any]]) -> None:
    assert not [label(k) for k in kernels if k["matrix_units"] and not k[MATRIX_INSTRUCTION[k["target"]]]]


def test_memory_is_read_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    assert not [label(k) for k in kernels if k["wide_loads"] and not k["load_128"]]


def test_warp_specialisation_is_applied_where_a_plan_asks_for_it(kernels: list[dict[str, Any]]) -> None:
    asked = [k for k in kernels if k["constexprs"].get("WARP_SPECIALIZE") == "True"]
    assert not [label(k) for k in asked if not k["warp_specialized"]]
