"""The source archive and the wheel are complete: the wheel is installed elsewhere, and the model in it answers."""

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from support.wheels import PIP, build_wheel, install_tools

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "csrc" / "build_wheels.py"

READ_SAMPLES = """
import json, sys
from pathlib import Path
import internvl_rt
from internvl_rt import Engine, SamplingParams

engine = Engine.from_pretrained("tiny", device="cpu")
replies = {}
for path in sorted(Path(internvl_rt.__file__).parent.glob("tiny/samples/*.png")):
    parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": "Read the digits."}]
    replies[path.stem] = engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=16)).text
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("internvl_rt.")]
print(json.dumps({"replies": replies, "files": [file for file in files if file]}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path) -> list[str]:
    """Lists the files of a folder of the checkout, without what Python and the compiler leave there."""
    return [
        (Path(parent) / file).relative_to(folder).as_posix()
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if not parent.endswith("__pycache__") and not file.startswith("_C.cpython")
    ]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install_tools(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def wheel(tools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"), tools)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-index", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/") and ".dist-info/" not in name]
    compiled = [name for name in held if re.fullmatch(r"internvl_rt/_C\..*(so|pyd)", name)]
    assert len(compiled) == 1
    checkout = [f"internvl_rt/{file}" for file in files_of(ROOT / "internvl_rt")]
    assert sorted(held) == sorted(checkout + compiled)


@pytest.mark.slow
def test_the_source_archive_holds_what_builds_the_package_and_nothing_else(wheel: Path) -> None:
    """It has no tests: they also run docs/, examples/ and bench/ of the repository, and would need all of it."""
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert all(member.isfile() or member.isdir() for member in archive), "a link could lead out of it"
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    written = {"PKG-INFO", "setup.cfg"}  # by setuptools
    root = {"LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    folders = {f"{folder}/{file}" for folder in ("csrc", "internvl_rt") for file in files_of(ROOT / folder)}
    assert held == written | root | folders


@pytest.mark.slow
def test_archives_built_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = "import build_wheels, pathlib, sys; build_wheels.build_archive(pathlib.Path(sys.argv[1]))"
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder], env={**os.environ, "PYTHONPATH": str(BUILD.parent)}, cwd=tmp_path
        )
        for folder in folders
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    held = []
    for path in tmp_path.glob("*/*.tar.gz"):
        with tarfile.open(path) as archive:
            held.append({member.name.partition("/")[2] for member in archive})
    assert "internvl_rt/tiny/samples" in held[0]
    assert held == [held[0]] * len(builds)


@pytest.mark.slow
def test_the_wheel_says_what_it_runs_on(wheel: Path, tools: dict[str, str]) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    match = re.fullmatch(
        rf"internvl_rt-[\d.]+-{python}-{python}-(manylinux_2_\d+_{platform.machine()})\.whl", wheel.name
    )
    assert match, wheel.name
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=wheel.parent, **tools)
    unwrapped = "".join(shown.split())  # it breaks lines at hyphens too
    assert f'{wheel.name}isconsistentwiththefollowingplatformtag:"{match[1]}"' in unwrapped


@pytest.mark.slow
def test_the_compiled_part_does_not_say_where_it_was_built(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        compiled = archive.read(name)
    places = [str(ROOT), tempfile.gettempdir(), sysconfig.get_path("include"), str(Path.home()), "/csrc/"]
    assert [place for place in places if place.encode() in compiled] == []


@pytest.mark.slow
def test_the_installed_package_reads_its_own_pictures(installed: Path, tmp_path: Path) -> None:
    result = json.loads(run(sys.executable, "-c", READ_SAMPLES, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert all(Path(file).is_relative_to(installed) for file in result["files"])
    expected = {stem: match[0] for stem in result["replies"] if (match := re.match(r"\d+", stem))}
    assert len(expected) >= 2, "samples are named after the digits they show"
    assert {stem: result["replies"][stem] for stem in expected} == expected


@pytest.mark.slow
def test_the_installed_command_starts(installed: Path, tmp_path: Path) -> None:
    output = run(installed / "bin" / "internvl-rt", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert re.fullmatch(r"internvl-rt \d+\.\d+\.\d+\n", output)


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        (
            ["--pythons", "no-such-python"],
            None,
            "but no-such-python in PYTHONS does not start: give a command or a path",
        ),
        ([], "/no/such/folder", "none of python3.11, python3.12, python3.13, python3.14 on PATH starts"),
        (["--pythons", sys.executable], None, "setuptools and auditwheel not installed: use `make wheels`"),
    ],
    ids=["not a Python", "no Python", "no tools"],
)
def test_where_no_wheel_can_be_built_one_line_says_why(
    tmp_path: Path, options: list[str], path: str | None, message: str
) -> None:
    command = [sys.executable, "-S", BUILD, "--out", tmp_path / "dist", *options]  # -S hides installed packages
    environment = {**os.environ, **({"PATH": path} if path else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not (tmp_path / "dist").exists()


def test_wheels_are_built_for_the_pythons_that_the_metadata_names() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    prefix = "Programming Language :: Python :: 3."
    named = [text.removeprefix(prefix) for text in settings["project"]["classifiers"] if text.startswith(prefix)]
    assert settings["tool"]["cibuildwheel"]["build"] == [f"cp3{minor}-*" for minor in named]
