"""Finds what the ranks of an engine in this process, or in another one, leave behind."""

import os
import tempfile
import time
from pathlib import Path


def processes_of(parent: int | None = None) -> list[int]:
    """Returns the processes of ranks that are children of a process, by default of this one, in order of their start.

    One that has ended counts until its parent has noticed.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == (parent or os.getpid()):
                program = (entry / "cmdline").read_text()
                if "from internvl_rt.engine." in program or not program:
                    found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def is_running(process: int) -> bool:
    """Says whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_ports() -> int:
    """Counts the sockets on which this process listens."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(fields[3] == "0A" and f"socket:[{fields[9]}]" in mine for fields in lines)


def shared_memory() -> int:
    """Counts the places where this process has mapped memory for tiles."""
    return Path("/proc/self/maps").read_text().count("/memfd:internvl_rt")


def folders(parent: int | None = None) -> set[Path]:
    """Returns the folders in which ranks find each other, and torch's shared memory, of a process: by default this."""
    number = parent or os.getpid()
    in_memory = Path("/dev/shm").glob(f"*_{number}_*")
    return {*Path(tempfile.gettempdir()).glob(f"internvl_rt-{number}-*"), *in_memory}


def wait_until(condition, patience_s: float = 5.0) -> float:
    """Waits until a condition holds, and returns the seconds that it took. Fails if it never does."""
    start_s = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start_s < patience_s, "it never came true"
        time.sleep(0.01)
    return time.perf_counter() - start_s
