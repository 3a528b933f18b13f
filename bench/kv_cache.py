"""Measures the bookkeeping of the KV cache: in C++, in instructions, and from Python beside other managers.

    python bench/kv_cache.py [--out FILE] [--runs 5] [--python-runs 3]

Builds the driver in bench/csrc with the extension's own objects, and runs it several times: of the medians the lowest
counts, since other programs only ever add to it. With valgrind, callgrind counts the instructions of each operation,
which no other program disturbs. Then bench/test_kv_cache.py runs (it needs pytest-benchmark), with vLLM's rows if vLLM
can be imported. The exit code is 1 if a target is missed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
import cmake_build
from options import count

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # the extension is built there too
REPETITIONS = 64  # counted by callgrind: an ordinary decode step repeats itself every 64 steps
FEW_REPETITIONS = {"evict_block": 8, "construct_65536": 2}  # operations whose state takes long to prepare


@dataclass(frozen=True)
class Target:
    """An upper bound for a time in the unit of its row or, with `peer`, for the ratio of our time to the peer's."""

    what: str
    side: str  # "cpp" or "python"
    name: str
    most: float
    peer: str | None = None


TARGETS = [
    Target("allocate a block", "cpp", "allocate_block", 30),
    Target("free a block", "cpp", "free_block", 30),
    Target("append to 256 sequences", "cpp", "append_256", 10),
    Target("the same, all cross a border", "cpp", "append_256_border", 60),
    Target("admit 3,392 tokens, cold", "cpp", "admit_3392_cold", 25),
    Target("admit 3,392 tokens, warm", "cpp", "admit_3392_warm", 15),
    Target("release 4,096 tokens", "cpp", "release_4096", 5),
    Target("append to 256 sequences", "python", "append_256", 25),
    Target("append, against vLLM", "python", "append_256", 1 / 50, "vllm"),
    Target("cold prefill, against vLLM", "python", "prefill_3392_cold", 1 / 10, "vllm"),
]


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def measure_cpp(driver: Path, num_runs: int) -> dict[str, Any]:
    runs = [json.loads(run(driver)) for _ in range(num_runs)]
    return {name: min((r[name] for r in runs), key=lambda row: row["median"]) for name in runs[0]}


def count_instructions(driver: Path, rows: dict[str, Any], folder: Path) -> dict[str, float]:
    """Instructions per block for operations measured by the block, else per call; empty without valgrind."""
    if not shutil.which("valgrind"):
        return {}
    counts = {}
    for name, row in rows.items():
        repetitions = FEW_REPETITIONS.get(name, 8 if name.endswith("border") else REPETITIONS)
        out = folder / f"{name}.callgrind"
        valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--toggle-collect=measured_region"]
        run(*valgrind, f"--callgrind-out-file={out}", driver, "--only", name, "--repetitions", str(repetitions))
        total = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
        assert total, out
        counts[name] = int(total[1]) / repetitions / row["work"]
    return counts


def measure_python(num_runs: int, folder: Path) -> dict[str, dict[str, float]]:
    """Returns the lowest median in microseconds, by operation and manager."""
    out = folder / "python.json"
    medians: dict[str, dict[str, float]] = {}
    for _ in range(num_runs):
        pytest = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--benchmark-quiet"]
        run(*pytest, f"--benchmark-json={out}", "bench/test_kv_cache.py")
        for row in json.loads(out.read_text())["benchmarks"]:
            params = row["params"] or {}
            manager = params.get("manager", params.get("name", "ours"))
            median = 1e6 * row["stats"]["median"]
            group = medians.setdefault(row["group"], {})
            group[manager] = min(median, group.get(manager, median))
    return medians


def judge(target: Target, cpp: dict[str, Any], python: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """Compares a target with what was measured; None if the peer's row is missing."""
    if target.side == "cpp":
        actual, unit = cpp[target.name]["median"], cpp[target.name]["unit"]
    else:
        row = python.get(target.name, {})
        if target.peer and target.peer not in row:
            return None
        actual, unit = (row["ours"] / row[target.peer], f"of {target.peer}'s") if target.peer else (row["ours"], "us")
    where = "C++" if target.side == "cpp" else "Python"
    return {
        "target": f"{target.what} ({where})",
        "most": target.most,
        "actual": actual,
        "unit": unit,
        "holds": actual <= target.most,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'C++':24}{'median':>10}{'lowest':>10}    {'instructions':>12}")
    for name, row in result["cpp"].items():
        count = result["instructions"].get(name)
        instructions = f"{count:12,.0f}" if count is not None else f"{'-':>12}"
        print(f"{name:24}{row['median']:10.4g}{row['lowest']:10.4g} {row['unit']} {instructions}")
    managers = ["ours", "plain", "vllm"]
    print(f"\n{'Python, us':24}" + "".join(f"{manager:>20}" for manager in managers))
    for name, row in result["python"].items():
        cells = (f"{row[m]:.1f} ({row[m] / row['ours']:.1f}x)" if m in row else "-" for m in managers)
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    print()
    for row in result["targets"]:
        verdict = "holds" if row["holds"] else "MISSED"
        print(f"{row['target']:44}{row['actual']:10.3g} {row['unit']:12} at most {row['most']:<8.3g}{verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where all of it goes as JSON")
    parser.add_argument("--runs", type=count, default=5, help="of the C++ side")
    parser.add_argument("--python-runs", type=count, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cmake_build.build(BUILD, ["kv_cache_bench"], quiet=True)
        driver = BUILD / "kv_cache_bench"
        run(driver, "--check-allocations")
        cpp = measure_cpp(driver, args.runs)
        python = measure_python(args.python_runs, Path(scratch))
        instructions = count_instructions(driver, cpp, Path(scratch))
    verdicts = [judge(target, cpp, python) for target in TARGETS]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "cpp": cpp,
        "instructions": instructions,
        "python": python,
        "targets": [verdict for verdict in verdicts if verdict],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0 if all(row["holds"] for row in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
