"""The bench of kernels checks before it times, compares with code that computes the same, and names what it left out.

Without a GPU, Triton's interpreter runs the kernels, and the measured times mean nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.bench import kernels
from internvl_rt.bench.attention_baselines import Alternative, same
from internvl_rt.bench.document import parse_last_line
from internvl_rt.bench.kernel_baselines import alternatives
from internvl_rt.bench.kernel_cases import (
    Work,
    check_kernel,
    compare,
    plan_work,
    real_work,
    relative_error,
    run_reference,
    small_work,
)
from internvl_rt.bench.kernels import Limits, copy_us, measure, measure_all, measure_kernel, roof_us
from internvl_rt.cli import main
from internvl_rt.kernels._contract import Case, Cost, Tolerance
from internvl_rt.kernels.catalogue import discover_specs
from support.result_schema import valid

ROOT = Path(__file__).parents[2]

Command = Callable[..., tuple[int, str]]

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # kernels run here, interpreted if it is a CPU
SPECS = discover_specs()
ROOFLINE = {"copy_gb_s": {"1000000": 1000.0, "16000000": 4000.0}, "tflops": {"float32": 60.0, "bfloat16": 800.0}}
SAME = {  # by operation, small cases that a user could compute in other ways too
    "add_norm": ("layer_width_129", "rms_width_129", "no_vectors"),
    "copy_blocks": ("several_pairs",),
    "decode_attention": ("many_splits", "group_7"),
    "dequantise": ("float8_rows_96", "int4_zero_64_160"),
    "embed_tokens": ("width_1024", "visual"),
    "expert_down": ("dense_block_16", "float8_block_32", "int4_128_block_64"),
    "expert_gate_up": ("dense_block_16", "int8_block_32", "int4_32_block_64"),
    "gemm_epilogue": (
        *("none_cublas", "gelu_cublas", "residual_cublas", "rows_cublas"),
        *("plain_residual_cublas", "unscaled_residual_cublas"),
    ),
    "gemm_fp8": ("rows_bias", "blocks_residual"),
    "gemv": ("rows_3", "swiglu_2", "residual_5"),
    "gemv_4bit": ("int4_rows_3", "int4_swiglu_2", "int4_residual_5"),
    "gemv_8bit": ("float8_rows_3", "int8_residual_2"),
    "gemv_qkv": ("rows_3", "rows_heads"),
    "layer_norm": ("width_128",),
    "patch_embed": ("patch_14", "patch_4"),
    "prefill_attention": ("channels_64",),
    "qkv_rope_kv": ("channels_64", "heads_14_2", "norms_64"),
    **dict.fromkeys(("quantise_rows", "rms_norm_fp8", "swiglu_fp8"), ("width_127",)),
    "resize_tiles": ("photo", "half_size"),
    "rms_norm": ("width_896",),
    "route_experts": ("17_tokens", "plain_5_tokens", "part_140_tokens"),
    "sample": ("slices",),
    "swiglu": ("width_1024",),
    "unshuffle_norm": ("v1_factor_2", "v2_factor_2"),
    "unshuffle_project": ("blocks_apart", "v1_factor_2_fused"),
    "vit_attention": ("several_heads_and_tiles", "norms_64"),
}


def work_of(op: str, case: str | None = None, **changes: Any) -> Work:
    works = small_work(SPECS[op])
    found = next((work for work in works if work.case.name == case), works[0])
    return replace(found, spec=replace(found.spec, **changes))


def far_away() -> Limits:
    return Limits(end=time.monotonic() + 600, slow_start_s=0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(kernels, "measure_roofline", lambda *_, **__: ROOFLINE)
        return main(["bench", "kernels", "--device=cpu", *arguments]), capsys.readouterr().out

    return run


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_gpu_a_reference_of_every_operation_is_timed_and_called_that(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    files = (f"--json={file}", f"--plots={tmp_path / 'drawn'}")
    done = run("-m", "internvl_rt", "bench", "kernels", "--quick", "--device=cpu", *files)
    assert done.returncode == 0, done.stderr
    document = valid(parse_last_line(done.stdout.splitlines()))
    assert json.loads(file.read_text()) == document
    assert document["part"] == "kernels"
    assert document["environment"]["device_kind"] == "cpu"
    assert {row["name"].split("/")[0] for row in document["rows"]} == SPECS.keys()
    for row in document["rows"]:
        assert row["baseline"] == "reference"
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
        assert row["roof_us"] > 0
        assert row["roof_percent"] == pytest.approx(100 * row["roof_us"] / row["median_us"])
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
    assert "no kernel was timed" in done.stdout
    assert (tmp_path / "drawn-roofline.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_time_does_not_reach_is_named(command: Command) -> None:
    code, output = command("swiglu", "--budget-s=0.001")
    assert code == 0
    document = valid(parse_last_line(output.splitlines()))
    assert document["rows"] == []
    assert document["left_out"] == [work.name for work in plan_work(CPU, ["swiglu"])]
    assert all(name in output.splitlines()[-2] for name in document["left_out"])


@pytest.mark.parametrize(
    ("pattern", "operations", "least"),
    [
        ("gemv", {"gemv"}, 20),  # an operation's name does not stand for others that it is a part of
        ("gemv_qkv", {"gemv_qkv"}, 10),
        ("gemv/swiglu", {"gemv"}, 3),
        ("gemv/swiglu_2", {"gemv"}, 1),
        ("*/width_128/*", {"layer_norm", "rms_norm"}, 2),
        ("width_12?", set(), 0),  # a pattern with * or ? stands for the whole name
    ],
)
def test_a_pattern_chooses_cases(pattern: str, operations: set[str], least: int) -> None:
    works = plan_work(CPU, [pattern])
    assert {work.spec.name for work in works} == operations
    assert len(works) >= least


@pytest.mark.slow
def test_pytest_benchmark_runs_them_too(tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    chosen = ("-k", "swiglu and width_1 and not fp8", "-p", "no:cacheprovider")
    arguments = ("--benchmark-only", f"--benchmark-json={file}", *chosen)
    done = run("-m", "pytest", "bench/test_kernels.py", *arguments)
    assert done.returncode == 0, done.stdout
    benchmarks = json.loads(file.read_text())["benchmarks"]
    assert len(benchmarks) >= 4
    assert all(each["extra_info"]["baseline"] == "reference" for each in benchmarks)
    assert {each["group"] for each in benchmarks} == {"swiglu"}


def wrong_scale(gate_up_T2F: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(SPECS["swiglu"].reference(gate_up_T2F) * 1.01)


def one_wrong_element(gate_up_T2F: Tensor, *, out: Tensor) -> Tensor:
    out.copy_(SPECS["swiglu"].reference(gate_up_T2F))
    out[-1, -1] += 0.5
    return out


def last_row_not_written(gate_up_T2F: Tensor, *, out: Tensor) -> Tensor:
    out[:-1] = SPECS["swiglu"].reference(gate_up_T2F)[:-1]
    return out


def raises(gate_up_T2F: Tensor, *, out: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nand much more")


@pytest.mark.parametrize(
    ("launcher", "problem"),
    [
        (wrong_scale, "wrong: the result: rms error 0.01"),
        (one_wrong_element, "wrong: "),
        (last_row_not_written, "wrong: the result: not finite"),
        (raises, "failed: RuntimeError: out of resource: shared memory"),
    ],
)
def test_a_kernel_that_is_wrong_gets_no_time(launcher: Any, problem: str) -> None:
    work = work_of("swiglu", "width_1024", launcher=launcher)
    for rows in (measure(work, DEVICE, ROOFLINE, far_away()), measure_all([work], DEVICE, ROOFLINE, far_away()).rows):
        assert [row.keys() for row in rows] == [{"name", "problem"}]
        assert rows[0]["problem"].startswith(problem)
        assert "\n" not in rows[0]["problem"]
    if launcher is not raises:
        assert measure_kernel(work, DEVICE, ROOFLINE, far_away())[0]["problem"].startswith(problem)


@pytest.mark.parametrize(
    ("op", "case", "problem"),
    [
        ("swiglu", "width_1024", "wrong when it is replayed: the result: not finite"),
        ("add_norm", "layer_width_129", "wrong when it is replayed: "),
    ],
)
def test_a_kernel_that_is_right_once_and_wrong_when_replayed_gets_no_time(op: str, case: str, problem: str) -> None:
    """The launcher writes nothing after its first call, like a kernel that does not reset its counters."""
    real, calls = SPECS[op].launcher, list[int]()

    def right_once(*args: Any, **how: Any) -> Any:
        calls.append(1)
        return real(*args, **how) if len(calls) == 1 else how["out"]

    rows = measure_kernel(work_of(op, case, launcher=right_once), DEVICE, ROOFLINE, far_away())
    assert [row.keys() for row in rows] == [{"name", "problem"}]
    assert rows[0]["problem"].startswith(problem)
    assert len(calls) > 3


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if spec.in_place])
def test_a_kernel_that_writes_in_place_is_right_when_replayed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing changes the kernel's inputs, so the bench restores them before the replay that it checks."""
    monkeypatch.setattr(kernels, "alternatives", lambda op: [])
    monkeypatch.setitem(kernels.BUDGET_S, "cuda", 1e-4)
    rows = measure_kernel(work_of(op, SAME[op][0]), DEVICE, ROOFLINE, far_away())
    assert "problem" not in rows[0]


def test_a_wrong_kernel_fails_the_command(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    works = [work_of("swiglu", launcher=wrong_scale), work_of("rms_norm", "width_17")]
    monkeypatch.setattr(kernels, "plan_work", lambda *_, **__: works)
    code, output = command(f"--device={DEVICE}")
    assert code == 1
    assert ["problem" in row for row in valid(parse_last_line(output.splitlines()))["rows"]] == [True, False]


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("op", SPECS)
def test_a_kernel_that_is_right_passes_and_its_inputs_come_back(op: str) -> None:
    work = work_of(op, SAME[op][0])
    torch.manual_seed(0)
    inputs = work.spec.make_inputs(work.case, work.dtype, DEVICE)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    verdict, _ = check_kernel(work, inputs, DEVICE)
    assert verdict.problem == ""
    assert verdict.rms_error < 1e-4
    for name, value in before.items():
        torch.testing.assert_close(inputs[name], value, rtol=0, atol=0, equal_nan=True)


def test_one_element_of_many_must_not_be_far_off() -> None:
    tolerance = Tolerance(rtol=8e-3, atol=1e-6, rms=4e-3, reason="")
    expected = torch.randn(1000, 1000, dtype=torch.float64)
    actual = expected.bfloat16()
    assert compare("y", actual, expected, tolerance).problem == ""
    actual[3, 4] += 0.1
    assert "an element is off" in compare("y", actual, expected, tolerance).problem
    actual[3, 4] = torch.inf
    assert "not finite" in compare("y", actual, expected, tolerance).problem
    ids = torch.arange(8)
    assert (
        "1 elements differ" in compare("y", ids, ids.clone().index_fill_(0, ids[:1], 9), tolerance, exact=True).problem
    )


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in SAME.items() for case in cases])
def test_what_a_user_would_run_instead_computes_the_same(op: str, case: str) -> None:
    work = work_of(op, case)
    assert work.case.name == case
    compared = 0
    for alternative in alternatives(op):
        if alternative.slow_start:
            continue
        torch.manual_seed(0)
        inputs = work.spec.make_inputs(work.case, work.dtype, CPU)
        expected, expected_in_place = run_reference(work, inputs)
        try:
            run, as_reference = alternative.prepare(inputs)
            result = run()
        except RuntimeError:  # some of torch's attentions need CUDA
            assert alternative.name.startswith("sdpa")
            continue
        limit = 0.03 if op == "resize_tiles" else 1e-5
        if expected is not None and as_reference is not None:
            assert relative_error(as_reference(result), expected) < limit, alternative.name
            compared += 1
        for name, wanted in expected_in_place.items():
            torch.testing.assert_close(inputs[name].to(wanted.dtype), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
            compared += 1
        if op == "sample":  # compare the greedy rows, which draw nothing at random
            greedy = (inputs["temperature_R"] == 0) | (inputs["top_k_R"] == 1)
            assert torch.equal(result[greedy], work.spec.reference(**inputs)[greedy])
            compared += int(greedy.sum())
    assert compared > 0


def test_attention_behind_a_prefix_is_causal_from_the_end() -> None:
    case = Case("chunk", {"chunks": ((70, 26),), "H": 4, "G": 2, "C": 32, "P": 16})
    work = Work(SPECS["prefill_attention"], case, torch.float32)
    inputs = work.spec.make_inputs(case, torch.float32, CPU)
    expected, _ = run_reference(work, inputs)
    assert expected is not None
    compared = set()
    for alternative in alternatives("prefill_attention"):
        run, as_reference = alternative.prepare(inputs)
        assert as_reference is not None
        try:
            torch.testing.assert_close(as_reference(run()).double(), expected, rtol=1e-4, atol=1e-5)
        except RuntimeError:
            continue
        compared.add(alternative.name)
    assert compared >= {"sdpa flash", "sdpa math"}


@pytest.mark.parametrize(
    ("op", "case"), [("rms_norm", "width_129"), ("gemm_epilogue", "gelu_fused"), ("add_norm", None)]
)
def test_the_kernel_has_the_first_row_and_each_alternative_one_more(
    op: str, case: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measure_kernel(work_of(op), DEVICE, ROOFLINE, far_away())
    assert "baseline" not in rows[0]
    assert rows[0]["rms_error"] < 1e-5
    names = [row["baseline"] for row in rows[1:]]
    assert names == (["cublas + element-wise", "cublas alone"] if op == "gemm_epilogue" else ["torch eager"])
    assert [row.get("partial") for row in rows[1:]] == [None, True][: len(names)]
    assert len({row["name"] for row in rows}) == 1
    assert ("not torch.compile" in capsys.readouterr().err) == (op != "gemm_epilogue")  # there is no time to compile


def test_an_alternative_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Alternative("other", lambda inputs: (lambda: inputs["gate_up_T2F"][:, :1024], same))
    monkeypatch.setattr(kernels, "alternatives", lambda op: [other])
    assert len(measure_kernel(work_of("swiglu", "width_1024"), DEVICE, ROOFLINE, far_away())) == 1
    assert "not other: ValueError: its result differs by" in capsys.readouterr().err


def test_a_slow_start_is_cut_off_and_counts_against_the_limit() -> None:
    def hang() -> None:
        while True:
            time.sleep(0.01)

    with pytest.raises(TimeoutError, match="not ready"), kernels.time_limit(0.05):
        hang()
    limits = Limits(end=0, slow_start_s=5)
    slow = Alternative("slow", lambda inputs: (lambda: time.sleep(0.1), None), slow_start=True)
    kernels.prepare_alternative(slow, [{}], None, limits)
    assert 4 < limits.slow_start_s < 4.95


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    works = plan_work(CPU, ["rms_norm"])

    def stop_at_the_third(work: Work, *_: Any) -> list[dict[str, Any]]:
        if work is works[2]:
            raise KeyboardInterrupt
        return [{"name": work.name, "problem": "none of this test's"}]

    monkeypatch.setattr(kernels, "measure", stop_at_the_third)
    table = measure_all(works, DEVICE, ROOFLINE, far_away())
    assert [row["name"] for row in table.rows] == [work.name for work in works[:2]]
    assert table.left_out == [work.name for work in works[2:]]


def test_one_of_each_comes_first_then_a_step_of_the_1b_and_the_8b_and_other_tilings_last() -> None:
    works = plan_work(torch.device("cuda"))  # nothing runs, so a CUDA device may be named
    assert {work.name.split("/")[0] for work in works} == SPECS.keys()
    assert len({work.name for work in works}) == len(works)
    one_each, first, last = works[: len(SPECS)], works[len(SPECS) : len(SPECS) + 8], works[-12:]
    assert {work.spec.name for work in one_each} == SPECS.keys()
    assert all(work.spec.name in ("gemv", "gemv_qkv", "decode_attention") for work in first)
    assert {work.case.name.split("_")[0] for work in first} == {"1b", "8b"}
    assert all("implementation" in work.case.sizes for work in last)
    assert {"1b_gate_up_64_rows", "78b_down_3392_rows"} <= {
        work.case.name for work in real_work(SPECS["gemm_epilogue"])
    }
    assert len(plan_work(torch.device("cuda"), quick=True)) == len(SPECS)


def test_the_roof_is_what_takes_longer_bytes_or_operations() -> None:
    small, large = Cost(bytes=4_000_000, flops=8_000_000), Cost(bytes=4_000_000, flops=8 * 10**9)
    assert roof_us(small, torch.bfloat16, ROOFLINE) == (pytest.approx(1), "bandwidth")
    assert roof_us(large, torch.bfloat16, ROOFLINE) == (pytest.approx(10), "compute")
    assert roof_us(large, torch.uint8, ROOFLINE) == (pytest.approx(1), "bandwidth")
    assert [copy_us(size, ROOFLINE) for size in (1, 10**6, 16 * 10**6)] == pytest.approx([1, 1, 4])
    assert copy_us(8_500_000, ROOFLINE) == pytest.approx(2.5)
    assert copy_us(32 * 10**6, ROOFLINE) == pytest.approx(8)
