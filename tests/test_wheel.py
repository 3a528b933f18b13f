"""What is shipped, not the checkout: the wheel is built, unpacked elsewhere, and asked about its own pictures."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

# Reads every sample of the installed package whose name begins with the digits it shows.
READ_SAMPLES = """
import json, sys
from pathlib import Path
import internvl_rt
from internvl_rt import Engine, SamplingParams

package = Path(internvl_rt.__file__).parent
engine = Engine.from_pretrained("tiny", device="cpu")
replies = {}
for path in sorted(package.glob("tiny/samples/[0-9]*.png")):
    parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": "Read the digits."}]
    replies[path.stem] = engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=16)).text
print(json.dumps({"package": str(package), "replies": replies}))
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path
