"""Calls CMake with what this Python's environment has: for setup.py, the tests and the benchmarks."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")  # those that CMake looks for


class MissingToolError(Exception):
    """Something that a build needs is not installed; the message is one line that says what to install."""


def find_tool(name: str) -> str:
    """Finds the program of this Python's environment, which need not be on PATH; else that of the system."""
    try:
        module = importlib.import_module(name)  # the packages on PyPI say where their program is
        folder = str(getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None) or "")
    except ImportError:
        folder = ""
    search = os.pathsep.join(filter(None, [folder, sysconfig.get_path("scripts"), os.environ.get("PATH")]))
    program = shutil.which(name, path=search)
    if program is None:
        raise MissingToolError(f"{name} is needed to build csrc/: pip install {name}, or install the system's package")
    return program


def check_environment() -> None:
    """Raises MissingToolError for what CMake would report in many lines."""
    compilers = os.environ["CXX"].split()[:1] if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, compilers)):
        sought = " or ".join(compilers)
        raise MissingToolError(
            f"a C++20 compiler is needed to build csrc/, found no {sought}: install g++ or clang, or set CXX"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MissingToolError(f"Python's headers are needed to build csrc/: install python{version}-dev (or -devel)")
    if importlib.util.find_spec("pybind11") is None:
        raise MissingToolError("pybind11 is needed to build csrc/: pip install pybind11")


def build(
    folder: Path, targets: Sequence[str], *, preset: str = "release", source: Path = CSRC, quiet: bool = False
) -> None:
    """Builds the targets of source/CMakeLists.txt in `folder`, which stays: what has not changed is not built again.

    A folder that was configured in another way (another compiler, other flags, tools that have moved) is begun anew.
    quiet: nothing is printed unless something fails.
    Raises MissingToolError, or CalledProcessError when the compiler refuses something.
    """
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    check_environment()
    pybind11 = importlib.import_module("pybind11")
    configure = [cmake, "-S", str(source), "-B", str(folder), "--preset", preset, "--log-level=WARNING"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    how = json.dumps([configure, os.environ.get("CXX"), os.environ.get("CXXFLAGS"), os.environ.get("LDFLAGS")])
    stamp = folder / "configured.json"
    if not stamp.exists() or stamp.read_text() != how:
        shutil.rmtree(folder, ignore_errors=True)
    run(configure, quiet=quiet)
    stamp.write_text(how)
    run([cmake, "--build", str(folder), "--target", *targets], quiet=quiet)


def run(command: Sequence[str], *, quiet: bool) -> None:
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE if quiet else None, text=True)
    except subprocess.CalledProcessError as error:
        print(error.stdout or "", file=sys.stderr, end="")  # ninja says there what the compiler said
        raise
