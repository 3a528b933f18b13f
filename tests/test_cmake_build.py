"""The build of csrc/ finds its tools, builds again what has changed, and says what is missing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cmake_build
from plain_build import build_in_place

ROOT = Path(__file__).parents[1]
PROJECT = {
    "CMakeLists.txt": "cmake_minimum_required(VERSION 3.22)\nproject(small CXX)\nadd_library(_C SHARED a.cpp b.cpp)\n",
    "CMakePresets.json": json.dumps(
        {"version": 3, "configurePresets": [{"name": "release", "generator": "Ninja", "binaryDir": "unused"}]}
    ),
    "a.h": "int number();\n",
    "a.cpp": '#include "a.h"\nint number() { return 1; }\n',
    "b.cpp": "int other() { return 2; }\n",
}


def make_program(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hides all tools: no package, script of this Python or folder on PATH has one. Returns the folder on PATH."""
    for name in ("cmake", "ninja"):
        monkeypatch.setitem(sys.modules, name, None)
    paths = {**sysconfig.get_paths(), "scripts": str(tmp_path / "scripts")}
    monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "path"


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_tools_of_this_pythons_environment_come_before_the_systems(
    bare: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(
        cmake_build.MissingToolError, match=f"^{name} is needed to build csrc/: pip install {name}, or "
    ):
        cmake_build.find_tool(name)
    system = make_program(bare, name)
    assert cmake_build.find_tool(name) == system
    script = make_program(bare.parent / "scripts", name)
    assert cmake_build.find_tool(name) == script
    packaged = make_program(bare.parent / "data", name)
    (bare.parent / f"{name}.py").write_text(f"CMAKE_BIN_DIR = BIN_DIR = {str(bare.parent / 'data')!r}\n")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(bare.parent)
    assert cmake_build.find_tool(name) == packaged
    monkeypatch.delitem(sys.modules, name)


def test_each_missing_thing_is_named_with_what_to_install(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cmake_build.MissingToolError, match=r"found no c\+\+ or g\+\+ or clang\+\+: install g\+\+ or"):
        cmake_build.check_environment()
    make_program(bare, "clang++")
    cmake_build.check_environment()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cmake_build.MissingToolError, match=r"pybind11 is needed to build csrc/: pip install pybind11"):
        cmake_build.check_environment()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(bare))
    with pytest.raises(
        cmake_build.MissingToolError, match=r"headers are needed to build csrc/: install python3\.\d+-dev"
    ):
        cmake_build.check_environment()


def test_setup_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler -m64"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: a C++20 compiler is needed to build csrc/, found no no-such-compiler: install g++ or clang, or set CXX"
    ]


@pytest.mark.slow
def test_only_what_a_change_concerns_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    for name, text in PROJECT.items():
        (source / name).write_text(text)

    def rebuilt() -> set[str]:
        times = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.o")}
        cmake_build.build(folder, ["_C"], source=source, quiet=True)
        return {path.name for path in folder.rglob("*.o") if path.stat().st_mtime_ns != times.get(path.name)}

    assert rebuilt() == {"a.cpp.o", "b.cpp.o"}
    assert rebuilt() == set()
    (source / "b.cpp").write_text("int other() { return 3; }\n")
    assert rebuilt() == {"b.cpp.o"}
    (source / "a.h").write_text("int number();  // of something\n")
    assert rebuilt() == {"a.cpp.o"}
    monkeypatch.setenv("CXXFLAGS", "-O2")
    assert rebuilt() == {"a.cpp.o", "b.cpp.o"}, "the flags have changed"
    moved = shutil.copytree(folder, tmp_path / "moved")
    folder = moved  # a checkout that is copied to another place has a copy of its build folder
    assert rebuilt() == {"a.cpp.o", "b.cpp.o"}, "CMake refuses a folder that was configured elsewhere"


def test_the_extension_knows_every_source_file() -> None:
    """CMakeLists.txt names the files one by one, as CMake advises; a file that is not named would not be linked."""
    text = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    files = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("bench/csrc/*.cpp")]
    assert [file.name for file in files if file.name not in text] == []


@pytest.mark.slow
def test_where_cmake_is_missing_one_call_of_the_compiler_builds_the_extension(tmp_path: Path) -> None:
    """bench/gpu.py builds in this way; then the package has its compiled part and version without an installation."""
    for file in ROOT.iterdir():
        if file.name not in {"internvl_rt", "build"} and file.suffix != ".egg-info":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "internvl_rt").mkdir()
    for file in (ROOT / "internvl_rt").iterdir():
        if file.suffix != ".so":
            (tmp_path / "internvl_rt" / file.name).symlink_to(file)
    build_in_place(tmp_path, ["-O0"])
    program = (
        "import importlib.metadata as metadata, internvl_rt._C as compiled; "
        "print(metadata.version('internvl-rt'), compiled.PagedKVCache(4, 16).num_blocks, compiled.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", program]  # -S hides installed packages
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, num_blocks, file = done.stdout.split()
    assert (version.count("."), num_blocks) == (2, "4")
    assert Path(file).is_relative_to(tmp_path)
