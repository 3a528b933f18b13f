"""The compiled module has the interface that its stub promises to type checkers."""

import subprocess
import sys
from pathlib import Path

# pybind11 gives its classes a metaclass of its own, which no type checker needs to know of.
ALLOWED = "internvl_rt._C.PagedKVCache"


def test_the_stub_matches_the_compiled_module(tmp_path: Path) -> None:
    allowlist = tmp_path / "allowed"
    allowlist.write_text(ALLOWED)
    command = [sys.executable, "-m", "mypy.stubtest", "internvl_rt._C", "--allowlist", str(allowlist)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
