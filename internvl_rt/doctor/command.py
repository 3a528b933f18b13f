"""`internvl-rt doctor` runs the checks in order, skips those that cannot pass, and prints the report."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from internvl_rt.doctor.checks import KERNEL
from internvl_rt.doctor.finding import Finding
from internvl_rt.doctor.process import CheckProcess

Ask = Callable[[str], Finding]

ENGINE = ("torch", "device", "triton", "compiled part")  # what an engine needs

# Each check, with the checks whose failure would make it fail too; it is skipped then.
NEEDS: dict[str, tuple[str, ...]] = {
    "internvl-rt": (),
    "python": (),
    "packages": (),
    "driver": (),
    "torch": (),
    "device": ("torch",),
    "compiled part": (),
    "triton": (),
    "compiler": ("torch", "triton"),
    "backend": ENGINE,
    "launch": ("torch", "device", "triton", "compiler", "backend"),
}


def diagnose(ask: Ask) -> Iterator[tuple[str, Finding]]:
    """Yields every check's name and finding, as soon as it is known; `ask` runs a check."""
    found: dict[str, Finding] = {}

    def check(name: str, needs: tuple[str, ...]) -> tuple[str, Finding]:
        missing = next((need for need in needs if found[need].status == "failed"), None)
        found[name] = ask(name) if missing is None else Finding("not checked", f"needs {missing}, which failed")
        return name, found[name]

    for name, needs in NEEDS.items():
        yield check(name, needs)
    launch = found["launch"]
    if launch.status == "ok":
        for operation in launch.facts["operations"]:
            yield check(f"{KERNEL}{operation}", ())
    else:
        why = launch.text if launch.status == "not checked" else "needs launch, which failed"
        yield "kernels", Finding("not checked", why)
    yield check("answer", (*ENGINE, "backend", "compiler", "launch"))
    if found["device"].facts.get("kind") == "cuda":  # shows whether the kernels or the rest fail
        yield check("answer by torch", ENGINE)


def run(*, as_json: bool) -> int:
    """Prints a line for each check, or one JSON document; returns the exit code: 1 if any check failed."""
    process, found = CheckProcess(), {}
    try:
        for name, finding in diagnose(process.ask):
            found[name] = finding
            if not as_json:
                print(f"{finding.status:<11}  {name:<26}  {finding.text}", flush=True)
    finally:
        process.close()
    counts = {status: sum(f.status == status for f in found.values()) for status in ("ok", "failed", "not checked")}
    if as_json:
        checks = [{"name": name, **asdict(finding)} for name, finding in found.items()]
        print(json.dumps({"schema": 1, "healthy": not counts["failed"], "checks": checks}, indent=2))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0
