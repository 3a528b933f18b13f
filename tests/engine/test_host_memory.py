"""What is free is the least that the machine, the control groups around a process and its own limits leave."""

import ctypes
import subprocess
import sys

import pytest

from internvl_rt.engine.host_memory import free_host_bytes

KIB, MIB = 1 << 10, 1 << 20
MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\nSwapFree:  50 kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/123\n0::/\n"}


def group(folder, limit, usage, stat="", *, version=2):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    values = (f"{limit}\n", f"{usage}\n", stat)
    return {f"sys/fs/cgroup/{folder}{name}": value for name, value in zip((*names, "memory.stat"), values, strict=True)}


CASES = {
    "a machine with swap": (MACHINE, 8050 * KIB),
    "no /proc": ({}, None),
    "a group without a limit": ({**MACHINE, **V2, **group("a/b/", "max", 5)}, 8050 * KIB),
    "a group": ({**MACHINE, **V2, **group("a/b/", 3 * MIB, MIB)}, 2 * MIB),
    "a group around it": ({**MACHINE, **V2, **group("a/b/", "max", 0), **group("a/", 2 * MIB, MIB)}, MIB),
    "files in the page cache": (
        {**MACHINE, **V2, **group("a/b/", 3 * MIB, 3 * MIB, f"anon 7\ninactive_file {MIB}\nactive_file {MIB}\n")},
        2 * MIB,
    ),
    "a container's own root": ({**MACHINE, **V2, **group("", 2 * MIB, MIB)}, MIB),
    "a full group": ({**MACHINE, **V2, **group("a/b/", MIB, 2 * MIB)}, 0),
    "version 1": ({**MACHINE, **V1, **group("memory/docker/123/", 3 * MIB, MIB, version=1)}, 2 * MIB),
    "version 1, a container's root": (
        {**MACHINE, **V1, **group("memory/", 3 * MIB, 2 * MIB, f"total_inactive_file {MIB}\n", version=1)},
        2 * MIB,
    ),
    "version 1 without a limit": (
        {**MACHINE, **V1, **group("memory/", 9223372036854771712, MIB, version=1)},
        8050 * KIB,
    ),
    "ulimit -v": (
        {
            **MACHINE,
            "proc/self/status": "Name:\tx\nVmSize:\t 1024 kB\nVmData: 512 kB\n",
            "proc/self/limits": f"Max address space         {3 * MIB}     unlimited            bytes\n"
            "Max data size             unlimited            unlimited            bytes\n",
        },
        2 * MIB,
    ),
    "files of another form": ({**MACHINE, **V2, **group("a/b/", "many", "some"), "proc/self/limits": "?"}, 8050 * KIB),
    "a path that leads outside": ({**MACHINE, "proc/self/cgroup": "0::/../x\n0\n::\n", **group("", MIB, 0)}, MIB),
}


@pytest.mark.parametrize("name", CASES)
def test_the_narrowest_limit_decides(tmp_path, name):
    files, expected = CASES[name]
    for path, content in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert free_host_bytes(tmp_path) == expected


def test_this_machine_has_some_memory_free():
    free = free_host_bytes()
    assert free is None or free > MIB


FREE_TENSORS = """
import torch
from internvl_rt.engine import host_memory

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

host_memory.{call}()
before = resident()
tensors = [torch.ones(1 << 20) for _ in range(32)]
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("call", "least", "most"),
    [("give_back_large_buffers", 0, 32), ("keep_large_buffers", 96, 160)],
    ids=["given-back", "kept"],
)
def test_whether_memory_that_is_freed_is_given_back(call: str, least: int, most: int) -> None:
    """128 MiB are freed; the limits are MiB that are left."""
    program = FREE_TENSORS.format(call=call)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert least <= int(ended.stdout) <= most
