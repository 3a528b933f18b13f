"""The package made usable where CMake or ninja are missing, as on a GPU machine without network: one compiler call."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def build_in_place(root: Path, flags: Sequence[str] = ("-O3",)) -> None:
    """Compiles csrc/ into internvl_rt/ and writes the package's metadata, all in the checkout.

    Every source file is compiled each time, one after the other. Raises CalledProcessError.
    """
    import pybind11

    target = root / "internvl_rt" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", *flags]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command += [*map(str, sorted(root.glob("csrc/*.cpp"))), "-o", str(target)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    subprocess.run([sys.executable, "setup.py", "--quiet", "egg_info"], check=True, stdout=sys.stderr, cwd=root)
