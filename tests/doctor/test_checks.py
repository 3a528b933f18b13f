"""The single checks of `internvl-rt doctor` look at compiler, driver, device, packages and kernels."""

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internvl_rt.doctor import answer, checks, kernels, machine
from internvl_rt.doctor.finding import Finding, describe
from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels.catalogue import discover_specs


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return "there is neither gcc nor clang on the PATH"


def no_program_of_that_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("CC", "/nowhere/gcc-99")
    return "/nowhere/gcc-99 cannot be started (No such file or directory)"


def no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    return f"Python's headers are not in {tmp_path}; install the system's package python3"


def a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    script = tmp_path / "broken-cc"
    script.write_text("#!/bin/sh\necho 'cannot execute cc1' >&2\nexit 4\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return f"{script} fails: cannot execute cc1; install gcc"


@pytest.mark.parametrize("trouble", [no_compiler, no_program_of_that_name, no_headers, a_compiler_that_fails])
def test_with_a_gpu_what_triton_lacks_to_build_is_a_failure(
    trouble: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert machine.check_compiler().status == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    expected = trouble(monkeypatch, tmp_path)
    found = machine.check_compiler()
    assert found.status == "failed"
    assert expected in found.text
    assert "\n" not in found.text


def cuda_library(error: int, num_devices: int) -> Any:
    """Returns a stand-in for the driver's library, with the error that its start gives."""

    def get_count(count: Any) -> int:
        count._obj.value = num_devices
        return 0

    def get_version(number: Any) -> int:
        number._obj.value = 12080
        return 0

    return SimpleNamespace(cuDriverGetVersion=get_version, cuInit=lambda flags: error, cuDeviceGetCount=get_count)


@pytest.mark.parametrize(
    ("library", "driver", "status", "text"),
    [
        (None, None, "ok", "none: there is no NVIDIA driver"),
        (None, "570.86", "failed", "nvidia-smi knows driver 570.86, but its library libcuda.so.1 does not load"),
        (cuda_library(0, 1), "570.86", "ok", "570.86, for CUDA up to 12.8"),
        (cuda_library(100, 0), "570.86", "ok", "no GPU, or CUDA_VISIBLE_DEVICES hides them"),
        (cuda_library(802, 0), None, "failed", "for CUDA up to 12.8, does not start: CUDA error 802"),
    ],
    ids=["none", "no_library", "works", "hidden", "does_not_start"],
)  # fmt: skip
def test_the_driver_is_looked_at_without_torch(
    library: Any, driver: str | None, status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(machine, "output_of", lambda *command: driver)
    monkeypatch.setattr(ctypes, "CDLL", load)
    found = machine.check_driver()
    assert found.status == status
    assert text in found.text


def test_a_gpu_that_torch_cannot_use_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: cuda_library(0, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = machine.check_device()
    assert found.status == "failed"
    assert found.text.startswith(
        f"a GPU is there, but torch {torch.__version__} is built without CUDA; install a torch"
    )


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_packages().status == "ok"
    wanted = ["torch>=2.11", "nosuchpackage>=1", "numpy >=99.1", 'pytest>=999; extra == "test"']
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    found = machine.check_packages()
    assert found.status == "failed"
    assert found.text.startswith("nosuchpackage is not installed, numpy ")
    assert " is older than 99.1; install what is missing: pip install --upgrade internvl-rt" in found.text
    assert "pytest" not in found.text


def test_whatever_a_check_raises_is_a_finding_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("no disk\nand more of that")

    monkeypatch.setitem(checks.CHECKS, "torch", (broken, "do this"))
    assert checks.run("torch") == Finding("failed", "OSError: no disk; do this")


def test_of_a_compilers_error_the_last_line_is_shown() -> None:
    compilation = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    assert describe(compilation("at 3:4:\n    x = y\n    ^\nNameError('y')")) == "CompilationError: NameError('y')"
    assert describe(ValueError("first\nsecond")) == "ValueError: first"
    assert describe(KeyError()) == "KeyError"


def test_a_wrong_answer_is_shown_beside_the_right_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(answer, "SAMPLE", Path(shutil.copy(answer.SAMPLE, tmp_path / "1066.png")))
    found = answer.check_answer("torch")
    assert found.status == "failed"
    assert "reads '4719' in its sample picture, expected '1066', with backend=\"torch\" in " in found.text
    assert found.facts["answer"] == "4719"


def test_an_error_of_the_device_is_said_to_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_device(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(kernels, "check_call", break_device)
    found = kernels.check_operation("swiglu")
    assert found.status == "failed"
    assert found.text == (
        "swiglu/widest/float32 does not run: RuntimeError: CUDA error: an illegal memory access was encountered; that "
        'ends this process, and what follows runs in a new one; backend="torch" computes without the kernels'
    )


@pytest.mark.fast("sm_90")
@pytest.mark.parametrize("target", [TARGETS[80], TARGETS[90]], ids=["sm_80", "sm_90"])
def test_each_operation_is_checked_on_something(target: Any) -> None:
    """The cases, one to three, launch each kernel: products with TMA and without, attention with norms and without."""
    chosen = {}
    for spec in discover_specs().values():
        dtype = next(iter(spec.tolerances))
        cases = kernels.chosen_cases(spec, dtype, target)
        if spec.min_capability > target.capability:
            assert cases == []
            continue
        assert 1 <= len(cases) <= kernels.MAX_CASES
        assert all(spec.cost(case, dtype).bytes > 0 for case in cases)
        checked, launched = (
            {launch.kernel.__name__ for case in some for launch in kernels.launches_of(spec, case, dtype, target)}
            for some in (cases, spec.test_cases)
        )
        assert checked == launched, spec.name
        chosen[spec.name] = {case.name for case in cases}
    assert {"residual_cublas", "residual_fused"} < chosen["gemm_epilogue"]
    assert ("residual_tma" in chosen["gemm_epilogue"]) == (target.capability >= 90)
    assert "channels_128" in chosen["vit_attention"]
    assert any("norms" in name for name in chosen["vit_attention"])
