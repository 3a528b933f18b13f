"""`internvl-rt doctor` reports on this machine, and on machines where something is missing, broken, hangs or dies."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_rt.cli import main
from internvl_rt.doctor import command
from internvl_rt.doctor.finding import Finding
from internvl_rt.doctor.process import MAX_LOST, CheckProcess
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.model.processor import default_dtype, instructions, runs_onednn

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
# An editable installation would find the compiled part in its checkout; this program removes its import hook.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def doctor(*arguments: str, paths: tuple[Path, ...] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the doctor as a user does: without the interpreter unless `environment` asks for it. `paths` come first."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([*map(str, paths), str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-P", "-m", "internvl_rt", "doctor", *arguments],
        env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def lines_of(done: "subprocess.CompletedProcess[str]") -> dict[str, tuple[str, str]]:
    """Returns status and text by the name of the check. Every line but the last is one check."""
    assert done.stderr == ""
    rows = [(line[26 + 13 :].strip(), line[:13].strip(), line[13:39].strip()) for line in done.stdout.splitlines()[:-1]]
    return {name: (status, text) for text, status, name in rows}


def copied_package(folder: Path) -> Path:
    """Copies the package without its compiled part, so that a test can break the copy."""
    shutil.copytree(
        ROOT / "internvl_rt", folder / "internvl_rt", ignore=shutil.ignore_patterns("__pycache__", "_C.*so")
    )
    return folder / "internvl_rt"


def with_compiled_part(package: Path) -> Path:
    for path in (ROOT / "internvl_rt").glob("_C.*.so"):
        shutil.copy(path, package)
    return package


def test_this_machine_is_in_order() -> None:
    done = doctor()
    found = lines_of(done)
    assert not [line for line in found.items() if line[1][0] == "failed"]
    assert done.returncode == 0
    assert list(found)[: len(command.NEEDS)] == list(command.NEEDS)
    assert f"torch {version('torch')}" in found["packages"][1]
    assert "reads 4719" in found["answer"][1]
    if ON_GPU:
        assert {f"kernel {name}" for name in discover_specs()} <= set(found)
        assert "answer by torch" in found
    else:
        name, dtype = "onednn" if runs_onednn() else "torch", str(default_dtype()).removeprefix("torch.")
        why = f"torch in {dtype}, for a processor with {instructions()}, as there is no GPU for the kernels"
        assert found["backend"] == ("ok", f'"{name}": {why}')
        assert found["kernels"] == ("not checked", "there is no GPU for the kernels to run on")
        assert done.stdout.splitlines()[-1] == "11 ok, 0 failed, 2 not checked"


@pytest.mark.slow
def test_a_kernel_made_wrong_is_named_and_nothing_else_is(tmp_path: Path) -> None:
    """On a CPU this test asks for Triton's interpreter. `--json` prints one document."""
    file = with_compiled_part(copied_package(tmp_path)) / "kernels" / "swiglu.py"
    text = file.read_text()
    assert text.count("(silu * up)") == 1
    file.write_text(text.replace("(silu * up)", "(silu * up * 1.01)"))
    done = doctor("--json", paths=(tmp_path,), **({} if ON_GPU else {"TRITON_INTERPRET": "1"}))
    report = json.loads(done.stdout)
    assert (done.returncode, report["healthy"], report["schema"]) == (1, False, 1)
    findings = {check["name"]: check for check in report["checks"]}
    assert {f"kernel {name}" for name in discover_specs()} <= set(findings)
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    # On a GPU the check named "answer" may fail too, since the model runs that kernel.
    assert [check["name"] for check in failed if check["name"] != "answer"] == ["kernel swiglu"]
    assert failed[0]["text"].startswith("swiglu/widest/float32 is wrong: at (")
    assert failed[0]["text"].endswith('; backend="torch" computes without the kernels')
    kinds = {"float32", "float16"} | ({"bfloat16"} if ON_GPU else set())
    assert set(findings["kernel gemv"]["facts"]["shares"]) == kinds
    assert 0 < max(findings["kernel gemv"]["facts"]["shares"].values()) <= 1
    assert findings["torch"]["facts"]["version"] == torch.__version__


def test_a_broken_triton_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol: PyExc')\n")
    done = doctor(paths=(tmp_path,))
    found = lines_of(done)
    assert done.returncode == 1
    assert {name: text for name, (status, text) in found.items() if status == "failed"} == {
        "triton": "ImportError: libtriton.so: undefined symbol: PyExc; "
        "install it again: pip install --force-reinstall triton (Linux only)"
    }
    assert found["compiled part"][0] == found["device"][0] == "ok"
    assert found["kernels"] == found["answer"] == ("not checked", "needs triton, which failed")


@pytest.mark.fast("none")
@pytest.mark.parametrize("other", [None, "_C.cpython-310-x86_64-linux-gnu.so"], ids=["none", "of_another_python"])
def test_a_missing_compiled_part_is_named_once(tmp_path: Path, other: str | None) -> None:
    package = copied_package(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EDITABLE)
    if other is not None:
        (package / other).touch()
    done = doctor(paths=(tmp_path,))
    failed = {name: text for name, (status, text) in lines_of(done).items() if status == "failed"}
    assert done.returncode == 1
    assert list(failed) == ["compiled part"]
    assert f"there is {other or 'none'}" in failed["compiled part"]
    assert "build it with this Python: pip install" in failed["compiled part"]
    assert lines_of(done)["answer"] == ("not checked", "needs compiled part, which failed")


def test_without_a_compiler_is_said_in_one_line(tmp_path: Path) -> None:
    done = doctor(PATH=str(tmp_path), CC="")
    status, text = lines_of(done)["compiler"]
    assert "there is neither gcc nor clang on the PATH; install one, or name one in CC" in text
    if ON_GPU:
        assert (done.returncode, status) == (1, "failed")
        assert lines_of(done)["kernels"] == ("not checked", "needs compiler, which failed")
    else:
        assert (done.returncode, status) == (0, "not checked")


HEALTHY = {
    "device": Finding("ok", "a GPU", {"kind": "cuda"}),
    "launch": Finding("ok", "", {"operations": ["gemv", "swiglu"]}),
}


@pytest.mark.parametrize(
    ("failing", "not_checked"),
    [
        ("packages", set()),
        ("torch", {"device", "compiler", "backend", "launch", "kernels", "answer"}),
        ("compiler", {"launch", "kernels", "answer"}),
        ("compiled part", {"backend", "answer", "answer by torch"}),
        ("launch", {"kernels", "answer"}),
        ("kernel gemv", set()),
        ("answer", set()),
    ],
)
def test_a_failure_is_not_reported_again_by_what_needs_it(failing: str, not_checked: set[str]) -> None:
    asked = []

    def ask(name: str) -> Finding:
        asked.append(name)
        return Finding("failed", "broken") if name == failing else HEALTHY.get(name, Finding("ok", ""))

    found = dict(command.diagnose(ask))
    assert [name for name, finding in found.items() if finding.status == "failed"] == [failing]
    assert {name for name, finding in found.items() if finding.status == "not checked"} == not_checked
    assert set(asked) == set(found) - not_checked


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("not checked", 0), ("failed", 1)])
def test_the_exit_code_says_whether_anything_failed(
    status: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        CheckProcess, "ask", lambda self, name: Finding(status if name == "answer" else "ok", name, {"operations": []})
    )
    assert main(["doctor"]) == code
    assert f"{status:<11}  {'answer':<26}  answer\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["healthy"] is (code == 0)


ANSWERING = """
import json, os, sys, time
number = 0
for line in sys.stdin:
    name, number = line.strip(), number + 1
    if name == "hangs":
        time.sleep(600)
    if name == "dies":
        print("it was the driver\\n", file=sys.stderr, flush=True)
        os.abort()
    if name == "ends":
        sys.exit(7)
    status = "failed" if name == "fails" else "ok"
    print(json.dumps({"status": status, "text": f"{name} as number {number}", "facts": {}}), flush=True)
"""


@pytest.fixture
def process() -> Any:
    process = CheckProcess((sys.executable, "-c", ANSWERING), timeout_s=1.5)
    yield process
    process.close()


def test_checks_share_a_process_until_one_fails(process: CheckProcess) -> None:
    texts = [process.ask(name).text for name in ("a", "b", "fails", "c", "d")]
    assert texts == ["a as number 1", "b as number 2", "fails as number 3", "c as number 1", "d as number 2"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hangs", "did not end within 1.5 s; report this"),
        ("dies", "ended its process with SIGABRT, saying last: it was the driver; report this"),
        ("ends", "ended its process with exit code 7; report this"),
    ],
)
def test_a_check_that_dies_or_hangs_costs_only_itself(process: CheckProcess, name: str, text: str) -> None:
    assert process.ask("a").status == "ok"
    assert process.ask(name) == Finding("failed", text)
    assert process.ask("b") == Finding("ok", "b as number 1")


def test_after_some_dead_processes_nothing_more_is_checked(process: CheckProcess) -> None:
    assert [process.ask("ends").status for _ in range(MAX_LOST)] == ["failed"] * MAX_LOST
    assert process.ask("a") == Finding("not checked", f"{MAX_LOST} checks before this one died or hung")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--help"], "doctor what works on this machine, for a bug report"), (["doctor", "--help"], "--json one JSON")],
    ids=["of_all", "of_its_own"],
)
def test_help_speaks_of_it(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 0
    assert text in " ".join(capsys.readouterr().out.split())
