"""What one run on a GPU machine consists of: the parts in their order, their commands and their shares of the time."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from document import DocumentError, parse, parse_last_line

ROOT = Path(__file__).parent.parent
SANITIZER_ERRORS = 86  # the exit code that we ask it for
SANITIZER_HOMES = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
SANITIZED = "rms_norm or gemv or qkv_rope_kv or vit_attention or decode_attention or copy_blocks"
Rows = list[dict[str, Any]]


class NotRunError(Exception):
    """The part says nothing, for a reason that is no failure of this project."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a command left behind."""

    lines: list[str]  # of its standard output
    exit_code: int
    stopped: bool  # its time was up


@dataclass(frozen=True, slots=True)
class Part:
    """`{budget_s}` in a command stands for the seconds that it may take; no command means that there is none here.

    `asked`: it runs only if it is asked for by name. `read` makes a document of the output. It raises DocumentError,
    which fails the part, or NotRunError.
    """

    name: str
    group: str
    share: float
    command: tuple[str, ...]
    absent: str = ""  # why there is no command
    proves: bool = False  # whether a failure leaves nothing worth timing
    asked: bool = False
    read: Callable[[Output, Mapping[str, Any], str], dict[str, Any]] = lambda output, *_: parse_last_line(output.lines)
    environment: tuple[tuple[str, str], ...] = ()


def document(part: str, rows: Rows, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    return {"part": part, "schema": 1, "rows": rows, "environment": dict(environment), "command": command}


def read_tests(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """From pytest's last summary, such as `3 failed, 120 passed, 2 warnings in 12.1s`."""
    summaries = [line for line in output.lines if re.search(r"\d+ (passed|failed|errors?)\b.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|error)", summaries[-1] if summaries else "")
    counts = {word: int(number) for number, word in found}
    if not counts and not output.stopped:
        raise DocumentError(f"no test ran (exit code {output.exit_code})")
    names = {"passed": "passed", "failed": "failed", "errors": "error"}
    row = {name: counts.get(word, 0) for name, word in names.items()}
    return document("tests", [row], environment, command)


def read_sanitizer(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The same tests ran without it before: what is no memory error of a kernel is the tool's inability to run here."""
    text = "\n".join(output.lines)
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if "Device not supported" in text or (output.exit_code not in {0, SANITIZER_ERRORS} and not output.stopped):
        raise NotRunError(f"compute-sanitizer cannot run here (exit code {output.exit_code}; see the log)")
    if not found and not output.stopped:
        raise NotRunError("compute-sanitizer said nothing")
    return document("tests", [{"memory_errors": int(found[-1])}] if found else [], environment, command)


def read_comparison(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """bench/compare_transformers.py prints one object with a table for each side."""
    result = parse(output.lines[-1] if output.lines else "")
    if isinstance(result, dict) and "rows" in result:
        return parse_last_line(output.lines)
    if not isinstance(result, dict) or not result.keys() >= {"ours", "theirs", "ratio"}:
        raise DocumentError(f"expected the comparison, got {str(result)[:80]!r}")
    settings = {key: value for key, value in result.items() if not isinstance(value, dict)}
    rows = [{"side": side, **settings, **result[side]} for side in ("ours", "theirs")]
    rows.append({"side": "ratio", **settings, **{f"{key}_ratio": value for key, value in result["ratio"].items()}})
    return document("compare_transformers", rows, environment, command)


def gpu_test_files() -> list[str]:
    """Those with a test marked `gpu`: collecting only them needs fewer packages than collecting all."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def build_parts(*, cpu: bool, select: str | None) -> tuple[Part, ...]:
    """All parts in order. `select` is pytest's -k for the contract; on the CPU, everything small."""
    python = sys.executable
    # A warning of a library that is newer or older than the pinned one is no mistake of a kernel.
    pytest = (python, "-m", "pytest", "--quiet", "--tb=short", "-W", "default", "-p", "no:cacheprovider")
    contract = "tests/kernels/test_contract.py"
    chosen = ("-k", select) if select else ()
    # Most of the time is compiling; each worker has a context on the GPU.
    workers = ("-n", str(min(12, os.cpu_count() or 1))) if not cpu and importlib.util.find_spec("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=SANITIZER_HOMES)
    no_device = "no CUDA device" if cpu else ""
    budget = ("--budget-s", "{budget_s}")
    quick = ("--quick",) if cpu else ()
    small = "tiny" if cpu else "random:InternVL3-1B"
    large, giant = ("", "") if cpu else ("random:InternVL3-8B", "random:InternVL3-38B")

    def script(name: str, *options: str) -> tuple[str, ...]:
        return (python, f"bench/{name}.py", *options)

    def bench(what: str, model: str) -> tuple[str, ...]:
        return (python, "-m", "internvl_rt", "bench", what, model, *budget, *quick) if model else ()

    sanitize = (
        *(sanitizer or "", "--tool", "memcheck", "--report-api-errors", "no"),
        *("--error-exitcode", str(SANITIZER_ERRORS), *pytest, "-p", "no:xdist"),
        *(contract, "-k", f"test_a_launcher_allocates_its_own_output and ({SANITIZED})"),
    )
    comparison = ("--quick",) if cpu else ("--device=cuda", "--dtype=bfloat16", "--tiles=13", "--tokens=64")
    has_transformers = importlib.util.find_spec("transformers") is not None

    def compare(*options: str) -> tuple[str, ...]:
        return script("compare_transformers", *comparison, *options) if has_transformers else ()

    return (
        Part("build", "build", 60, script("gpu", "--check"), proves=True),
        Part("contract", "tests", 200, (*pytest, *workers, contract, *chosen), proves=True, read=read_tests),
        Part(
            "gpu_tests", "tests", 60, () if cpu else (*pytest, "-m", "gpu", *gpu_test_files()),
            absent=no_device, proves=True, read=read_tests,
        ),
        Part(
            "sanitizer", "tests", 60, sanitize if sanitizer and not cpu else (),
            absent=no_device or "no compute-sanitizer", proves=True, read=read_sanitizer,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),  # torch's cache would hide what is outside
        ),
        Part("roofline", "roofline", 25, script("roofline", *quick)),
        Part("decode_1b", "decode", 45, bench("decode", small)),
        Part("decode_8b", "decode", 60, bench("decode", large), absent=no_device),
        Part("vision_1b", "vision", 35, bench("vision", small)),
        Part("prefill_1b", "prefill", 30, bench("prefill", small)),
        Part("prefill_8b", "prefill", 40, bench("prefill", large), absent=no_device),
        Part("kernels", "kernels", 90, script("kernel_table", *budget, *quick)),
        Part(
            "compare_transformers", "compare_transformers", 60, compare(),
            absent="no package transformers", read=read_comparison,
        ),
        Part("serve_1b", "serve", 40, bench("serve", small)),
        Part("vision_6b", "vision", 120, bench("vision", giant), absent=no_device, asked=True),
        Part(
            "compare_transformers_8b", "compare_transformers", 400,
            () if cpu else compare("--model=InternVL3-8B", "--rounds=1"),  # writes 32 GB of weights first
            absent=no_device or "no package transformers", read=read_comparison, asked=True,
        ),
    )  # fmt: skip


def choose(parts: Sequence[Part], asked: Sequence[str]) -> set[str]:
    """Names of the parts that `asked` names or whose groups it names; the check is always one of them."""
    known = {part.name for part in parts} | {part.group for part in parts}
    unknown = sorted(set(asked) - known)
    if unknown:
        listed = ", ".join(dict.fromkeys(part.group for part in parts))
        raise ValueError(f"--parts: expected some of {listed}, or single ones such as decode_1b, got {unknown[0]!r}")
    wanted = {*asked, "build"}
    return {
        part.name for part in parts if part.name in wanted or (not part.asked and (not asked or part.group in wanted))
    }
