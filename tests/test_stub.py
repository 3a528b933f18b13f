"""The compiled module has the interface that its stub promises to type checkers."""

import subprocess
import sys


def test_the_stub_matches_the_compiled_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "internvl_rt._C"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
