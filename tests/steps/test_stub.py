"""Tests that the compiled module has the interface that its stub promises to type checkers."""

import os
import subprocess
import sys
from pathlib import Path

import internvl_rt._C as compiled

STUB = Path(__file__).parents[2] / "internvl_rt" / "_C.pyi"
# pybind11 gives its classes a metaclass of its own, which no type checker needs to know of.
ALLOWED = "_C.PagedKVCache"


def test_the_stub_matches_the_compiled_module(tmp_path: Path) -> None:
    for file in (STUB, Path(compiled.__file__)):  # outside the package, so that mypy does not read torch
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "allowed").write_text(ALLOWED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "_C", "--allowlist", "allowed"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ".", "MYPYPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
