"""Tests csrc/ under sanitizers and libstdc++'s debug mode, and that it allocates no memory in the steady state."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
import cmake_build

ROOT = Path(__file__).parents[2]
SOAK = ROOT / "tests" / "paged_kv_cache" / "soak.py"

# This code runs a script with the instrumented extension as internvl_rt._C. It leaves out the rest of the package,
# because that imports torch, which under a sanitizer would take longer than the test.
LOADER = """
import importlib.util, runpy, sys, types
_, extension, *sys.argv = sys.argv
sys.modules["internvl_rt"] = types.ModuleType("internvl_rt")
spec = importlib.util.spec_from_file_location("internvl_rt._C", extension)
module = sys.modules["internvl_rt._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Build:
    driver: Path
    extension: Path
    commands: dict[str, list[str]]  # source file -> the command that compiled it

    @property
    def compiler(self) -> str:
        return self.commands["block_pool.cpp"][0]


def run(*command: str | Path, **environment: str) -> str:
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def build() -> Build:
    """Builds with the preset `sanitize` of csrc/CMakePresets.json, in a folder that stays for the next run."""
    folder = ROOT / "build" / f"cmake-sanitize-{sys.implementation.cache_tag}"
    cmake_build.build(folder, ["_C", "kv_cache_bench"], preset="sanitize")
    entries = json.loads((folder / "compile_commands.json").read_text())
    commands = {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in entries}
    return Build(folder / "kv_cache_bench", folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", commands)


def run_python(build: Build, *arguments: str | Path) -> str:
    """Runs a script with the instrumented extension; preloads the sanitizer, as Python must not allocate before it."""
    libraries = [run(build.compiler, f"-print-file-name={name}.so").strip() for name in ("libasan", "libstdc++")]
    return run(
        *(sys.executable, "-c", LOADER, build.extension, *arguments),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps memory until it exits
        PYTHONMALLOC="malloc",  # with malloc the sanitizer also guards bytes objects
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--window", "40"]], ids=["plain", "window"])
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_no_operation_allocates_memory_in_the_steady_state(build: Build, seed: str, options: list[str]) -> None:
    command = build.driver, "--check-allocations", "--operations", "20000", "--seed", seed
    result = json.loads(run(*command, *options))
    assert result["heap_calls"] == 0 < result["warm_up_heap_calls"]
    # Without hits, evictions and copies the check would prove nothing.
    assert min(result["hit_tokens"], result["evictions"], result["copies"]) > 100


@pytest.mark.slow
def test_every_case_of_the_benchmark_runs_under_the_sanitizers(build: Build) -> None:
    result = json.loads(run(build.driver, "--repetitions", "2"))
    source = (ROOT / "bench" / "csrc" / "kv_cache_cases.cpp").read_text()
    assert sorted(result) == sorted(re.findall(r'^ +\{"(\w+)", "[num]s",', source, re.MULTILINE))
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in result.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_from_python_are_clean_under_the_sanitizers(build: Build, seed: int) -> None:
    assert "passed: 5000 steps" in run_python(build, SOAK, "--steps", "5000", "--seed", str(seed))


@pytest.mark.slow
def test_every_file_is_compiled_with_what_it_is_checked_for(build: Build) -> None:
    everywhere = {"-fsanitize=address", "-fno-sanitize-recover=all", "-D_GLIBCXX_DEBUG", "-Wconversion", "-Werror"}
    core = {path.name for path in ROOT.glob("csrc/*.cpp")} - {"bindings.cpp"}
    driver = {path.name for path in ROOT.glob("bench/csrc/*.cpp")}
    assert build.commands.keys() == core | driver | {"bindings.cpp"}
    for name, command in build.commands.items():
        # Files around the core have only the address sanitizer and no optimization, because pybind11's templates take
        # most of the time to compile.
        assert everywhere | ({"-O1", "-fsanitize=undefined"} if name in core else {"-O0"}) <= set(command), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("int faulty(const int* p) { delete[] p; return *p; }", "heap-use-after-free"),
        ("int faulty(const int* p) { return *p + 2147483647; }", "signed integer overflow"),
    ],
)
def test_the_sanitizers_are_on(build: Build, tmp_path: Path, fault: str, report: str) -> None:
    """A program with a fault, compiled with the command of the core, ends with the sanitizer's report."""
    source, program = tmp_path / "fault.cpp", tmp_path / "fault"
    source.write_text(f"{fault}\nint main() {{ return faulty(new int[4]{{1}}); }}")
    command = build.commands["block_pool.cpp"]
    run(*command[: command.index("-o")], "-Wno-error", source, "-o", program)
    process = subprocess.run([program], stderr=subprocess.PIPE, text=True)
    assert process.returncode != 0
    assert report in process.stderr
