"""The process in which checks run: it reads names of checks from stdin and writes what each finds to stdout."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType

from internvl_rt.doctor import machine
from internvl_rt.doctor.finding import Finding, describe

KERNEL = "kernel "  # prefix of the names of checks of single operations


def _kernels() -> ModuleType:
    from internvl_rt.doctor import kernels

    return kernels


def _answers() -> ModuleType:
    from internvl_rt.doctor import answer

    return answer


# Each check by name, and what to do if it raises.
CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {
    "internvl-rt": (machine.check_package, "install it: pip install internvl-rt, or pip install -e . in a checkout"),
    "python": (machine.check_python, "use Python 3.11 or newer"),
    "packages": (machine.check_packages, "install them again: pip install --upgrade internvl-rt"),
    "driver": (machine.check_driver, "install the NVIDIA driver again"),
    "torch": (machine.check_torch, "install it again: pip install --force-reinstall torch"),
    "device": (machine.check_device, "the GPU is broken, in use, or does not fit this torch: see nvidia-smi"),
    "compiled part": (machine.check_compiled_part, "install the package again"),
    "triton": (machine.check_triton, "install it again: pip install --force-reinstall triton (Linux only)"),
    "compiler": (machine.check_compiler, "install gcc, or name one in CC"),
    "launch": (
        lambda: _kernels().check_launch(),
        'Triton cannot run its kernels here; backend="torch" computes without them',
    ),
    "backend": (lambda: _answers().check_backend(), "choose another with backend= and device="),
    "answer": (lambda: _answers().check_answer("auto"), "report this"),
    "answer by torch": (lambda: _answers().check_answer("torch"), "report this"),
}


def run(name: str) -> Finding:
    """Runs a check; whatever it raises becomes a finding."""
    check, advice = CHECKS.get(name, (lambda: _kernels().check_operation(name.removeprefix(KERNEL)), "report this"))
    try:
        found: Finding = check()
        return found
    except Exception as error:
        return Finding("failed", f"{describe(error)}; {advice}")


def serve() -> None:
    """Runs checks until stdin ends. What else writes to stdout, as libraries may, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(asdict(run(line.strip()))), file=answers, flush=True)
