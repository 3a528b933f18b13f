"""csrc/ under the sanitizers and libstdc++'s debug mode, and its promise not to allocate memory in the steady state."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
SOAK = ROOT / "tests" / "paged_kv_cache" / "soak.py"
BINDINGS = ROOT / "csrc" / "bindings.cpp"
CORE = sorted(set(ROOT.glob("csrc/*.cpp")) - {BINDINGS})
DRIVER = sorted(ROOT.glob("bench/csrc/*.cpp"))

COMPILER = os.environ.get("CXX", "g++")
SANITIZE = "-fsanitize=address,undefined"
FLAGS = ["-fno-sanitize-recover=all", "-D_GLIBCXX_DEBUG", "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
# Headers of other packages, so their warnings are not ours.
PYTHON = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

# Runs a script with the instrumented extension as internvl_rt._C. The package around it is left out: it imports torch,
# whose start under a sanitizer would take longer than the test.
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


def run(*command: str | Path, **environment: str) -> str:
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("native")

    def compile_file(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        # Compiling is all that this costs, and most of it would be pybind11's templates: the core gets everything, what
        # surrounds it the address sanitizer.
        level, sanitize = ("-O1", "address,undefined") if source in CORE else ("-O0", "address")
        run(COMPILER, level, f"-fsanitize={sanitize}", *FLAGS, *WARNINGS, *PYTHON, "-c", source, "-o", target)
        return target

    sources = [BINDINGS, *CORE, *DRIVER]  # the longest first
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = dict(zip(sources, pool.map(compile_file, sources), strict=True))
    core = [objects[source] for source in CORE]
    result = Build(folder / "kv_cache_bench", folder / "_C.so")
    run(COMPILER, SANITIZE, *core, *(objects[source] for source in DRIVER), "-o", result.driver)
    run(COMPILER, SANITIZE, "-shared", *core, objects[BINDINGS], "-o", result.extension)
    return result


def run_python(build: Build, *arguments: str | Path) -> str:
    """A script with the instrumented extension; the sanitizer must be there before Python's first allocation."""
    libraries = [run(COMPILER, f"-print-file-name={name}.so").strip() for name in ("libasan", "libstdc++")]
    return run(
        *(sys.executable, "-c", LOADER, build.extension, *arguments),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps memory until it exits
        PYTHONMALLOC="malloc",  # so that bytes objects have guards around them too
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_operation_allocates_memory_in_the_steady_state(build: Build, seed: int) -> None:
    result = json.loads(run(build.driver, "--check-allocations", "--operations", "20000", "--seed", str(seed)))
    assert result["heap_calls"] == 0 < result["warm_up_heap_calls"]
    # A check of hits, evictions and copies that never saw one would be worth nothing.
    assert min(result["hit_tokens"], result["evictions"], result["copies"]) > 100


def test_every_case_of_the_benchmark_runs_under_the_sanitizers(build: Build) -> None:
    result = json.loads(run(build.driver, "--repetitions", "2"))
    source = (ROOT / "bench" / "csrc" / "kv_cache_cases.cpp").read_text()
    assert sorted(result) == sorted(re.findall(r'^ +\{"(\w+)", "[num]s",', source, re.MULTILINE))
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in result.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_from_python_are_clean_under_the_sanitizers(build: Build, seed: int) -> None:
    assert "passed: 5000 steps" in run_python(build, SOAK, "--steps", "5000", "--seed", str(seed))


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("int faulty(const int* p) { delete[] p; return *p; }", "heap-use-after-free"),
        ("int faulty(const int* p) { return *p + 2147483647; }", "signed integer overflow"),
    ],
)
def test_the_sanitizers_are_on(tmp_path: Path, fault: str, report: str) -> None:
    source, program = tmp_path / "fault.cpp", tmp_path / "fault"
    source.write_text(f"{fault}\nint main() {{ return faulty(new int[4]{{1}}); }}")
    run(COMPILER, "-O1", SANITIZE, *FLAGS, source, "-o", program)
    process = subprocess.run([program], stderr=subprocess.PIPE, text=True)
    assert process.returncode != 0
    assert report in process.stderr
