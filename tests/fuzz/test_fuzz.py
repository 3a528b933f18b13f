"""Damaged input gives the package's own errors, in bounded time and memory; `make fuzz` tries more of it."""

import mmap
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from fuzz import run
from fuzz.targets import TARGETS
from internvl_rt.errors import RequestError


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_raises_nothing_but_errors_of_the_package(target: str) -> None:
    command = [sys.executable, run.__file__, "--targets", target, "--count", "1000", "--seconds", "600"]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    assert f"{target}: 1000 inputs, 0 failed" in ended.stdout


def test_an_input_can_be_made_again() -> None:
    for name in ("picture", "config", "checkpoint", "torch_file"):
        assert TARGETS[name].make(Random(f"{name} 7")) == TARGETS[name].make(Random(f"{name} 7")), name


def test_faults_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(error: BaseException) -> str:
        def use(given: object, folder: Path) -> None:
            raise error

        return run.watch(use, None, tmp_path)[1]

    assert raises(RequestError("messages: expected a list")) == ""
    assert raises(RequestError("")).startswith("the text of RequestError")
    assert raises(IndexError("list index out of range")).startswith("IndexError at")
    assert raises(SystemExit(1)).startswith("SystemExit at")
    monkeypatch.setattr(run, "MOST_CHARACTERS", 10)
    assert raises(RequestError("messages: expected a list")).startswith("the text of RequestError")
    monkeypatch.setattr(run, "MOST_SECONDS", 0.01)
    assert run.watch(lambda given, folder: time.sleep(0.05), None, tmp_path)[1] == "more than 0.01 s"
    monkeypatch.setattr(run, "MOST_BYTES", 32 << 20)
    monkeypatch.setattr(run, "MOST_SECONDS", 5.0)

    def take(given: object, folder: Path) -> None:
        mmap.mmap(-1, 64 << 20).write(bytes(64 << 20))  # no memory that was freed before can serve for it

    assert run.watch(take, None, tmp_path)[1] == "more than 32 MiB"
