"""Checks what the runtime needs: Python, packages, driver, torch, device, the compiled part, Triton's tools.

A heavy module is imported only by the check that needs it, because it may be broken. A check raises what it does not
expect; `doctor.checks` says what to do then.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from internvl_rt.doctor.finding import Finding, describe, one_line

PACKAGE = Path(__file__).parents[1]
GIB = 2**30
CUDA_NO_DEVICE = 100


def check_package() -> Finding:
    """Finds the version, and the commit if the package lies in a checkout."""
    found, commit, root = version("internvl-rt"), None, PACKAGE.parent
    if (root / ".git").exists():
        git = ("git", "--no-optional-locks", "-C", str(root))
        commit = output_of(*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    text = f"{found}, commit {commit}" if commit else found
    return Finding("ok", text, {"version": found, "commit": commit})


def check_python() -> Finding:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return Finding("ok", f"{found['python']} on {found['platform']}", found)


def check_packages() -> Finding:
    """Compares everything that `internvl-rt` requires with the oldest version that it allows."""
    found: dict[str, str | None] = {}
    wanting = []
    for requirement in requires("internvl-rt") or ():
        match = re.match(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?", requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, least = match.groups()
        try:
            found[name] = installed = version(name)
        except PackageNotFoundError:
            found[name] = None
            wanting.append(f"{name} is not installed")
            continue
        if least is not None and _release(installed) < _release(least):
            wanting.append(f"{name} {installed} is older than {least}")
    text = ", ".join(f"{name} {installed}" for name, installed in sorted(found.items()) if installed)
    if wanting:
        text = f"{', '.join(wanting)}; install what is missing: pip install --upgrade internvl-rt (there is {text})"
    return Finding("failed" if wanting else "ok", text, {"versions": found})


def _release(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version, so that they can be compared: 2.13.0+cpu gives 2, 13, 0."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def check_driver() -> Finding:
    """Finds the kernel driver, by nvidia-smi, and the CUDA version of the library that programs load."""
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    library = _load_cuda()
    facts = {"driver": driver, "cuda": library.version, "num_devices": library.num_devices}
    if library.version is None:
        if driver is None:
            return Finding("ok", "none: there is no NVIDIA driver, so the CPU computes", facts)
        text = f"nvidia-smi knows driver {driver}, but its library libcuda.so.1 does not load; start a container with "
        return Finding("failed", f"{text}its GPUs (docker run --gpus all), elsewhere install the driver again", facts)
    text = f"{driver or 'version unknown (no nvidia-smi)'}, for CUDA up to {library.version}"
    if library.error not in (0, CUDA_NO_DEVICE):
        text += f", does not start: CUDA error {library.error}; see nvidia-smi and the system's log (dmesg)"
        return Finding("failed", text, facts)
    return Finding("ok", text if library.num_devices else f"{text}; no GPU, or CUDA_VISIBLE_DEVICES hides them", facts)


class _CudaLibrary(NamedTuple):
    version: str | None  # CUDA version; None if the library cannot be loaded
    error: int  # error code of its initialisation
    num_devices: int  # devices that a program may use


def _load_cuda() -> _CudaLibrary:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _CudaLibrary(None, 0, 0)
    number, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    error = library.cuInit(0)
    if error == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return _CudaLibrary(f"{number.value // 1000}.{number.value % 1000 // 10}", error, count.value)


def check_torch() -> Finding:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Finding("ok", f"{torch.__version__}, {built}", {"version": torch.__version__, "cuda": torch.version.cuda})


def check_device() -> Finding:
    """Finds the engine's default device, and checks that it computes. A GPU that torch cannot use is a failure."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        assert torch.arange(10, device="cuda").sum().item() == 45, "the device computes a sum wrong"
        free, total = torch.cuda.mem_get_info(0)
        capability = f"{properties.major}.{properties.minor}"
        others = torch.cuda.device_count() - 1
        facts = {"kind": "cuda", "name": properties.name, "capability": capability, "others": others}
        facts |= {"num_sms": properties.multi_processor_count, "memory_bytes": total, "free_bytes": free}
        text = f"{properties.name}, compute capability {capability}, {properties.multi_processor_count} multiprocessors"
        text += f", {total / GIB:.1f} GiB, {free / GIB:.1f} free"
        return Finding("ok", text + (f"; {others} more that are not used" if others else ""), facts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"kind": "cpu", "name": platform.machine(), "memory_bytes": memory, "num_threads": torch.get_num_threads()}
    if _load_cuda().num_devices:
        why = f"torch {torch.__version__} is built without CUDA"
        if torch.version.cuda:
            why = "torch cannot use it"
            try:
                torch.zeros(1, device="cuda")
            except RuntimeError as error:
                why = f"torch cannot use it ({describe(error)})"
        return Finding("failed", f"a GPU is there, but {why}; install a torch for the CUDA of the driver above", facts)
    text = f"the CPU ({facts['name']}), {facts['num_threads']} threads, {memory / GIB:.1f} GiB"
    return Finding("ok", text, facts)


def check_compiled_part() -> Finding:
    """Checks that the C++ part, which assigns the blocks of the paged KV cache, loads."""
    try:
        from internvl_rt._C import PagedKVCache
    except ImportError as error:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        built = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
        there = f"there is {', '.join(built)}" if built else "there is none"
        text = f"internvl_rt/_C{suffix} does not load ({one_line(str(error))}; {there}); build it with this Python: "
        text += "pip install --force-reinstall --no-deps, of the package or of the checkout; needs a C++20 compiler"
        return Finding("failed", text)
    return Finding("ok", f"loads, and tracks {PagedKVCache(4, 16).num_blocks} blocks")


def check_triton() -> Finding:
    import triton
    import triton.language  # the compiler's own library, which a half installed triton lacks

    interpreted = bool(triton.knobs.runtime.interpret)
    text = f"{triton.__version__}, interpreting kernels on the CPU (TRITON_INTERPRET is set)"
    return Finding("ok", text if interpreted else triton.__version__, {"version": triton.__version__})


def check_compiler() -> Finding:
    """Checks for a C compiler and Python's headers, with which Triton builds what launches its kernels."""
    import torch
    import triton

    # Compiler and headers are looked up as Triton does it; Debian's own scheme has no headers.
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    compiler = triton.knobs.build.cc or shutil.which("gcc") or shutil.which("clang")
    problem = "there is neither gcc nor clang on the PATH; install one, or name one in CC"
    if compiler is not None:
        problem = _compile(compiler, include)
    if not problem:
        return Finding("ok", f"{compiler} builds against Python's headers", {"compiler": compiler})
    if torch.cuda.is_available():
        return Finding("failed", f"Triton builds its launcher with a C compiler, and {problem}", {"compiler": compiler})
    return Finding("not checked", f"nothing needs one here, but with a GPU Triton does: {problem}")


def _compile(compiler: str, include: str) -> str:
    """Builds an empty module; returns what is missing for that, in words."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <Python.h>\n")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            return f"{compiler} cannot be started ({error.strerror}); install it, or name another in CC"
    if done.returncode == 0:
        return ""
    if "Python.h" in done.stderr:
        package = f"python{sysconfig.get_python_version()}-dev (or -devel)"
        return f"Python's headers are not in {include}; install the system's package {package}"
    said = one_line(done.stderr) or f"exit code {done.returncode}"
    return f"{compiler} fails: {said}; install gcc, or name one in CC"


def output_of(*command: str) -> str | None:
    """Returns the first line that a program prints; None if it is missing, fails, or takes long."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.partition("\n")[0].strip() or None
    return None
