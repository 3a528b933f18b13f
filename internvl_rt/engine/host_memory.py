"""How much memory of the host this process may still take, and what its C library does with what is freed."""

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Kind(NamedTuple):
    """One version of control groups: where they are mounted, and their files."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    page_cache: tuple[str, ...]  # entries of memory.stat that the kernel gives back before the limit is reached


_V1 = _Kind(
    mounts=("sys/fs/cgroup/memory",),
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    page_cache=("total_inactive_file", "total_active_file"),
)
_V2 = _Kind(
    mounts=("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    limit="memory.max",
    usage="memory.current",
    page_cache=("inactive_file", "active_file", "slab_reclaimable"),
)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Returns the least that any limit leaves; None if the system tells none, as outside Linux.

    Swap space counts where the machine has it. root: of the file system; tests give another folder.
    """
    left = [*_of_machine(root), *_of_groups(root), *_of_process(root)]
    return max(0, min(left)) if left else None


def keep_large_buffers() -> None:
    """Makes the C library keep freed memory for what comes next, where it is glibc. It counts for the whole process.

    By default it gives back large buffers at once. To get their pages again took a tenth of the time of the vision
    tower on a CPU, and most of the time in which a picture of 1 MB was received.
    """
    _set_glibc(own_pages_from=64 << 20, keep=256 << 20)


def give_back_large_buffers() -> None:
    """Makes the C library give back what is freed, at once: while weights of many sizes are read and laid out anew.

    The next one rarely fits where the last one was: a model of 3.7 GB kept 0.8 GB that it did not use.
    """
    _set_glibc(own_pages_from=1 << 20, keep=1 << 20)


def _set_glibc(own_pages_from: int, keep: int) -> None:
    """Sets from what size on a buffer gets pages of its own, and how much free memory is kept at the heap's end."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, own_pages_from)
        mallopt(_M_TRIM_THRESHOLD, keep)


def _of_machine(root: Path) -> Iterator[int]:
    sizes = _sizes(root / "proc/meminfo")
    if "MemAvailable" in sizes:
        yield sizes["MemAvailable"] + sizes.get("SwapFree", 0)


def _of_groups(root: Path) -> Iterator[int]:
    """Yields what each group leaves that this process is in, and each group around that."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        kind = _V2 if number == "0" else _V1 if "memory" in controllers.split(",") else None
        if kind is None:
            continue
        group = PurePosixPath("/", "" if ".." in path else path)  # a group outside what is mounted here
        for mount in kind.mounts:  # in a container the path may be that of the host, of which only the end is mounted
            for each in (group, *group.parents):
                folder = root / mount / str(each)[1:]
                limit, usage = _read(folder / kind.limit).strip(), _read(folder / kind.usage).strip()
                if limit.isdigit() and usage.isdigit():
                    cached = _sizes(folder / "memory.stat")
                    yield int(limit) - int(usage) + sum(cached.get(name, 0) for name in kind.page_cache)


def _of_process(root: Path) -> Iterator[int]:
    """Yields what the limits of `ulimit -v` and `ulimit -d` leave."""
    used, limits = _sizes(root / "proc/self/status"), _read(root / "proc/self/limits")
    for name, size in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        if (found := re.search(rf"^{name} +(\d+)", limits, re.MULTILINE)) and size in used:
            yield int(found[1]) - used[size]


def _sizes(file: Path) -> Mapping[str, int]:
    """Returns the bytes of lines such as `MemFree:  5 kB`, or `inactive_file 5120`, by name."""
    lines = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", _read(file), re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in lines}


def _read(file: Path) -> str:
    """Returns the content of a file of the kernel; "" if it is not there, or closed to this process."""
    with suppress(OSError):
        return file.read_text(encoding="ascii", errors="replace")
    return ""
