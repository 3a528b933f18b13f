"""The source archive and the wheel are complete: the wheel is installed elsewhere, and the model in it answers."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

# The egg-info goes beside the archive, so that nothing is left in the checkout.
BUILD_ARCHIVE = """
import sys
from setuptools.build_meta import build_sdist
build_sdist(sys.argv[1], {"--global-option": ["--quiet", "egg_info", "--egg-base", sys.argv[1]]})
"""

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the source archive and from it the wheel, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD_ARCHIVE, folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", archive, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-index", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    compiled = [name for name in held if re.fullmatch(r"internvl_rt/_C\..*(so|pyd)", name)]
    assert len(compiled) == 1
    checkout = [
        (Path(folder) / file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "internvl_rt", followlinks=True)
        for file in files
        if not folder.endswith("__pycache__") and not file.startswith("_C.cpython")
    ]
    assert sorted(held) == sorted(checkout + compiled)


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
