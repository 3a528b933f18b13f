"""Checks the kernels on this device: that one can be launched, and each operation once against its reference."""

import torch

from internvl_rt.doctor.finding import Finding, describe
from internvl_rt.kernels._check import arguments_of, check_call
from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels._launch import Launch, Target, target_of
from internvl_rt.kernels.catalogue import discover_specs

MAX_CASES = 3  # cases of one operation in each dtype
WITHOUT = 'backend="torch" computes without the kernels'


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_launch() -> Finding:
    """Checks Triton's own tools: builds, launches and awaits one call, whatever it computes.

    The facts hold the names of all operations, as `operations`.
    """
    device, dtype = _device(), torch.float32
    try:
        target = target_of(device)
    except ValueError:
        if device.type == "cuda":
            raise
        return Finding("not checked", "there is no GPU for the kernels to run on")
    specs = discover_specs()
    check_call(specs["swiglu"], chosen_cases(specs["swiglu"], dtype, target)[0], dtype, device)
    how = "Triton builds a kernel and launches it"
    if target.interpreted:
        how = "in Triton's interpreter, without bfloat16, which it computes wrong"
    return Finding("ok", how, {"operations": list(specs)})


def check_operation(name: str) -> Finding:
    """Checks an operation in every dtype that it has here, without bfloat16 in Triton's interpreter, which errs."""
    spec, device = discover_specs()[name], _device()
    target = target_of(device)
    dtypes = [dtype for dtype in spec.tolerances if not (target.interpreted and dtype == torch.bfloat16)]
    shares: dict[str, float] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for case in chosen_cases(spec, dtype, target):
            call = f"{name}/{case.name}/{kind}"
            try:
                found = check_call(spec, case, dtype, device)
            except Exception as error:
                what = describe(error)
                if "CUDA error" in what:
                    what += "; that ends this process, and what follows runs in a new one"
                return Finding("failed", f"{call} does not run: {what}; {WITHOUT}", {"call": call})
            if found.share > 1:
                return Finding("failed", f"{call} is wrong: {found.text}; {WITHOUT}", {"call": call})
            shares[kind] = max(shares.get(kind, 0.0), found.share)
    if not shares:
        return Finding("not checked", f"it takes a GPU of compute capability {spec.min_capability / 10} or newer")
    worst = max(shares.values())
    how = f"within {worst:.0%} of the tolerance" if worst else "equal to the reference"
    return Finding("ok", f"{', '.join(shares)}: {how}", {"shares": shares})


def chosen_cases(spec: KernelSpec, dtype: torch.dtype, target: Target) -> list[Case]:
    """Returns up to three test cases: those that launch each kernel, then those with other switches; larger ones first.

    What a case launches is found from shapes alone.
    """
    possible = [case for case in spec.test_cases if case.min_capability <= target.capability]
    if target.interpreted:
        possible = [case for case in possible if not case.min_capability]  # the interpreter rounds to FP8 wrong
    by_size = sorted(possible, key=lambda case: spec.cost(case, dtype).bytes, reverse=True)
    launches = {case.name: launches_of(spec, case, dtype, target) for case in by_size}
    chosen: list[Case] = []
    for what in (_kernel, _variant):
        seen = {what(launch) for case in chosen for launch in launches[case.name]}
        for case in by_size:
            found = {what(launch) for launch in launches[case.name]}
            if found - seen and len(chosen) < MAX_CASES:
                chosen.append(case)
                seen |= found
    return chosen


def launches_of(spec: KernelSpec, case: Case, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Returns what a case launches, without launches of no program."""
    arguments = arguments_of(spec, case, dtype, torch.device("meta"))
    return [launch for launch in spec.plan(**arguments, target=target) if 0 not in launch.grid]


def _kernel(launch: Launch) -> object:
    return launch.kernel.__name__


def _variant(launch: Launch) -> object:
    """Returns the kernel and its switches; block sizes make no other variant."""
    switches = [(name, value) for name, value in launch.constexprs.items() if isinstance(value, bool | str | None)]
    return _kernel(launch), tuple(switches)
