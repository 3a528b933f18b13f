"""Gives damaged input to whatever reads untrusted input; `make fuzz` does so for a minute a kind of input.

    python tests/fuzz/run.py --targets picture video --seconds 60 --first 0

An input may take MOST_SECONDS, and MOST_BYTES of memory beyond its own size. It may raise nothing but the package's own
errors, whose text is one printable line of at most MOST_CHARACTERS. Input number n of a target is the same every time:
`--targets picture --first 4711 --count 1` repeats one. Each target runs in a process of its own, so that a crash, or a
call that does not return, is noticed too; the process's last line then names the input.
"""

import argparse
import faulthandler
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz.targets import TARGETS
from internvl_rt.errors import InternVLError

MOST_SECONDS = 5.0
MOST_BYTES = 700 << 20
MOST_CHARACTERS = 4000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1 << 30, help="most inputs of a target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return fuzz(args.targets[0], args.seconds, args.first, args.count)
    limits = ["--seconds", str(args.seconds), "--first", str(args.first), "--count", str(args.count)]
    command = [sys.executable, __file__, "--child", *limits, "--targets"]
    return max(subprocess.run([*command, name], check=False).returncode != 0 for name in args.targets)


def fuzz(name: str, seconds: float, first: int, count: int) -> int:
    """Runs inputs of one target one after another until the time is over; returns whether one of them failed."""
    target, outcomes, faults = TARGETS[name], Counter[str](), Counter[str]()
    end_s = time.perf_counter() + seconds
    number = first
    while number < first + count and time.perf_counter() < end_s:
        given = target.make(Random(f"{name} {number}"))
        faulthandler.dump_traceback_later(10 * MOST_SECONDS, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            outcome, fault, detail = watch(target.use, given, Path(folder))
        faulthandler.cancel_dump_traceback_later()
        outcomes[outcome] += 1
        if fault:
            faults[fault] += 1
            if faults[fault] == 1:  # the same fault is shown once
                print(f"{name} {number}: {fault}: {detail}", flush=True)
        number += 1
        print(f"{name} {number}", end="\r", file=sys.stderr, flush=True)
    shown = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
    print(f"{name}: {number - first} inputs, {faults.total()} failed ({shown})", flush=True)
    return bool(faults)


def watch(use: Callable[[object, Path], None], given: object, folder: Path) -> tuple[str, str, str]:
    """Returns the outcome's name, the kind of its fault, "" if there is none, and what is known of the fault."""
    start_bytes, start_s = _forget_peak(), time.perf_counter()
    outcome = fault = detail = ""
    try:
        use(given, folder)
    except InternVLError as error:
        outcome, detail = type(error).__name__, str(error)
        if not detail.isprintable() or not 0 < len(detail) <= MOST_CHARACTERS:
            fault = f"the text of {outcome} is not one printable line of at most {MOST_CHARACTERS} characters"
    except BaseException as error:
        outcome, detail = type(error).__name__, str(error)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "internvl_rt/" in frame.filename]
        fault = f"{outcome} at {' '.join(f'{Path(frame.filename).name}:{frame.lineno}' for frame in frames[-3:])}"
    seconds, num_bytes = time.perf_counter() - start_s, _peak_bytes() - start_bytes
    if seconds > MOST_SECONDS:
        fault, detail = f"more than {MOST_SECONDS} s", f"{seconds:.1f} s; {detail}"
    elif num_bytes > MOST_BYTES:
        fault, detail = f"more than {MOST_BYTES >> 20} MiB", f"{num_bytes >> 20} MiB; {detail}"
    return outcome or "used", fault, detail[:300]


def _forget_peak() -> int:
    """Makes the kernel forget the most memory that this process has had; returns the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    raise SystemExit(main())
