"""The parts of a run on a GPU machine in their order, with their commands and their shares of the time."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proof import AGREEMENT, CONTRACT, DECODER, VISION

from internvl_rt.bench.document import DocumentError, parse, parse_last_line

ROOT = Path(__file__).parent.parent
SANITIZER_ERRORS = 86  # compute-sanitizer is asked to exit with this code if it finds an error
SANITIZER_HOMES = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
# Real cases in bfloat16, with several rounds of the loop over keys, the copy engine, and splits and their exchange.
SANITIZED = (
    "rms_norm/width_896 or add_norm/strided or gemv/split_5_swiglu or gemv/matrix_16_norm or gemv/split_rows"
    " or gemv_qkv/split or qkv_rope_kv or vit_attention or decode_attention/many_splits"
    " or decode_attention/shared_prefix or decode_attention/blocks_of_64 or prefill_attention or gemm_epilogue/residual"
    " or gemm_epilogue/rows or unshuffle_project/blocks or copy_blocks/several"
)
CALLS = ("first", "second", "third")  # sets of parts that take ten minutes each; a new machine needs this order
EXPERIMENTS = (
    "prefetch_keys",
    "prefetch_weights",
    "early_trigger",
    "tokens_to_host",
)  # of the engine; a fresh machine has no package
CONTRACT_FILE = "tests/kernels/test_contract.py"
ONE_THREAD = (("OMP_NUM_THREADS", "1"),)  # for several workers, because each would use all cores for its references
Rows = list[dict[str, Any]]


class NotRunError(Exception):
    """The part has no result, for a reason that is no failure of this project."""


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a command."""

    lines: list[str]  # of its standard output
    exit_code: int
    stopped: bool  # it was ended because its time was up


@dataclass(frozen=True, slots=True)
class Part:
    """`{budget_s}` in a command is replaced by the seconds that it may take; a word with `{commit}` is left out if no
    commit was given. A part without a command cannot run on this machine.

    `calls` are the CALLS that the part belongs to; without any it runs only if it is asked for by name. `uses` are the
    operations behind the times of a whole model; without them each row is about one operation. `read` makes a document
    of the output. It raises DocumentError, which fails the part, or NotRunError.
    """

    name: str
    group: str
    share: float  # seconds that it should take; the remaining budget is divided in proportion
    command: tuple[str, ...]
    calls: tuple[str, ...] = CALLS
    absent: str = ""  # why there is no command
    proves: bool = False  # whether it shows that the results are right
    times: bool = True  # whether its rows are the project's own times, which are marked proven or unproven
    uses: frozenset[str] = frozenset()
    leaves: str = ""  # a pattern for files that it writes in the repository; they are copied beside the results
    read: Callable[[Output, Mapping[str, Any], str], dict[str, Any]] = lambda output, *_: parse_last_line(output.lines)
    environment: tuple[tuple[str, str], ...] = ()


def document(part: str, rows: Rows, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    return {"part": part, "schema": 1, "rows": rows, "environment": dict(environment), "command": command}


# A line of `pytest -v`: `PASSED tests/x.py::test_it[case]` after a worker's name; without workers the word comes last.
RESULT = re.compile(
    r"(?:^|\s)(?P<before>PASSED|FAILED|ERROR)\s+(?P<id>tests/\S+::.+?)\s*$"
    r"|^(?P<id2>tests/\S+::.+?)\s+(?P<after>PASSED|FAILED|ERROR)\b"
)
SUMMARY = re.compile(r"=+ .*\d+ (passed|failed|errors?).* in [\d.]+s")
COUNTED = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors"}


def read_tests(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Reads the lines of `pytest -v`: makes a row for each operation, or for each file for tests of no operation.

    So a run that is stopped still has results. `first` is the first test that failed. The document is `complete` if
    pytest came to its own end, even if its workers had to be ended after it.
    """
    rows: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()  # pytest's summary at the end names failed tests again
    for line in output.lines:
        match = RESULT.search(line)
        if match is None:
            continue
        node, word = match["id"] or match["id2"], match["before"] or match["after"]
        node = node.partition(" - ")[0]
        if (node, word) in seen:
            continue
        seen.add((node, word))
        test = node.partition("::")[2]
        within = test.partition("[")[2].removesuffix("]")
        is_contract = "test_contract.py" in node and within
        name = within.partition("/")[0] if is_contract else Path(node.partition("::")[0]).stem
        row = rows.setdefault(name, {"name": name, "passed": 0, "failed": 0, "errors": 0})
        row[COUNTED[word]] += 1
        if word != "PASSED":
            row.setdefault("first", within.partition("/")[2] or test if is_contract else test)
    if not rows and not output.stopped:
        raise DocumentError(f"no test ran (exit code {output.exit_code})")
    summed_up = any(map(SUMMARY.search, output.lines)) and not any("KeyboardInterrupt" in line for line in output.lines)
    found = document("tests", sorted(rows.values(), key=lambda row: row["name"]), environment, command)
    return found | {"complete": summed_up}


def read_sanitizer(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Reads compute-sanitizer's output. The contract part runs the same tests without the tool, so a failure that is no
    memory error means that the tool cannot run here.
    """
    text = "\n".join(output.lines)
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if "Device not supported" in text or (output.exit_code not in {0, SANITIZER_ERRORS} and not output.stopped):
        raise NotRunError(f"compute-sanitizer cannot run here (exit code {output.exit_code}; see the log)")
    if not found and not output.stopped:
        raise NotRunError("compute-sanitizer said nothing")
    return document("tests", [{"memory_errors": int(found[-1])}] if found else [], environment, command)


def read_comparison(output: Output, environment: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Reads the last line of bench/compare_transformers.py, an object with a table for each side."""
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
    """The files with a test marked `gpu`, except whole models': collecting them needs fewer packages than all files."""
    files = sorted(set((ROOT / "tests").rglob("test_*.py")) - {ROOT / "tests" / "model" / "test_model_agreement.py"})
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def build_parts(*, cpu: bool, select: str | None) -> tuple[Part, ...]:
    """All parts in order. `select` is pytest's -k for the contract; on the CPU all settings are small."""
    python = sys.executable
    # Warnings are no errors here: a newer or older library's warning is no mistake of a kernel.
    pytest = (python, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider")
    chosen = ("-k", select) if select else ()
    # Most of the time is spent compiling; each worker has its own context on the GPU.
    workers = ("-n", str(min(12, os.cpu_count() or 1))) if not cpu and importlib.util.find_spec("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=SANITIZER_HOMES)
    no_device = "no CUDA device" if cpu else ""
    budget = ("--budget-s", "{budget_s}")
    quick = ("--quick",) if cpu else ()
    small = "tiny" if cpu else "random:InternVL3-1B"
    large, giant = ("", "") if cpu else ("random:InternVL3-8B", "random:InternVL3-38B")
    first, second, third = CALLS

    def script(name: str, *options: str) -> tuple[str, ...]:
        return (python, f"bench/{name}.py", *options)

    def measure(what: str, *options: str) -> tuple[str, ...]:
        return (python, "-m", "internvl_rt", "bench", what, *options)

    def bench(what: str, model: str, *options: str) -> tuple[str, ...]:
        return measure(what, model, *budget, *quick, *options) if model else ()

    def step(*options: str) -> tuple[str, ...]:
        return () if cpu else script("step_kernels", *options)

    sanitize = (
        *(sanitizer or "", "--tool", "memcheck", "--report-api-errors", "no"),
        *("--error-exitcode", str(SANITIZER_ERRORS), *pytest, "-p", "no:xdist"),
        *(CONTRACT_FILE, "-k", f"bfloat16 and ({SANITIZED})"),
    )
    comparison = (
        ("--quick",) if cpu else ("--device=cuda", "--dtype=bfloat16", "--tiles=13", "--tokens=64", "--rounds=1")
    )
    has_transformers = importlib.util.find_spec("transformers") is not None

    def compare(*options: str) -> tuple[str, ...]:
        return script("compare_transformers", *comparison, *options) if has_transformers else ()

    lone = () if cpu else ("--batch=1", "--context=2048")

    def experiment(name: str, *names: str) -> Part:
        """The step of one sequence with the engine's experiments of these names; without any for comparison."""
        command = bench("decode", small, *lone, *(f"--experiment={each}" for each in names))
        return Part(f"decode_1b_{name}", "experiments", 15, command, calls=(second,), uses=DECODER)

    tuned = ("--only=vit_attention", "--only=unshuffle_project", "--only=gemm_epilogue", "--commit={commit}")
    both = VISION | DECODER
    return (
        Part("build", "build", 70, script("gpu", "--check"), proves=True, times=False),
        Part(
            "prebuild", "prebuild", 25, () if cpu else script("prebuild", *budget, "--what=models"),
            absent=no_device, times=False,
        ),
        Part(
            "prebuild_tune", "prebuild", 45, () if cpu else script("prebuild", *budget, "--what=tune"),
            calls=(second,), absent=no_device, times=False,
        ),
        Part(
            CONTRACT, "tests", 75, (*pytest, *workers, "-m", "slow or not slow", CONTRACT_FILE, *chosen),
            proves=True, times=False, read=read_tests, environment=ONE_THREAD if workers else (),
        ),
        Part(
            AGREEMENT, "tests", 45, () if cpu else (*pytest, "-m", "gpu", "tests/model/test_model_agreement.py"),
            absent=no_device, proves=True, times=False, read=read_tests,
        ),
        Part(
            "gpu_tests", "tests", 80, () if cpu else (*pytest, "-m", "gpu", *gpu_test_files()),
            calls=(second,), absent=no_device, proves=True, times=False, read=read_tests,
        ),
        Part(
            "sanitizer", "tests", 60, sanitize if sanitizer and not cpu else (),
            calls=(second,), absent=no_device or "no compute-sanitizer", proves=True, times=False,
            read=read_sanitizer,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),  # torch's cache would hide accesses out of bounds
        ),
        Part("roofline", "roofline", 18, measure("roofline", *quick), times=False),
        experiment("plain"),
        *(experiment(name, name) for name in EXPERIMENTS),
        experiment("all_experiments", *EXPERIMENTS),
        experiment("plain_again"),
        Part(
            "tune", "tune", 150, () if cpu else script("tune", *budget, *tuned),
            calls=(second,), absent=no_device, leaves="kernels/plans/*.json",
        ),
        Part("decode_1b", "decode", 32, bench("decode", small), calls=(first,), uses=DECODER),
        Part(
            "decode_1b_without_pdl", "decode", 18, bench("decode", small, "--no-programmatic-launch", *lone),
            calls=(first,), uses=DECODER,
        ),
        Part(
            "decode_1b_without_graphs", "decode", 18, bench("decode", small, "--no-cuda-graphs", *lone),
            calls=(first,), uses=DECODER,
        ),
        Part("step_1b", "step", 18, step(), calls=(first,), absent=no_device, uses=DECODER),
        Part(
            "step_1b_without_pdl", "step", 18, step("--no-programmatic-launch"),
            calls=(first,), absent=no_device, uses=DECODER,
        ),
        Part("decode_8b", "decode", 32, bench("decode", large), calls=(first,), absent=no_device, uses=DECODER),
        Part("vision_1b", "vision", 22, bench("vision", small), calls=(first, second), uses=VISION),
        Part("prefill_1b", "prefill", 18, bench("prefill", small), calls=(first,), uses=both),
        Part("prefill_8b", "prefill", 24, bench("prefill", large), calls=(first,), absent=no_device, uses=both),
        Part(
            "rows_1b", "kernels", 10, () if cpu else script("rows", *budget),
            calls=(first,), absent=no_device, times=False,
        ),
        Part("kernels", "kernels", 90, measure("kernels", *budget, "--no-compile", *quick), calls=(first, third)),
        Part(
            "compare_transformers", "compare_transformers", 100, compare(),
            calls=(third,), absent="no package transformers", read=read_comparison, uses=both,
        ),
        Part("serve_1b", "serve", 60, bench("serve", small), calls=(third,), uses=both),
        Part("vision_6b", "vision", 120, bench("vision", giant), calls=(), absent=no_device, uses=VISION),
        Part(
            "compare_transformers_8b", "compare_transformers", 400,
            () if cpu else compare("--model=InternVL3-8B"),  # it writes 32 GB of weights first
            calls=(), absent=no_device or "no package transformers", read=read_comparison, uses=both,
        ),
    )  # fmt: skip


def choose(parts: Sequence[Part], asked: Sequence[str]) -> set[str]:
    """The names of the parts that `asked` names by name, group or call; the build is always one of them."""
    known = {part.name for part in parts} | {part.group for part in parts} | set(CALLS)
    unknown = sorted(set(asked) - known)
    if unknown:
        listed = ", ".join(dict.fromkeys((*CALLS, *(part.group for part in parts))))
        raise ValueError(f"--parts: expected some of {listed}, or single ones such as decode_1b, got {unknown[0]!r}")
    wanted = {*asked, "build"}
    return {
        part.name
        for part in parts
        if part.name in wanted or wanted & set(part.calls) or (part.calls and part.group in wanted)
    }
