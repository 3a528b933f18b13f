"""Lists in which order built kernels read, write, wait and multiply, from their SASS; no GPU is needed.

The kernels are built in another process, because the tests' process runs Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
# In SASS, ACQBULK is Triton's gdc_wait and PREEXIT its gdc_launch_dependents. CCTL.E.PF2 asks L2 for a cache line, and
# UBLKPF for many.
NAMES = r"\b(LDG|LDGSTS|STG|ATOMG|HMMA|HGMMA|ACQBULK|PREEXIT|CCTL\.E\.PF2|UBLKPF)\b"
ADDING = r"\b(ATOMG\.E\.ADD|BAR|BRA|LDG\.E\.128|FFMA)"
Job = tuple[str, str, int]  # an operation, one of its model cases, an architecture


def instructions_of(
    jobs: list[Job], names: str = NAMES, experiments: tuple[str, ...] = (), *, launch: int = 0
) -> dict[Job, list[str]]:
    """Returns, for a launch of each job in bfloat16, the instructions that match the pattern `names`, in order.

    experiments: of an engine, which are on.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(jobs), names, str(launch), *experiments]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=TESTS.parent)
    return dict(zip(jobs, json.loads(output.stdout), strict=True))


def adding_of(found: list[str]) -> tuple[list[str], list[str]]:
    """Returns the instructions that add up parts of attention: up to the first sum over threads, and the last loop.

    found: all that match ADDING. They begin behind the atomic count of finished parts and the barrier that follows it.
    """
    behind = found[found.index("ATOMG.E.ADD") :]
    behind = behind[behind.index("BAR") + 1 :]
    *_, loop = [part for part in " ".join(behind).split("BRA") if "LDG.E.128" in part]
    return behind[: behind.index("BAR")], loop.split()


def _build(operation: str, case_name: str, capability: int, names: str, index: int, *experiments: str) -> list[str]:
    sys.path.insert(0, str(TESTS))
    import torch

    from internvl_rt.kernels._launch import TARGETS
    from internvl_rt.kernels.catalogue import discover_specs
    from support.compile_audit import build, dump, launches_of

    spec = discover_specs()[operation]
    case = next(case for case in spec.model_cases if case.name == case_name)
    launch = launches_of(spec, case, torch.bfloat16, TARGETS[capability], experiments)[index]
    return re.findall(names, dump(build(launch, capability).asm["cubin"], "--dump-sass"))


if __name__ == "__main__":
    found = [_build(*job, sys.argv[2], int(sys.argv[3]), *sys.argv[4:]) for job in json.loads(sys.argv[1])]
    print(json.dumps(found))
