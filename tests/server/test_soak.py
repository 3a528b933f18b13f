"""A short run of the soak; the long one is `python tests/soak_server.py --requests 10000`."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_server_bears_random_requests_under_random_faults() -> None:
    command = [sys.executable, str(TESTS / "soak_server.py"), "--requests", "250", "--seed", "7"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right, stream" in done.stdout
