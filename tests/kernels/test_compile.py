"""Checks the machine code of every kernel that a real model needs, for every target."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels.catalogue import discover_specs
from support.compile_audit import RULES, breaches, label, render_table

Rows = list[dict[str, Any]]
AUDIT = Path(__file__).parents[1] / "support" / "compile_audit.py"
GOOD = {"operation": "x", "kernel": "_x_kernel", "case": "c", "target": 90, "stack": 0, "local_memory": 0}
GOOD |= {"shared_bytes": 0, "matrix_units": True, "hgmma": 4, "wide_loads": True, "load_128": 1, "constexprs": {}}
GOOD |= {"tensor_columns": 512}


def audit(folder: Path, *options: str, **more: str) -> Rows:
    """more: variables of the environment"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    subprocess.run([sys.executable, AUDIT, "--out", folder / "kernels.json", *options], env=environment)
    return json.loads((folder / "kernels.json").read_text())["kernels"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return audit(tmp_path_factory.mktemp("audit"))


@pytest.mark.slow
def test_the_smallest_case_of_every_operation_is_built_for_sm_90_and_breaks_no_rule(tmp_path: Path) -> None:
    smallest = audit(tmp_path, "--smallest")
    assert {(k["operation"], k["target"]) for k in smallest} == {(operation, 90) for operation in discover_specs()}
    assert not breaches(smallest)


@pytest.mark.slow
@pytest.mark.parametrize("end", [0, -1], ids=["oldest", "newest"])
def test_the_oldest_and_the_newest_triton_build_them_too(end: int, tmp_path: Path) -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    version = re.search(r"^AUDITED \?= (.*)$", makefile, re.MULTILINE)[1].split()[end]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "triton"]
    subprocess.run([*install, f"triton=={version}"], check=True)
    smallest = audit(tmp_path, "--smallest", PYTHONPATH=str(tmp_path / "triton"))
    assert json.loads((tmp_path / "kernels.json").read_text())["triton"] == version
    assert not breaches(smallest)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the first one of these tests builds some 1,300 kernels
def test_every_operation_is_built_for_every_target(kernels: Rows) -> None:
    assert not [f"{label(k)}: {k['error']}" for k in kernels if "error" in k]
    expected = {(op, cc) for op, spec in discover_specs().items() for cc in TARGETS if spec.min_capability <= cc}
    assert {(k["operation"], k["target"]) for k in kernels} == expected
    print(render_table(kernels))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rule", RULES)
def test_of_every_kernel_it_holds_that(rule: str, kernels: Rows) -> None:
    assert not [label(k) for k in kernels if "error" not in k and not RULES[rule](k)]


@pytest.mark.parametrize(
    "change",
    [
        {"stack": 8},
        {"local_memory": 1},
        {"shared_bytes": 228 * 1024},
        {"tensor_columns": 576},
        {"hgmma": 0},
        {"load_128": 0},
        {"constexprs": {"WARP_SPECIALIZE": "True"}, "warp_specialized": 0},
        {"error": "PassManager failed"},
    ],
)
def test_a_row_that_breaks_a_rule_is_found(change: dict[str, Any]) -> None:
    assert not breaches([GOOD])
    assert len(breaches([GOOD | change])) == 1
