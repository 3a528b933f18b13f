"""docs/adding-a-kernel.md is followed literally, in a copy of the repository, and what it promises is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.doc_blocks import Block, read_blocks, split_commands

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-kernel.md"
COPIED = ("internvl_rt", "kernels", "tests", "bench", "pyproject.toml")


def write(block: Block, copy: Path) -> None:
    """Writes the file that the first line of a block names."""
    name = re.match(r"# (\S+)\n", block.text)
    assert name, f"line {block.line} names no file"
    assert not (copy / name[1]).exists()
    (copy / name[1]).write_text(block.text.partition("\n")[2] + "\n", encoding="utf-8")


def change(block: Block, copy: Path) -> None:
    """Adds the lines with + between the others, which must stand in the file once."""
    _, header, *lines = block.text.splitlines()
    file = copy / header.removeprefix("+++ b/")
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file.name}: the lines at line {block.line} of the page are not in it once"
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
            )
        else:
            shutil.copy(source, folder / name)
    for block in read_blocks(PAGE):
        if block.tag in ("python", "diff"):
            (write if block.tag == "python" else change)(block, folder)
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_succeeds_and_finds_the_kernel(copy: Path) -> None:
    (commands,) = (split_commands(block) for block in read_blocks(PAGE) if block.tag == "sh")
    assert len(commands) == 5
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(copy)}
    environment.pop("TRITON_INTERPRET", None)
    for command in commands:
        text = command.text.replace("internvl-rt", f"{sys.executable} -m internvl_rt")  # of the copy
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=copy, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{command.text}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        assert "scaled_add" in run.stdout or re.search(r"\b\d{2,} passed|[1-9]\d* kernels, 0 breaches", run.stdout), (
            run.stdout
        )


@pytest.mark.slow
def test_the_rules_of_the_house_hold_in_the_copy(copy: Path) -> None:
    for command in (["ruff", "check", "kernels"], ["ruff", "format", "--check", "kernels"], ["mypy"]):
        run = subprocess.run([sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout
