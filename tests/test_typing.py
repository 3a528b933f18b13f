"""The public interface as its users' tools see it: type checkers, `help()`, `dir()`."""

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import internvl_rt
from internvl_rt import critic
from support import typed_program

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "support" / "typed_program.py"
SAMPLE = ROOT / "internvl_rt" / "tiny" / "samples" / "4719.png"


def test_pyright_finds_every_type_of_a_program(tmp_path: Path) -> None:
    settings = {"typeCheckingMode": "strict", "include": [str(PROGRAM)], "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_mypy_finds_every_type_of_a_program(tmp_path: Path) -> None:
    """The package's own files are as in site-packages, where nothing is said of them."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    done = subprocess.run([*command, str(PROGRAM)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_wrong_type_would_be_found(tmp_path: Path) -> None:
    wrong = PROGRAM.read_text().replace("tokens: int = usage", "tokens: str = usage")
    (tmp_path / "program.py").write_text(wrong)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert '"int" is not assignable to "str"' in done.stdout


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    typed_program.main(SAMPLE)
    assert "4719" in capsys.readouterr().out


CRITIC = [name for name, value in vars(critic).items() if getattr(value, "__module__", "").startswith(critic.__name__)]


@pytest.mark.parametrize("name", [*internvl_rt.__all__, *CRITIC])
def test_help_says_what_a_name_and_each_of_its_members_is_for(name: str) -> None:
    named = getattr(internvl_rt, name, None) or getattr(critic, name)
    assert named.__doc__
    assert "(" not in named.__doc__.partition("\n")[0][: len(name) + 1], "it is not the signature that dataclasses make"
    assert name in pydoc.render_doc(named)
    for member, value in vars(named).items() if inspect.isclass(named) else ():
        is_method = inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
        if is_method and not member.startswith("_"):
            assert inspect.getdoc(getattr(named, member)), f"{name}.{member}"


def test_all_names_are_listed_and_load() -> None:
    assert set(internvl_rt.__all__) <= set(dir(internvl_rt))
    assert {"Engine", "AsyncEngine", "SamplingParams", "EngineOptions", "InternVLError", "RawPrompt"} <= set(
        internvl_rt.__all__
    )
    errors = {name for name in vars(internvl_rt.errors) if name.endswith("Error")}
    assert errors <= set(internvl_rt.__all__)


def test_errors_are_of_one_tree_with_one_documented_field() -> None:
    for name in (name for name in internvl_rt.__all__ if name.endswith("Error")):
        kind = getattr(internvl_rt, name)
        error = kind("what is wrong")
        assert isinstance(error, internvl_rt.InternVLError)
        assert name == "InternVLError" or isinstance(error, ValueError) != isinstance(error, RuntimeError)
        assert (str(error), error.media_id) == ("what is wrong", None)
