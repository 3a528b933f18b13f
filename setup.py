"""The compiled part of the package; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()

setup(
    ext_modules=[
        Pybind11Extension(
            "internvl_rt._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),  # rebuild on a changed header; also puts the headers into the sdist
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wconversion"],
        )
    ]
)
