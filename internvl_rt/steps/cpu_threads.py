"""Chooses with how many threads torch computes a step on a CPU whose cores other programs use too.

The threads of a product wait for each other. One that shares its core with another program keeps all of them waiting,
for milliseconds where a product takes one: two threads on two cores, one of them busy, are slower than one thread. So a
step takes no more threads than there are free cores.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, NamedTuple
from weakref import WeakSet

import torch

INTERVAL_S = 0.25  # between two looks at the load, which the kernel counts in hundredths of a second


class Load(NamedTuple):
    """Seconds of processor time since some moment."""

    at_s: float  # when this was read
    busy_s: float  # of all cores that this process may use, for whatever program
    own_s: float  # of this process


class CpuThreads:
    """The threads of one engine. One thread at a time computes with it."""

    _computing: ClassVar[WeakSet["CpuThreads"]] = WeakSet()  # of the engines that compute now, and share free cores

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        read_load: Callable[[], Load | None] | None = None,
        num_cores: float | None = None,
    ) -> None:
        """num_threads: so many, whatever the load; None: as many as there are free cores, at most torch's own number,
            which OMP_NUM_THREADS and `torch.set_num_threads` set.

        read_load, num_cores: for tests; None is this machine's.
        """
        self._num_threads, self._read_load = num_threads, read_load or _read_load
        self._num_cores = num_cores or count_cores()
        self._free = float(self._num_cores)
        self._last: Load | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Sets torch's number of threads inside the `with` block, for the calling thread."""
        before = torch.get_num_threads()
        try:
            CpuThreads._computing.add(self)
            chosen = self.choose(before)
            if chosen != before:
                torch.set_num_threads(chosen)
            yield
        finally:
            CpuThreads._computing.discard(self)
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def choose(self, most: int) -> int:
        """Returns how many threads compute the next step. most: torch's own number."""
        if self._num_threads is not None:
            return self._num_threads
        if most == 1:
            return 1
        self._look()
        return min(most, max(1, int(self._free / max(1, len(CpuThreads._computing)) + 0.5)))

    def _look(self) -> None:
        """Counts the free cores anew, unless that was just done."""
        if self._last is not None and time.perf_counter() - self._last.at_s < INTERVAL_S:
            return
        load = self._read_load()
        if load is not None and self._last is not None:
            busy_s = load.busy_s - self._last.busy_s - (load.own_s - self._last.own_s)
            self._free = self._num_cores - max(0.0, busy_s) / (load.at_s - self._last.at_s)
        self._last = load


def count_cores(root: Path = Path("/")) -> float:
    """Counts the physical cores that this process may use; a control group may allow less than its cores give.

    root: of the file system; tests give another folder.
    """
    siblings = {
        _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in _cpus()
    }
    quota = re.match(r"(\d+) (\d+)", _read(root / "sys/fs/cgroup/cpu.max"))  # microseconds in so many microseconds
    return min(float(len(siblings)), int(quota[1]) / int(quota[2]) if quota else float("inf"))


def _cpus() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return set(range(os.cpu_count() or 1)) if affinity is None else affinity(0)


def _read_load() -> Load | None:
    """Reads the load from /proc; None outside Linux."""
    at_s, cpus, ticks = time.perf_counter(), _cpus(), 0
    found = re.findall(r"^cpu(\d+) ([\d ]+)$", _read(Path("/proc/stat")), re.MULTILINE)
    if not found:
        return None
    for cpu, numbers in found:
        if int(cpu) in cpus:
            user, nice, system, _idle, _io_wait, irq, soft_irq, stolen, *_ = map(int, numbers.split())
            ticks += user + nice + system + irq + soft_irq + stolen
    return Load(at_s, ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="ascii", errors="replace")
    return ""
