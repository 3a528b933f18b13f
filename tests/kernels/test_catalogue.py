"""The catalogue says of every operation what it computes, how it is called and who calls it, and it is true."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from internvl_rt.cli import main
from internvl_rt.kernels import _contract
from internvl_rt.kernels.catalogue import Kernel, catalogue

ROOT = Path(__file__).parents[2]
KERNELS = catalogue()
TABLES = ("ops_triton", "ops_invariant")  # modules of internvl_rt/model


def test_every_file_that_is_no_helper_is_an_operation() -> None:
    files = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert set(KERNELS) == files - {"catalogue"}
    assert len(KERNELS) >= 18


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_an_entry_is_complete(kernel: Kernel) -> None:
    assert kernel.formula.endswith(".")
    assert "\n" not in kernel.formula
    assert kernel.launcher.__name__ == kernel.name
    assert kernel.launcher.__doc__, "it says what the types cannot"
    assert set(kernel.dtypes) == set(kernel.spec.tolerances)
    every = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
    has_fp8_products = kernel.name in ("gemm_fp8", "quantise_rows", "rms_norm_fp8", "swiglu_fp8")
    assert kernel.architectures == (every[1:] if has_fp8_products else every)
    namespace: dict[str, object] = {}
    exec(kernel.import_line, namespace)
    assert namespace[kernel.name] is kernel.launcher


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_dimensions_are_those_of_the_legend_and_of_the_shapes(kernel: Kernel) -> None:
    legend = set(re.findall(r"(?:^ {4}|, | {3})([A-Z])(?=[ ,])", _contract.__doc__ or "", re.MULTILINE))
    assert {"T", "D", "S", "K", "W", "X"} <= legend
    assert kernel.dims
    for case in kernel.cases:
        shapes = kernel.shapes(case)
        assert shapes.keys() <= kernel.signature.parameters.keys()
        for name, dims in kernel.dims.items():
            if dims is not None and name in shapes:
                letters = re.findall("[A-Z]", dims)
                assert set(letters) <= legend, name
                assert len(letters) <= len(shapes[name]) <= len(dims), name  # [S + 1] is S1, [W, 3] is W3


def test_an_operation_that_a_model_uses_is_called_by_a_table_of_operations() -> None:
    called = {
        alias.name
        for table in TABLES
        for node in ast.walk(ast.parse((ROOT / "internvl_rt" / "model" / f"{table}.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("internvl_rt.kernels.")
        for alias in node.names
    }
    used = {name for name, kernel in KERNELS.items() if kernel.used_by}
    assert used == called & set(KERNELS)
    assert len(used) >= 18


def test_cost_and_tolerance_are_those_of_the_operation() -> None:
    kernel = KERNELS["swiglu"]
    case = next(case for case in kernel.cases if case.name == "width_4864_1_rows")
    assert kernel.shapes(case) == {"gate_up_T2F": (1, 9728)}
    assert kernel.cost(case, torch.bfloat16).bytes == 2 * 3 * 4864
    assert kernel.tolerance(torch.float16).reason.startswith("silu and output")
    with pytest.raises(KeyError):
        kernel.tolerance(torch.int32)


def test_the_command_lists_all_and_describes_those_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(KERNELS)]] == sorted(KERNELS)
    assert main(["kernels", "swiglu", "*_norm"]) == 0
    text = capsys.readouterr().out
    for name in ("add_norm", "layer_norm", "rms_norm", "swiglu", "unshuffle_norm"):
        assert f"  {KERNELS[name].import_line}\n" in text
    assert "  swiglu(\n      gate_up_T2F: Tensor,\n      *,\n      out: Tensor | None = None,\n  )\n" in text
    assert "gemv" not in text


def test_the_command_gives_programs_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--json", "resize_tiles", "copy_blocks"]) == 0
    copy, resize = json.loads(capsys.readouterr().out)
    assert (copy["name"], copy["in_place"], resize["dtypes"]) == ("copy_blocks", ["pool_LKBGPC"], ["uint8"])
    assert all(case["bytes"] > 0 and case["shapes"] for case in (*copy["cases"], *resize["cases"]))


def test_an_unknown_operation_is_told_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "sofmax\n"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(r"internvl-rt: no operation 'sofmax\n'; there are add_norm, ")
    assert len(printed.err.splitlines()) == 1
