"""Does everything that needs a GPU machine: is the code right, how fast is the device, how fast is the code on it.

    python bench/gpu.py [--parts first] [--out bench/results] [--budget-s 490] [--commit HASH]
    python bench/gpu.py --plan                           # what each of the three calls runs, and for how long
    python bench/gpu.py --cpu --out FOLDER               # the same sequence at small settings, to see that it works

A machine with torch, triton, pytest, pybind11 and a C++ compiler is enough: what is not installed yet is built first,
with CMake where there is one.
The parts make three calls, `first`, `second` and `third`, each of less than ten minutes.

Parts run one after the other, each in a process of its own with a share of the time; the time that one does not use
goes to the parts after it. A part that fails or runs out of time costs only itself. Every timed row is marked "proven"
or "unproven", by what this run's tests found for its operations (proof.py). The results (`<out>/<device>/<date>.json`,
`.md`, `.log`) are written after every part, so a run that is killed leaves what it had. The exit code is 0, or 1 if a
part failed or correctness is not proven, or 2 if there is no CUDA device.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import IO, Any

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "csrc")]  # nothing may be installed
import cmake_build
from options import exit_with, seconds
from parts import CALLS, ROOT, NotRunError, Output, Part, build_parts, choose
from plain_build import build_in_place
from proof import BAD, mark

from internvl_rt.bench.document import DOCUMENT, DocumentError, check, save

LEAST_S = 5.0  # Python alone needs this long to start
GRACE_S = 10.0  # seconds between the request to stop and the end
MARGIN = 0.8  # the share of a part's time that its command may use; Python's start and loading take the rest


def environment_of(part: Part, *, cpu: bool) -> dict[str, str]:
    """The part's environment variables; `PYTHONPATH` makes it use this checkout, whatever is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **hidden}
    return {**os.environ, **own, **dict(part.environment)}


def run(command: list[str], box_s: float, environment: dict[str, str], log: IO[bytes]) -> Output:
    """Runs the command for at most `box_s`, then asks it to stop as Ctrl-C would, then ends it and its children."""
    lines: list[str] = []

    def tee(pipe: IO[bytes]) -> None:
        for line in pipe:
            with suppress(OSError):  # on a full disk the part goes on, and is read to its end
                log.write(line)
                log.flush()
            lines.append(line.decode("utf-8", "replace").rstrip("\n"))

    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    reader = Thread(target=tee, args=(process.stdout,), daemon=True)
    reader.start()
    stopped = False
    try:
        process.wait(box_s)
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
    return Output(lines, process.returncode, stopped)


def run_part(
    part: Part, box_s: float, environment: dict[str, Any], log: IO[bytes], *, cpu: bool, commit: str | None = None
) -> dict[str, Any]:
    """Runs the part and returns its entry in the results; never raises for what its command did."""
    if not part.command:
        return {"status": "not run", "reason": part.absent}
    words = [word for word in part.command if commit or "{commit}" not in word]
    command = [word.replace("{budget_s}", f"{MARGIN * box_s:.0f}").replace("{commit}", commit or "") for word in words]
    shown = _shown_command(command)
    log.write(f"\n=== {part.name}: {shown}\n".encode())
    log.flush()
    start = time.monotonic()
    output = run(command, box_s, environment_of(part, cpu=cpu), log)
    entry: dict[str, Any] = {"command": shown, "box_s": round(box_s, 1), "wall_s": round(time.monotonic() - start, 1)}
    entry["exit_code"] = output.exit_code
    problem = ""
    try:
        entry["document"] = check(part.read(output, environment, shown), DOCUMENT)
    except NotRunError as error:
        return {"status": "not run", "reason": str(error), **entry}
    except DocumentError as error:
        problem = f"its last line is no result: {error}"
    counts = [row.get(key, 0) for row in entry.get("document", {}).get("rows", []) for key in BAD]
    if any(counts):
        return {"status": "failed", "reason": ", ".join(_bad(entry["document"]["rows"])), **entry}
    if output.stopped and not entry.get("document", {}).get("complete"):
        return {"status": "stopped", "reason": f"its time was up; {problem or 'what it had is here'}", **entry}
    wrong = [str(row["name"]) for row in entry.get("document", {}).get("rows", []) if "problem" in row]
    if wrong:
        return {"status": "failed", "reason": f"{len(wrong)} wrong or failing, {wrong[0]} the first", **entry}
    if output.exit_code != 0 and not output.stopped:
        return {"status": "failed", "reason": f"exit code {output.exit_code}" + (problem and f"; {problem}"), **entry}
    return {"status": "failed", "reason": problem, **entry} if problem else {"status": "done", **entry}


def _bad(rows: list[dict[str, Any]]) -> list[str]:
    """The numbers of failures, each with its operation or file if the row has a name."""
    return [
        f"{row['name'] + ': ' if 'name' in row else ''}{row[key]} {key.replace('_', ' ')}"
        for row in rows
        for key in BAD
        if row.get(key)
    ]


class Run:
    """One run and its results, which are on disk after every part."""

    def __init__(
        self, parts: tuple[Part, ...], chosen: set[str], budget_s: float, *, cpu: bool, commit: str | None = None
    ) -> None:
        """commit: the commit that is measured, if the checkout's git does not say it."""
        self.parts, self.chosen, self.budget_s, self.cpu, self.commit = parts, chosen, budget_s, cpu, commit
        self.entries: dict[str, dict[str, Any]] = {}
        self.environment: dict[str, Any] = {}
        self.path: Path | None = None

    def run(self, out: Path) -> None:
        """Runs all chosen parts; raises SystemExit if the package or the device cannot be used."""
        end = time.monotonic() + self.budget_s
        draft = out / f"running-{os.getpid()}.log"
        out.mkdir(parents=True, exist_ok=True)
        with draft.open("ab") as log:
            for index, part in enumerate(self.parts):
                why = "" if part.name in self.chosen else "not asked for"
                why = why or (end - time.monotonic() < LEAST_S and "no time was left") or ""
                if why:
                    self.entries[part.name] = {"status": "not run", "reason": why}
                else:
                    shares = sum(each.share for each in self.parts[index:] if each.name in self.chosen and each.command)
                    box_s = (end - time.monotonic()) * part.share / max(shares, part.share)
                    if part.command:
                        print(f"{part.name}: at most {box_s:.0f} s", flush=True)
                    self.entries[part.name] = run_part(
                        part, box_s, self.environment, log, cpu=self.cpu, commit=self.commit
                    )
                entry = self.entries[part.name]
                self._say(part, entry)
                if part.name == "build":
                    self._place(out, entry, draft)
                if "document" in entry:
                    self._complete(part, entry["document"])
                self.write()

    def exit_code(self) -> int:
        unproven = {part.name for part in self.parts if part.proves and self.entries[part.name]["status"] == "stopped"}
        failed = [name for name, entry in self.entries.items() if entry["status"] == "failed" or name in unproven]
        return int(bool(failed))

    def write(self, *, plots: bool = False) -> None:
        """Saves the document and makes its page in another process: if that fails, the numbers are safe."""
        if self.path is None:
            return
        whole = {"schema": 1, "environment": self.environment, "budget_s": self.budget_s, "parts": self.entries}
        save(whole, self.path)
        command = [sys.executable, str(Path(__file__).parent / "report.py"), str(self.path)]
        subprocess.run(command if plots else [*command, "--no-plots"], check=False, stdout=subprocess.DEVNULL)

    def _complete(self, part: Part, document: dict[str, Any]) -> None:
        """Adds what the command could not know: the commit, and whether what it timed is proven."""
        if self.commit:
            document["environment"]["commit"] = self.commit
        if part.times:
            mark(document["rows"], part.uses, self.entries, whole_model=bool(part.uses))
        if part.leaves and self.path is not None:
            for file in ROOT.glob(part.leaves):
                shutil.copy(file, self.path.with_name(f"{self.path.stem}-{file.name}"))

    def _place(self, out: Path, entry: dict[str, Any], draft: Path) -> None:
        if entry["status"] != "done":
            print(draft.read_text(encoding="utf-8", errors="replace")[-4000:])
            raise SystemExit(f"the package cannot be used here: {entry['reason']}; the log is {draft}")
        self.environment = entry["document"]["environment"]
        if self.commit:
            self.environment["commit"] = self.commit
        if self.environment["device_kind"] != "cuda" and not self.cpu:
            draft.unlink()
            print(
                "error: no CUDA device: expected a machine where torch.cuda.is_available() is true, got a CPU;"
                " to see that everything runs, without results: python bench/gpu.py --cpu --out FOLDER",
                file=sys.stderr,
            )
            raise SystemExit(2)
        slug = re.sub(r"[^a-z0-9]+", "-", self.environment["device"].lower()).strip("-")
        self.path = out / slug / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(self.path.with_suffix(".log"))  # the open log file moves with its name

    @staticmethod
    def _say(part: Part, entry: dict[str, Any]) -> None:
        took = f", {entry['wall_s']:.0f} s" if "wall_s" in entry else ""
        print(f"{part.name}: {entry['status']}{took}{': ' * ('reason' in entry)}{entry.get('reason', '')}", flush=True)


def check_build() -> None:
    """Runs the part `build`: builds the package if it is missing, imports all of it and computes on the device."""
    try:
        importlib.import_module("internvl_rt._C")
        importlib.metadata.version("internvl-rt")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        install_package()
        importlib.invalidate_caches()
    import torch

    import internvl_rt._C
    import internvl_rt.engine.engine
    from internvl_rt.bench.record import result_document

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(64, 64, device=device)
    row: dict[str, str | float] = {
        "rms_of_a_product": float((x @ x).square().mean().sqrt()),
        "compiled": Path(internvl_rt._C.__file__ or "").name,
    }
    print(json.dumps(result_document("build", [row], device)))


def install_package() -> None:
    """Builds and installs this checkout into this Python; without CMake or ninja it is only built, in place."""
    try:
        for tool in ("cmake", "ninja"):
            cmake_build.find_tool(tool)
    except cmake_build.MissingToolError as error:
        print(f"{error}; without it, one call of the compiler builds the extension", file=sys.stderr)
        build_in_place(ROOT)
        return
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", *install, "--editable", str(ROOT)], check=True, stdout=sys.stderr)


def render_plan(parts: tuple[Part, ...], budget_s: float) -> str:
    """The order, shares of time and commands of the parts of the three calls."""
    lines = []
    for call in CALLS:
        chosen = choose(parts, [call])
        own = [part for part in parts if part.name in chosen]
        scale = budget_s / sum(part.share for part in own)
        lines.append(f"{call}: python bench/gpu.py --parts {call} --budget-s {budget_s:g}")
        for part in own:
            what = _shown_command(part.command) if part.command else f"(not on this machine: {part.absent})"
            lines.append(f"  {part.name:<26}{scale * part.share:3.0f} s   {what}")
    asked = [part.name for part in parts if not part.calls]
    return "\n".join([*lines, f"only if asked for: {', '.join(asked)}"])


def _shown_command(command: Sequence[str]) -> str:
    return shlex.join(["python" if word == sys.executable else word for word in command])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=seconds, default=490, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--parts", default=CALLS[0], help="calls, groups or names, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results)")
    parser.add_argument("--commit", help="what is measured, where git does not say so")
    parser.add_argument("--plan", action="store_true", help="show what each call runs, and end")
    parser.add_argument("--cpu", action="store_true", help="small settings on the CPU; needs --out")
    parser.add_argument("--select", help="of the kernels' contract only the tests that pytest's -k takes")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        check_build()
        return 0
    if args.plan:
        print(render_plan(build_parts(cpu=args.cpu, select=args.select), args.budget_s))
        return 0
    if args.cpu and args.out is None:
        parser.error("--cpu: expected --out FOLDER as well, because bench/results is for measurements")
    select = args.select or ("rms_norm or swiglu" if args.cpu else None)
    parts = build_parts(cpu=args.cpu, select=select)
    try:
        chosen = choose(parts, [name for name in args.parts.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then Run ends the part that is running
    run = Run(parts, chosen, args.budget_s, cpu=args.cpu, commit=args.commit)
    try:
        run.run(args.out or Path(__file__).parent / "results")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        run.write(plots=True)
        return 130
    except SystemExit:
        run.write(plots=True)
        raise
    run.write(plots=True)
    assert run.path
    page = run.path.with_suffix(".md")
    if page.exists():
        print("\n" + page.read_text(encoding="utf-8").partition("## Machine")[0] + str(page))
    return run.exit_code()


if __name__ == "__main__":
    exit_with(main)
