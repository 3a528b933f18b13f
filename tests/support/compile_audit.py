"""Builds every kernel that a real model needs, for every target, and looks at the machine code: no GPU is needed.

    python tests/support/compile_audit.py [--out FILE.json] [--table FILE.md] [--only OPERATION] [--smallest]

Writes one row for each kernel and target, as an engine launches it and with all its experiments on, and prints the rows
that break a rule. Exits with 1 if there are any.

It runs in its own process, because the tests' process runs Triton's interpreter. ptxas, cuobjdump and nvdisasm come
with triton. The rules look at the SASS itself, never at the compiler flags.
"""

import argparse
import inspect as signatures
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).parent.parent))
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels._launch import TARGETS, Launch, Target, options_of
from internvl_rt.kernels.catalogue import discover_specs, preferred_dtype
from internvl_rt.kernels.gemv import MODELS
from internvl_rt.model.ops_triton import EXPERIMENTS
from support.specs import smallest_model_case

Job = tuple[str, str, torch.dtype, int, int, tuple[str, ...]]  # operation, case, dtype, target, launch, experiments
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
INSTRUCTIONS = {  # column -> SASS mnemonic
    "hgmma": r"[HQ]GMMA\.",  # Q: of FP8
    "hmma": r"[HQ]MMA\.",
    "imma": r"IMMA\.",
    "tcgen05": r"UTC[A-Z]*MMA",
    "tma_load": r"UTMALDG|UBLKCP",
    "load_128": r"(LDG|LDGSTS)\S*\.128",
    "store_128": r"STG\S*\.128",
    "load": r"(LDG|LDGSTS)[.\s]",
    "warp_specialized": r"USETMAXREG",
    "local_memory": r"\b(LDL|STL)[.\s]",
}

WEIGHTS = {**MODELS, "gpt": (2880, 2880, 64, 8, 64, 200028)}  # GPT-OSS, whose experts are not brought to L2
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory
MATRIX_UNITS = {80: "hmma", 89: "hmma", 90: "hgmma", 100: "tcgen05", 120: "hmma"}
RULES: dict[str, Callable[[dict[str, Any]], bool]] = {  # every row that was built must satisfy these
    "nothing spills": lambda row: not row["stack"] and not row["local_memory"],
    "shared memory fits": lambda row: row["shared_bytes"] <= TARGETS[row["target"]].shared_bytes,
    "tensor memory fits": lambda row: row["tensor_columns"] <= TENSOR_COLUMNS,  # else the kernel is nothing but a trap
    "matrix work runs on the target's own matrix units": lambda row: (
        not row["matrix_units"] or row[MATRIX_UNITS[row["target"]]] > 0
    ),
    "memory is read 16 bytes at a time": lambda row: not row["wide_loads"] or row["load_128"] > 0,
    "warp specialisation is applied where it is asked for": lambda row: (
        row["constexprs"].get("WARP_SPECIALIZE") != "True" or row["warp_specialized"] > 0
    ),
}


def label(row: dict[str, Any]) -> str:
    return f"{row['kernel']} ({row['operation']}/{row['case']}) for sm_{row['target']}"


def breaches(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each failed build and for each broken rule."""
    failed = [f"{label(row)} is not built: {row['error']}" for row in rows if "error" in row]
    built = [row for row in rows if "error" not in row]
    return failed + [
        f"{label(row)}: not so that {rule}" for rule, holds in RULES.items() for row in built if not holds(row)
    ]


def render_table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with one line for each kernel and target."""
    columns = ["operation", "kernel", "case", "target", "num_warps", "num_stages", "registers", "shared_bytes"]
    columns += ["instructions", *(name for name in INSTRUCTIONS if any(row.get(name) for row in rows))]
    lines = [f"# Kernels as built by triton {triton.__version__}", ""]
    lines += ["Compiled without a GPU by `make audit`; instruction counts are of the SASS. Nothing here was run.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, "failed")) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def source_of(launch: Launch) -> ASTSource:
    """Specialises the kernel as a launch does: for values divisible by 16, and with 1 as a constant."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = dict(launch.constexprs)
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        specialise = name in launch.constexprs or not launch.kernel.params[index].do_not_specialize
        divisible = False
        value = launch.args.get(name)
        if name in launch.constexprs:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = (value.storage_offset() * value.itemsize) % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
            specialise = False
        elif isinstance(value, float):
            signature[name], specialise = "fp32", False
        elif value == 1 and specialise:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if specialise:
            attrs[(index,)] = [["tt.divisibility", 16]] if divisible else []
    return ASTSource(launch.kernel, signature, constexprs, attrs)


def build(launch: Launch, capability: int) -> CompiledKernel:
    return triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=options_of(launch))


def dump(cubin: bytes, flag: str) -> str:
    """Returns what cuobjdump prints about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def inspect(cubin: bytes) -> dict[str, int]:
    usage, sass = dump(cubin, "--dump-resource-usage"), dump(cubin, "--dump-sass")
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert found, f"cuobjdump prints no resource usage: {usage!r}"
    code = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line)]
    counts = {name: sum(bool(re.search(pattern, line)) for line in code) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": found["reg"], "stack": found["stack"], "instructions": len(code), **counts}


def audit_launch(
    spec: KernelSpec, case: Case, dtype: torch.dtype, target: Target, index: int, experiments: tuple[str, ...] = ()
) -> dict[str, Any]:
    launch = launches_of(spec, case, dtype, target, experiments)[index]
    row: dict[str, Any] = {
        "operation": spec.name,
        "kernel": launch.kernel.__name__,
        "case": f"{case.name} with experiments" if experiments else case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "target": target.capability,
        "constexprs": {name: str(value) for name, value in launch.constexprs.items()},
        **options_of(launch),
        "matrix_units": launch.matrix_units,
        "wide_loads": launch.wide_loads,
    }
    try:
        built = build(launch, target.capability)
    except Exception as error:  # the failure becomes a row of the table, and the test shows it
        return {**row, "error": f"{type(error).__name__}: {str(error)[-2000:]}"}
    shared = {"shared_bytes": built.metadata.shared, "final_warps": built.metadata.num_warps}
    shared["tensor_columns"] = built.metadata.tmem_size
    return {**row, **shared, **inspect(built.asm["cubin"])}


def launches_of(
    spec: KernelSpec, case: Case, dtype: torch.dtype, target: Target, experiments: tuple[str, ...] = ()
) -> tuple[Launch, ...]:
    """Plans a case of a model, with these of an engine's experiments on as far as the operation knows them."""
    meta = torch.device("meta")
    arguments, known = arguments_of(spec, case, dtype, meta), signatures.signature(spec.plan).parameters
    arguments |= {name: True for name in experiments if name in known}
    if "prefetch_weights" in experiments and "upcoming" in known:
        width, mlp, heads, _, channels, _ = WEIGHTS[case.name.partition("_")[0]]
        shapes = (width, heads * channels), (2 * mlp, width)
        arguments["upcoming"] = [torch.empty(shape, dtype=dtype, device=meta) for shape in shapes]
    if "tokens_to_host" in experiments and "host_KR" in known:
        arguments["host_KR"] = torch.empty(5, len(arguments["logits_RV"]), dtype=torch.int64, device=meta)
        arguments["host_row_1"] = torch.empty(1, dtype=torch.int32, device=meta)
    return spec.plan(**arguments, target=target)


def jobs(only: str | None, smallest: bool) -> Iterator[Job]:
    """Yields one job for each different kernel; cases that need the same machine code share a job."""
    targets = [TARGETS[90]] if smallest else list(TARGETS.values())
    seen: set[str] = set()
    for name, spec in discover_specs().items():
        if only not in (None, name):
            continue
        dtype = preferred_dtype(spec)
        cases = [smallest_model_case(spec)[0]] if smallest else spec.model_cases
        for case, target, experiments in product(cases, targets, ((), EXPERIMENTS)):
            if case.min_capability > target.capability:
                continue
            for index, launch in enumerate(launches_of(spec, case, dtype, target, experiments)):
                key = f"{source_of(launch).hash()} {options_of(launch)} {target.capability}"
                if key not in seen:
                    seen.add(key)
                    yield name, case.name, dtype, target.capability, index, experiments


def run_job(job: Job) -> dict[str, Any]:
    name, case_name, dtype, capability, index, experiments = job
    spec = discover_specs()[name]
    case = next(case for case in spec.model_cases if case.name == case_name)
    return audit_launch(spec, case, dtype, TARGETS[capability], index, experiments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument("--table", type=Path, help="the rows as a table in Markdown")
    parser.add_argument("--only", help="one operation")
    parser.add_argument("--smallest", action="store_true", help="only sm_90, and of each operation the smallest case")
    arguments = parser.parse_args()
    # Workers are spawned: a fork of a process with threads may wait for a lock that no thread will release.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(run_job, jobs(arguments.only, arguments.smallest)))
    if arguments.out:
        arguments.out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    if arguments.table:
        arguments.table.write_text(render_table(rows))
    found = breaches(rows)
    print(f"triton {triton.__version__}: {len(rows)} kernels, {len(found)} breaches", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
