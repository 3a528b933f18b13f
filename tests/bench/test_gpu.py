"""The command for a GPU machine runs on the CPU at small settings; stand-ins for its parts show the rules of parts."""

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
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.model import ops_triton
from support.result_schema import violations
from support.results import ENVIRONMENT, part

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import gpu
from parts import (
    CALLS,
    EXPERIMENTS,
    NotRunError,
    Output,
    Part,
    build_parts,
    choose,
    read_comparison,
    read_sanitizer,
    read_tests,
)
from proof import AGREEMENT, CONTRACT, DECODER, VISION

from internvl_rt.bench.document import DocumentError, load

ROOT = Path(__file__).parents[2]
TIMED = ("roofline", "decode", "vision", "prefill", "kernels", "serve")  # test_compare.py tests the other timed part


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
    """Runs bench/gpu.py on the CPU and returns its exit code, results and log."""
    command = [sys.executable, str(root / "bench" / "gpu.py"), "--cpu", "--out", str(out), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # a user sets none
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    (path,) = out.glob("*/*.json")
    assert path.with_suffix(".md").exists()
    results = load(path)
    assert not violations(results)
    return done.returncode, results, path.with_suffix(".log").read_text()


@pytest.mark.slow
def test_the_whole_sequence_runs_on_a_cpu_and_leaves_a_page_with_pictures(tmp_path: Path) -> None:
    exit_code, results, log = gpu_command(
        ROOT, tmp_path, "--parts", "first,serve", "--select", "rms_norm and width_896", "--commit", "0123abcd"
    )
    statuses = {name: entry["status"] for name, entry in results["parts"].items()}
    done = {"build", "contract", "roofline", "decode_1b", "vision_1b", "prefill_1b", "kernels", "serve_1b"}
    done |= {"decode_1b_without_pdl", "decode_1b_without_graphs"}
    assert {name for name, status in statuses.items() if status == "done"} == done, log
    assert {status for name, status in statuses.items() if name not in done} == {"not run"}
    assert exit_code == 0
    assert {entry["document"]["part"] for entry in results["parts"].values() if "document" in entry} >= set(TIMED)
    assert results["environment"]["device_kind"] == "cpu"
    documents = [entry["document"] for entry in results["parts"].values() if "document" in entry]
    assert {document["environment"]["commit"] for document in documents} == {"0123abcd"}
    (page,) = tmp_path.glob("*/*.md")
    assert "measures nothing" in page.read_text()
    assert len(list(tmp_path.glob("*/*.png"))) == page.read_text().count("![") == 3


@pytest.mark.slow
def test_a_mistake_a_hang_and_a_crash_cost_only_what_they_touch(tmp_path: Path) -> None:
    """In a copy, one kernel is wrong, one bench never ends and another is killed; everything else still has rows."""
    copy = tmp_path / "copy"
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("internvl_rt", "kernels", "csrc", "bench", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", copy)

    def plant(file: str, right: str, wrong: str) -> None:
        text = (copy / file).read_text()
        assert right in text
        (copy / file).write_text(text.replace(right, wrong))

    plant("kernels/rms_norm.py", "(1.0 / tl.sqrt_rn", "(1.01 / tl.sqrt_rn")
    plant("internvl_rt/bench/vision.py", "    prompter = ", "    time.sleep(1000)\n    prompter = ")
    plant("internvl_rt/bench/vision.py", "import numpy", "import time\n\nimport numpy")
    plant("internvl_rt/bench/prefill.py", "    prompter = ", "    os.kill(os.getpid(), 9)\n    prompter = ")
    plant("internvl_rt/bench/prefill.py", "import time", "import os\nimport time")

    start = time.monotonic()
    exit_code, results, log = gpu_command(
        *(
            copy,
            tmp_path / "out",
            "--select",
            "not fp8 and (rms_norm and width_896 or swiglu and width_1)",
            "--budget-s",
            "120",
        ),
        *(
            "--parts",
            "contract,roofline,decode_1b,vision_1b,prefill_1b,kernels",
        ),  # few parts, so that a busy machine has the time for them
    )
    assert time.monotonic() - start < 120 + gpu.GRACE_S + 30, "the page and the pictures come behind the parts"
    assert exit_code == 1
    parts = results["parts"]
    rows = {row["name"]: row for row in parts["contract"]["document"]["rows"]}
    assert (rows["rms_norm"]["passed"], rows["rms_norm"]["failed"]) == (0, 3), log  # three data types
    assert (rows["swiglu"]["failed"], parts["contract"]["reason"]) == (0, "rms_norm: 3 failed")
    assert "rms error 0.01" in log
    assert parts["vision_1b"]["status"] == "stopped"
    assert (parts["prefill_1b"]["status"], parts["prefill_1b"]["exit_code"]) == ("failed", -9)
    for name in ("roofline", "decode_1b", "kernels"):
        assert parts[name]["status"] == "done", (parts[name], log)
        assert parts[name]["document"]["rows"]
    assert {row["proof"] for row in parts["decode_1b"]["document"]["rows"]} == {"unproven"}
    (page,) = (tmp_path / "out").glob("*/*.md")
    head = page.read_text().partition("## Goals")[0]
    assert "contract (failed: rms_norm: 3 failed)" in head
    assert "`rms_norm` (3 of 3 tests failed, width_896/float32 the first)" in head
    assert "vision_1b (stopped" in head
    assert "prefill_1b (failed: exit code -9" in head


def test_every_command_of_a_gpu_machine_is_one_that_exists() -> None:
    """There is no GPU to run the commands on, so the test looks up their files and the options that they get."""
    for each in build_parts(cpu=False, select=None):
        words = [word.replace("{budget_s}", "9") for word in each.command if word]
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "bench/")))
        if words[1:3] == ["-m", "internvl_rt"]:
            assert getattr(cli._parser().parse_args(words[3:]), "budget_s", 9) == 9
        elif words[1:2] and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word.partition("=")[0]}"' in source for word in words[2:] if word.startswith("--"))
        if each.name in (CONTRACT, AGREEMENT, "gpu_tests"):
            assert any(word.startswith("tests/") for word in words)


def test_each_experiment_and_all_of_them_are_timed_between_two_plain_runs() -> None:
    assert EXPERIMENTS == ops_triton.EXPERIMENTS
    found = [each for each in build_parts(cpu=False, select=None) if each.group == "experiments"]
    flags = [[word for word in each.command if word.startswith("--experiment")] for each in found]
    all_flags = [f"--experiment={name}" for name in EXPERIMENTS]
    assert flags == [[], *([flag] for flag in all_flags), all_flags, []]
    assert choose(found, ["second"]) - {"build"} == {each.name for each in found}


def test_every_operation_that_has_a_contract_is_part_of_a_model() -> None:
    assert {name for name, spec in discover_specs().items() if spec.used_by} == VISION | DECODER


def test_the_plan_shows_three_calls_that_fit_their_time(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--plan"])
    assert gpu.main() == 0
    plan = capsys.readouterr().out
    for call in CALLS:
        section = plan.partition(f"{call}: ")[2].partition("\n")[2]
        seconds = []
        for line in section.splitlines():
            if not line.startswith("  "):
                break
            seconds.append(int(line.split()[1]))
        assert 480 <= sum(seconds) <= 500


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    wrong = python("roofline", "print('no result'); raise SystemExit(3)")
    fine = python("vision_1b", printing("vision", [{"tiles": 1}]))
    run = run_parts([wrong, fine], tmp_path)
    assert run.entries["roofline"]["status"] == "failed"
    assert run.entries["roofline"]["reason"].startswith("exit code 3; its last line is no result: expected JSON")
    assert run.entries["vision_1b"]["status"] == "done"
    assert run.exit_code() == 1
    assert run.path is not None
    assert load(run.path)["parts"]["vision_1b"]["document"]["rows"] == [{"tiles": 1, "proof": "unproven"}]


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
    assert (entry["status"], entry["document"]["rows"]) == ("stopped", [{"batch": 1, "proof": "unproven"}])
    assert entry["wall_s"] < 12
    assert run.exit_code() == 0


@pytest.mark.slow
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


CASE = "tests/kernels/test_contract.py::test_kernel_equals_its_reference"


def test_what_each_operation_passed_is_read_from_the_lines_of_its_tests() -> None:
    lines = [
        f"[gw5] [  2%] PASSED {CASE}[gemv/rows_1/float32] ",
        f"[gw0] [ 95%] FAILED {CASE}[vit_attention/huge/float16] ",
        f"{CASE}[gemv/rows_2/float16] PASSED [ 70%]",
        "tests/model/test_model_agreement.py::test_tower[torch.bfloat16] PASSED [ 20%]",
        "tests/engine/test_memory.py::test_a_pass FAILED [100%]",
        "tests/engine/test_memory.py::test_two ERROR [100%]",
        f"FAILED {CASE}[vit_attention/huge/float16] - AssertionError: worst at (22, 0): got inf",
        "FAILED tests/engine/test_memory.py::test_a_pass - assert 3 == 4",
        "=== 2 failed, 3 passed, 1 error in 75.20s (0:01:15) ===",
    ]
    rows = read_tests(Output(lines, 1, stopped=False), ENVIRONMENT, "pytest")["rows"]
    nothing = {"passed": 0, "failed": 0, "errors": 0}
    assert rows == [
        {"name": "gemv", **nothing, "passed": 2},
        {"name": "test_memory", **nothing, "failed": 1, "errors": 1, "first": "test_a_pass"},
        {"name": "test_model_agreement", **nothing, "passed": 1},
        {"name": "vit_attention", **nothing, "failed": 1, "first": "huge/float16"},
    ]


def test_tests_that_came_to_their_end_are_complete_though_workers_were_still_ending() -> None:
    case = f"{CASE}[gemv/rows_1/float32] PASSED [100%]"
    for more, complete in (
        (["=== 1 passed in 55.34s ==="], True),
        ([], False),
        (["!!!!! KeyboardInterrupt !!!!!", "=== 1 passed in 3.1s ==="], False),
    ):
        assert read_tests(Output([case, *more], 130, stopped=True), ENVIRONMENT, "pytest")["complete"] is complete


@pytest.mark.slow
def test_tests_that_are_stopped_at_their_end_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    lines = f"print('{CASE}[gemv/rows_1/float32] PASSED [100%]\\n=== 1 passed in 0.1s ===', flush=True)"
    ending = python("contract", f"import time\n{lines}\ntime.sleep(60)", proves=True, times=False, read=read_tests)
    assert run_parts([ending], tmp_path, budget_s=2).entries["contract"]["status"] == "done"


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


def test_parts_are_chosen_by_name_by_group_and_by_call() -> None:
    parts = build_parts(cpu=True, select=None)
    decode = {"decode_1b", "decode_1b_without_pdl", "decode_1b_without_graphs", "decode_8b"}
    assert choose(parts, ["decode"]) == {"build", *decode}
    assert choose(parts, ["prefill_8b", "roofline"]) == {"build", "prefill_8b", "roofline"}
    assert choose(parts, ["vision"]) == {"build", "vision_1b"}
    assert choose(parts, ["vision_6b"]) == {"build", "vision_6b"}
    assert {"build", "contract", "model_agreement", "tune", "vision_1b"} <= choose(parts, ["second"])
    assert {each.name for each in parts} - choose(parts, CALLS) == {"vision_6b", "compare_transformers_8b"}
    with pytest.raises(ValueError, match=r"expected some of first, second, third, build, .*got 'decodes'"):
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
    results = load(run.path)
    assert not violations(results)
    assert results["parts"]["sanitizer"]["reason"] == "no compute-sanitizer"
    assert run.exit_code() == 0
