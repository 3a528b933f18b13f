"""Prints what a bench measures: a table line for each row at once, one line of JSON at the end, whatever happened.

Rows are flat: numbers with their unit in the name, and strings. What was not measured is absent; a case that was left
out is a row that says why. Floors and shares named `sheet_` are computed from the device's data sheet.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from internvl_rt.errors import RequestError, quoted
from internvl_rt.model.work import Roof, Work
from internvl_rt.terminal import say

Row = dict[str, int | float | str]

_ROOT = Path(__file__).parents[2]  # root of the repository, if the package lies in one


class Column(NamedTuple):
    """A column of the table: it shows a row's value at `key`, times `scale`."""

    label: str
    key: str
    scale: float = 1.0


class Pace(NamedTuple):
    """How often a case is repeated: for `seconds`, but between `least` and `most` times."""

    seconds: float
    least: int
    most: int

    def repeats(self, each_s: float) -> int:
        return min(self.most, max(self.least, int(self.seconds / max(each_s, 1e-9))))


class Record:
    """Keeps the rows of one command. At the end of a `with` block it prints them, whatever ended the block."""

    def __init__(
        self,
        part: str,
        prefix: str,
        suffix: str,
        device: torch.device,
        budget_s: float | None,
        columns: Sequence[Column],
        switches: Mapping[str, bool] | None = None,
        experiments: Sequence[str] = (),
        plots: Path | None = None,
    ) -> None:
        """Names rows `<prefix>/<case>/<suffix>`, where `-no_<switch>` follows the case for each switch that is off, and
        `-<experiment>` for each experiment that is on.

        budget_s: no case but the first starts later than this. switches, experiments: of the engine; on CUDA every row
        has them. plots: as for `print_document`.
        """
        self.part = part
        self._plots = plots
        self.rows: list[Row] = []
        self.num_measured = 0
        self._prefix, self._suffix, self._device, self._columns = prefix, suffix, device, columns
        self._budget_s, self._start_s = budget_s, time.perf_counter()
        self._switches = dict(switches or {})
        self._variant = "".join(f"-no_{name}" for name, is_on in self._switches.items() if not is_on)
        self._variant += "".join(f"-{name}" for name in experiments)
        self._switches |= dict.fromkeys(experiments, True)

    def add(self, case: str, row: Row) -> None:
        self._append(case, row)
        self.num_measured += 1
        if self.num_measured == 1:
            _say(f"{self.part:<16}" + "".join(f"  {column.label:>9}" for column in self._columns))
        cells = [_shown(row[c.key], c.scale) if c.key in row else "-" for c in self._columns]
        _say(
            f"{case:<16}"
            + "".join(f"  {cell:>{max(len(c.label), 9)}}" for c, cell in zip(self._columns, cells, strict=True))
        )

    def note(self, case: str, row: Row) -> None:
        """Adds a row that is not in the table."""
        self._append(case, row)

    def leave_out(self, case: str, why: str) -> None:
        self._append(case, {"left_out": why})
        _say(f"{case:<16}  left out: {why}")

    def may_start(self, case: str, needs_s: float = 0.0) -> bool:
        """Says whether there is time for a case, as always for the first; a case without time is left out."""
        if not self.is_spent(needs_s):
            return True
        self.leave_out(case, f"{self._spent_s:.0f} s of the budget of {self._budget_s:g} s were spent")
        return False

    def is_spent(self, needs_s: float = 0.0) -> bool:
        """Says whether there is a result and no time for more."""
        return self.num_measured > 0 and self._budget_s is not None and self._spent_s + needs_s > self._budget_s

    @property
    def _spent_s(self) -> float:
        return time.perf_counter() - self._start_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.leave_out("the rest", "interrupted")
        elif error is not None:
            self.leave_out("the rest", f"failed: {(str(error).splitlines() or [repr(error)])[0]}")
        print_document(self.part, self.rows, self._device, plots=self._plots)

    def _append(self, case: str, row: Row) -> None:
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        name = f"{self._prefix}/{case}{self._variant}/{self._suffix}"
        self.rows.append({"name": name, **(self._switches if self._device.type == "cuda" else {}), **rounded})


def spread(seconds: Sequence[float], prefix: str = "") -> Row:
    """Returns percentiles of samples in microseconds: `median_us`, and the 10th, 90th, 95th and 99th."""
    names = {"median": 50, "low": 10, "high": 90, "p95": 95, "p99": 99}
    found = np.percentile(np.asarray(seconds) * 1e6, [*names.values()]).tolist()
    return {f"{prefix}{name}_us": value for name, value in zip(names, found, strict=True)}


def shares(work: Work, seconds: float, roof: Roof | None) -> Row:
    """Returns what was achieved and, for a device with a data sheet, how much that is of what the sheet promises."""
    row: Row = {
        "flops": work.flops,
        "bytes": work.bytes,
        "tflops": work.flops / seconds / 1e12,
        "gb_s": work.bytes / seconds / 1e9,
    }
    if roof is not None:
        row |= {
            "sheet_floor_us": roof.floor_s(work) * 1e6,
            "sheet_floor_percent": 100 * roof.floor_s(work) / seconds,
            "sheet_bandwidth_percent": 100 * work.bytes / seconds / roof.bytes_per_s,
            "sheet_peak_percent": 100 * work.flops / seconds / roof.flops_per_s,
        }
    return row


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> Row:
    """Returns the most memory in use: of the GPU since `reset_peak`, or else of the process since its start."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),  # includes the private pools of CUDA graphs
        }
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (kib,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return {"peak_memory_bytes": int(kib) * 1024}


def result_document(part: str, rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """Returns what a bench prints as its last line, in JSON: see bench/results/schema.json."""
    program = Path(sys.argv[0]).resolve()
    is_script = program.is_relative_to(_ROOT / "bench")
    command = ["python", str(program.relative_to(_ROOT))] if is_script else ["internvl-rt"]
    return {
        "part": part,
        "schema": 1,
        "rows": rows,
        "environment": environment(device),
        "command": shlex.join([*command, *sys.argv[1:]]),
    }


def print_document(
    part: str,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
    file: Path | None = None,
    plots: Path | None = None,
    roofline: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> None:
    """Prints the document of `rows` as the last line.

    file: where it goes besides. plots: the path, without its ending, of pictures to draw, in which `roofline` has the
    rows of the roof. more: other fields of the document.
    """
    document = result_document(part, rows, device) | more
    _say(json.dumps(document, allow_nan=False))  # first, so that a full disk loses nothing of it
    if file is not None:
        file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if plots is not None:
        draw(plots, document, result_document("roofline", roofline, device))


def check_plots(plots: Path | None) -> None:
    """Raises RequestError, before anything is measured, where no pictures can be drawn."""
    if plots is None:
        return
    if find_spec("matplotlib") is None:
        raise RequestError("--plots needs matplotlib; install it with: pip install 'internvl-rt[bench]'")
    if not plots.parent.is_dir():
        raise RequestError(f"--plots: no folder {quoted(str(plots.parent))}; make it first")


def draw(plots: Path, *documents: Mapping[str, Any]) -> None:
    """Draws the pictures that documents have rows for, and names them on stderr."""
    from internvl_rt.bench.plots import draw_all  # takes a second to import

    parts = {document["part"]: {"document": document} for document in documents}
    drawn = draw_all({"parts": parts, "environment": documents[0]["environment"]}, plots)
    say("\n".join(map(str, drawn)) or "no picture is drawn: too little was measured")


def environment(device: torch.device) -> dict[str, int | str | None]:
    """Returns where and when something was measured; None is not known or does not apply."""
    found: dict[str, int | str | None] = {"device": _cpu_name(), "device_kind": device.type, "num_sms": None}
    found |= {"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    found |= {"driver": None, "sm_clock_mhz": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "num_sms": properties.multi_processor_count}
        found |= {"memory_bytes": properties.total_memory}
        found |= {"driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        with suppress(Exception):  # NVML may be missing or refuse
            found |= {"sm_clock_mhz": torch.cuda.clock_rate(device)}
    commit = None
    if (_ROOT / ".git").exists():  # else the package is installed, maybe inside another repository
        git = ("git", "--no-optional-locks", "-C", str(_ROOT))  # takes no lock that another git would wait for
        commit = _output_of(*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    return found | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output_of(*command: str) -> str | None:
    """Returns the first line that a program prints; None if it is missing, fails, or takes long."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.partition("\n")[0].strip() or None
    return None


def table(rows: Mapping[str, str]) -> None:
    """Prints labelled lines."""
    for label, text in rows.items():
        _say(f"{label:<24} {text}")


def _say(line: str) -> None:
    print(line, flush=True)


def _shown(value: Any, scale: float) -> str:
    if isinstance(value, str):
        return value
    scaled = value * scale
    return f"{scaled:,.0f}" if abs(scaled) >= 1000 or scaled == int(scaled) else f"{scaled:.4g}"
