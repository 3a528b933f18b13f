"""Launches every operation as on a GPU, and prints what was planned and what the driver was asked for, as JSON.

Run by tests/test_launches.py in the environment that `fake_driver.fake_environment` makes, with FAKE_DRIVER_LOG.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent.parent))
from internvl_rt.kernels._contract import KernelSpec
from internvl_rt.kernels._launch import Launch, options_of
from support.compile_audit import launches_of, source_of
from support.fake_driver import TARGET, use_fake_driver
from support.specs import discover_specs, smallest_call


def hash_of(launch: Launch) -> str:
    """Of the kernel that the audit builds."""
    target = GPUTarget("cuda", TARGET.capability, 32)
    digest: str = triton.compile(source_of(launch), target=target, options=options_of(launch)).hash
    return digest


def launch_all(spec: KernelSpec, log: Path) -> list[dict[str, Any]]:
    """By the public function."""
    case, dtype, arguments = smallest_call(spec, torch.device("cpu"))
    log.write_text("")
    spec.launcher(**arguments)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    rows = []
    for index, launch in enumerate(launches_of(spec, case, dtype, TARGET)):
        built = launch.kernel.device_caches[0][0].values()
        plan = {"kernel": launch.kernel.__name__, "grid": list(launch.grid), "threads": 32 * launch.num_warps}
        row = {"operation": spec.name, "case": case.name, "plan": plan | {"pdl": launch.pdl}, "launches": len(asked)}
        row["asked"] = asked[index] if index < len(asked) else None
        row["audited"] = hash_of(launch) in {kernel.hash for kernel in built}
        rows.append(row)
    return rows


if __name__ == "__main__":
    use_fake_driver()
    for each in discover_specs().values():
        for row in launch_all(each, Path(os.environ["FAKE_DRIVER_LOG"])):
            print(json.dumps(row), flush=True)
