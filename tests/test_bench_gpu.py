"""The one command for a GPU machine: on the CPU at small settings, and its parts' rules with stand-ins."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from internvl_rt import cli
from support.results import ENVIRONMENT, part

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gpu
from document import DocumentError, check, load
from parts import NotRunError, Output, Part, build_parts, choose, read_comparison, read_sanitizer, read_tests

ROOT = Path(__file__).parents[1]
TIMED = ("roofline", "decode", "vision", "prefill", "kernels", "serve")  # test_bench_compare.py has the other one


def python(name: str, code: str, **changes: Any) -> Part:
    return Part(name, name, **{"share": 1, "command": (sys.executable, "-c", code), **changes})


def printing(
    kind: str, rows: list[dict[str, Any]], before: str = "pass", after: str = "pass", **environment: Any
) -> str:
    document = part(kind, rows)["document"]
    document["environment"] = ENVIRONMENT | environment
    return f"import json, signal, sys, time\n{before}\nprint({json.dumps(json.dumps(document))}, flush=True)\n{after}"


def run_parts(
    parts: list[Part], tmp_path: Path, budget_s: float = 60, delay_s: float = 0, **environment: Any
) -> gpu.Run:
    before = f"time.sleep({delay_s})"
    build = python("build", printing("build", [{"x": 1}], before, **environment), proves=True)
    run = gpu.Run((build, *parts), {each.name for each in (build, *parts)}, budget_s, cpu=False)
    run.run(tmp_path)
    return run


def gpu_command(root: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, results and log."""
    command = [sys.executable, str(root / "bench" / "gpu.py"), "--cpu", "--out", str(out), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # as a user has it
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    (path,) = out.glob("*/*.json")
    assert path.with_suffix(".md").exists()
    return done.returncode, load(path), path.with_suffix(".log").read_text()


def test_the_whole_sequence_runs_on_a_cpu_and_leaves_a_page_with_pictures(tmp_path: Path) -> None:
    exit_code, results, log = gpu_command(
        ROOT, tmp_path, "--parts", ",".join(("tests", *TIMED)), "--select", "rms_norm and width_896"
    )
    statuses = {name: entry["status"] for name, entry in results["parts"].items()}
    without_gpu = {"gpu_tests", "sanitizer", "decode_8b", "prefill_8b"}
    not_asked = {"compare_transformers", "compare_transformers_8b", "vision_6b"}
    assert {name for name, status in statuses.items() if status != "done"} == without_gpu | not_asked, log
    assert exit_code == 0
    assert {entry["document"]["part"] for entry in results["parts"].values() if "document" in entry} >= set(TIMED)
    assert results["environment"]["device_kind"] == "cpu"
    (page,) = tmp_path.glob("*/*.md")
    assert "measures nothing" in page.read_text()
    assert len(list(tmp_path.glob("*/*.png"))) == page.read_text().count("![") == 3


def test_a_wrong_scale_in_a_kernel_fails_before_anything_is_timed(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("internvl_rt", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", copy)
    kernel = copy / "kernels" / "rms_norm.py"
    right = kernel.read_text()
    kernel.write_text(right.replace("(1.0 / tl.sqrt_rn", "(1.01 / tl.sqrt_rn"))
    assert kernel.read_text() != right

    exit_code, results, log = gpu_command(copy, tmp_path / "out", "--select", "rms_norm and width_896")
    assert exit_code == 1
    contract = results["parts"]["contract"]
    assert contract["status"] == "failed"
    assert contract["reason"] == "2 failed"
    assert "rms error 0.01" in log
    timed = {name: results["parts"][name] for name in results["parts"] if name not in ("build", "contract")}
    assert {entry["status"] for entry in timed.values()} == {"not run"}
    assert timed["roofline"]["reason"] == "correctness failed in contract"
    (page,) = (tmp_path / "out").glob("*/*.md")
    assert "Correctness failed in contract: nothing was timed" in page.read_text()


def test_every_command_of_a_gpu_machine_is_one_that_exists() -> None:
    """There is no GPU to try them on; so their files, and the options that they are given, are looked up."""
    for each in build_parts(cpu=False, select=None):
        words = [word.replace("{budget_s}", "9") for word in each.command if word]
        if words[1:3] == ["-m", "internvl_rt"]:
            assert cli._parser().parse_args(words[3:]).budget_s == 9
        elif words[1:2] and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word.partition("=")[0]}"' in source for word in words[2:] if word.startswith("--"))
        files = [word for word in words if word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
        if each.name in ("contract", "gpu_tests"):
            assert files


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    wrong = python("roofline", "print('no result'); raise SystemExit(3)")
    fine = python("vision_1b", printing("vision", [{"tiles": 1}]))
    run = run_parts([wrong, fine], tmp_path)
    assert run.entries["roofline"]["status"] == "failed"
    assert run.entries["roofline"]["reason"].startswith("exit code 3; its last line is no result: expected JSON")
    assert run.entries["vision_1b"]["status"] == "done"
    assert run.exit_code() == 1
    assert run.path is not None
    assert load(run.path)["parts"]["vision_1b"]["document"]["rows"] == [{"tiles": 1}]


def test_what_a_part_measured_is_on_disk_before_the_next_one_starts(tmp_path: Path) -> None:
    first = python("roofline", printing("roofline", [{"name": "read", "gb_s": 123.5}]))
    look = f"from pathlib import Path\nassert '123.5' in next(Path({str(tmp_path)!r}).glob('*/*.json')).read_text()"
    run = run_parts([first, python("vision_1b", printing("vision", [], before=look))], tmp_path)
    assert run.entries["vision_1b"]["status"] == "done"


def test_a_part_whose_time_is_up_is_asked_to_stop_and_what_it_had_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    asked = "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\nsys.stdout.flush()"
    slow = python("decode_1b", printing("decode", [{"batch": 1}], after=f"{asked}\ntime.sleep(60)"))
    run = run_parts([slow], tmp_path, budget_s=3)
    entry = run.entries["decode_1b"]
    assert (entry["status"], entry["document"]["rows"]) == ("stopped", [{"batch": 1}])
    assert entry["wall_s"] < 12
    assert run.exit_code() == 0


def test_tests_whose_time_was_up_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    slow = python("contract", "import time\ntime.sleep(60)", proves=True, read=read_tests)
    run = run_parts([slow], tmp_path, budget_s=2)
    assert run.entries["contract"]["status"] == "stopped"
    assert run.exit_code() == 1


def test_children_of_a_part_that_ignore_the_request_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    with (tmp_path / "log").open("ab") as log:
        output = gpu.run([sys.executable, "-c", code], 2, dict(gpu.environment_of(python("x", ""), cpu=True)), log)
    assert output.stopped
    assert output.lines == ["up"]
    assert time.monotonic() - start < 10


def test_time_that_a_part_leaves_goes_to_those_behind_it(tmp_path: Path) -> None:
    quick, last = (python(name, printing("vision", [])) for name in ("vision_1b", "serve_1b"))
    run = run_parts([quick, last], tmp_path, budget_s=60)
    assert run.entries["vision_1b"]["box_s"] < 31
    assert run.entries["serve_1b"]["box_s"] > 50


def test_nothing_starts_when_the_time_is_used_up(tmp_path: Path) -> None:
    run = run_parts([python("vision_1b", printing("vision", []))], tmp_path, budget_s=gpu.LEAST_S + 0.8, delay_s=1)
    assert run.entries["vision_1b"] == {"status": "not run", "reason": "no time was left"}


def test_without_a_device_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_parts([], tmp_path, device_kind="cpu")
    assert caught.value.code == 2
    assert "expected a machine where torch.cuda.is_available() is true" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("last", "row"),
    [
        ("1200 passed, 3 warnings in 75.20s (0:01:15)", {"passed": 1200, "failed": 0, "errors": 0}),
        ("2 failed, 7 passed, 1 deselected, 1 error in 3.4s", {"passed": 7, "failed": 2, "errors": 1}),
        ("===== 1 failed, 11 passed in 0.10s =====", {"passed": 11, "failed": 1, "errors": 0}),
    ],
)
def test_the_counts_of_tests_are_read_from_the_last_summary(last: str, row: dict[str, int]) -> None:
    output = Output(["FAILED test_a.py::test_it - assert 3 == 4", last], 1, stopped=False)
    assert read_tests(output, ENVIRONMENT, "pytest")["rows"] == [row]


def test_no_test_at_all_proves_nothing() -> None:
    with pytest.raises(DocumentError, match=r"no test ran \(exit code 5\)"):
        read_tests(Output(["no tests ran in 0.01s"], 5, stopped=False), ENVIRONMENT, "pytest")


def test_memory_errors_count_and_a_tool_that_cannot_run_does_not() -> None:
    found = Output(["9 passed in 9.0s", "========= ERROR SUMMARY: 4 errors"], 86, stopped=False)
    assert read_sanitizer(found, ENVIRONMENT, "")["rows"] == [{"memory_errors": 4}]
    for unable in (Output(["========= Error: Device not supported"], 1, False), Output([], -11, False)):
        with pytest.raises(NotRunError, match="cannot run here"):
            read_sanitizer(unable, ENVIRONMENT, "")


def test_the_comparison_becomes_a_row_of_each_side_and_one_of_ratios() -> None:
    each = {"first_token_s": 0.5, "per_token_s": 0.1, "peak_bytes": 7}
    line = json.dumps({"model": "InternVL3-1B", "tiles": 3, "ours": each, "theirs": each, "ratio": each})
    rows = read_comparison(Output(["a table", line], 0, stopped=False), ENVIRONMENT, "")["rows"]
    assert [row["side"] for row in rows] == ["ours", "theirs", "ratio"]
    assert rows[1] == {"side": "theirs", "model": "InternVL3-1B", "tiles": 3, **each}
    assert rows[2]["per_token_s_ratio"] == 0.1


def test_a_comparison_that_broke_off_is_no_result() -> None:
    with pytest.raises(DocumentError, match="expected the comparison"):
        read_comparison(Output(['"loaded"'], 1, stopped=False), ENVIRONMENT, "")


def test_parts_are_chosen_by_name_and_by_group() -> None:
    parts = build_parts(cpu=True, select=None)
    assert choose(parts, ["decode"]) == {"build", "decode_1b", "decode_8b"}
    assert choose(parts, ["prefill_8b", "tests"]) == {"build", "contract", "gpu_tests", "sanitizer", "prefill_8b"}
    assert choose(parts, ["vision"]) == {"build", "vision_1b"}
    assert choose(parts, ["vision_6b"]) == {"build", "vision_6b"}
    assert {each.name for each in parts} - choose(parts, []) == {"vision_6b", "compare_transformers_8b"}
    with pytest.raises(ValueError, match=r"expected some of build, tests, roofline, .*got 'decodes'"):
        choose(parts, ["decodes"])


@pytest.mark.parametrize("arguments", [["--cpu"], ["--budget-s", "0"], ["--parts", "everything"]])
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2


def test_a_results_file_holds_what_the_schema_allows(tmp_path: Path) -> None:
    run = run_parts([Part("sanitizer", "tests", 1, (), absent="no compute-sanitizer", proves=True)], tmp_path)
    assert run.path is not None
    assert check(json.loads(run.path.read_text()))["parts"]["sanitizer"]["reason"] == "no compute-sanitizer"
    assert run.exit_code() == 0
