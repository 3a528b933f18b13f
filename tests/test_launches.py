"""What the driver is asked for when operations are launched as on a GPU: by Triton's own launcher, on a stand-in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fake_driver import fake_environment
from support.specs import discover_specs


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("driver")
    environment = {**fake_environment(folder), "FAKE_DRIVER_LOG": str(folder / "log")}
    command = [sys.executable, Path(__file__).parent / "support" / "fake_launches.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_operation_is_launched_as_planned(launches: list[dict[str, Any]]) -> None:
    assert {launch["operation"] for launch in launches} == set(discover_specs())
    for launch in launches:
        assert {name: launch["asked"][name] for name in launch["plan"]} == launch["plan"], launch
        assert launch["asked"]["shared_bytes"] <= 227 * 1024
        assert launch["launches"] == sum(other["operation"] == launch["operation"] for other in launches)


def test_the_kernels_that_are_launched_are_those_of_the_audit(launches: list[dict[str, Any]]) -> None:
    """Specialised alike: for what is a constant, and for what is known to be a multiple of 16."""
    assert not [launch for launch in launches if not launch["audited"]]


@pytest.mark.parametrize(("operation", "exit_code"), [("swiglu", 0), ("swigul", 2)])
def test_the_cost_of_a_launch_can_be_measured(operation: str, exit_code: int) -> None:
    script = Path(__file__).parent.parent / "bench" / "launch_cost.py"
    done = subprocess.run([sys.executable, script, operation], capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr[-4000:]
    if exit_code:
        assert "expected some of add_norm, " in done.stderr
    else:
        name, launches, *times = done.stdout.splitlines()[1].split()
        assert (name, launches) == ("swiglu", "1")
        assert all(0 < float(time) < 1e4 for time in times)
