"""Three strangers with a bare environment, outside of the repository, and nothing but the wheel.

One embeds the engine in a program, one measures a kernel, one serves a model.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from support.wheels import build_wheel, install_tools

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
READY_S, HELP_S = (
    4.0,
    0.15,
)  # until `tiny` is loaded, and until --help is printed; in a process whose files are in memory
SAMPLE = "import importlib.resources as r; print(r.files('internvl_rt') / 'tiny/samples/4719.png')"


class User:
    """Runs commands in an environment with the wheel, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        private = {"PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV", "OMP_NUM_THREADS", "COVERAGE_PROCESS_START"}
        self.environment = {name: value for name, value in os.environ.items() if name not in private}
        self.environment["PATH"] = f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def run(self, *command: str | Path, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def example(self, name: str) -> Path:
        """Fetches an example, as if from the page that shows it."""
        return Path(shutil.copy(ROOT / "examples" / f"{name}.py", self.folder))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    folder = tmp_path_factory.mktemp("user")
    (folder / "tools").mkdir()
    wheel = build_wheel(folder / "dist", install_tools(folder / "tools"))
    made = User(folder)
    made.run(sys.executable, "-m", "venv", folder / "venv")
    pip = (made.bin / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    made.run(*pip, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[server,grammar]")
    return made


def last_line(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_nothing_of_the_repository_is_seen(user: User) -> None:
    places = user.run("python", "-c", "import internvl_rt, sys; print(internvl_rt.__file__, sys.path)")
    assert str(ROOT) not in places
    assert str(user.folder) in places


def test_doctor_finds_the_machine_sound(user: User) -> None:
    report = json.loads(user.run("internvl-rt", "doctor", "--json"))
    assert report["healthy"], report
    assert {check["name"]: check["status"] for check in report["checks"]}["answer"] == "ok"


def test_the_program_of_the_first_user_reads_a_page(user: User) -> None:
    assert user.run("python", user.example("read_page")).startswith("4719\n")
    assert json.loads(user.run("python", user.example("json_from_picture"))) == {"number": "862053"}
    assert user.run("python", user.example("stream_chat"), code=0) == ""  # stdin is empty
    message = subprocess.run(
        [user.bin / "python", user.example("read_page"), "tiny", "nowhere.png"],
        cwd=user.folder, env=user.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (message.returncode, message.stderr.count("\n")) == (1, 1)


def test_the_program_of_the_first_user_chooses_among_answers_and_is_evaluated(user: User) -> None:
    assert user.run("python", user.example("best_of_four")).endswith("best: 4719\n")
    sample = user.run("python", "-c", SAMPLE).strip()
    ask = ("internvl-rt", "best-of", "tiny", "--image", sample, "Read the digits.", "-n", "2")
    document = json.loads(user.run(*ask, "--critic", "tiny", "--json"))
    assert [answer["steps"][0]["step"] for answer in document["answers"]] == ["4719"] * 2
    code = "from importlib.metadata import entry_points; print(*entry_points(group='lmms_eval.models'))"
    assert "internvl_rt.harness:lmms_eval_models" in user.run("python", "-c", code)


def test_the_first_user_waits_no_longer_than_promised(user: User) -> None:
    program = (
        "import time; start = time.perf_counter()\nfrom internvl_rt import Engine\n"
        "Engine.from_pretrained('tiny'); print(time.perf_counter() - start)"
    )
    assert min(float(user.run("python", "-c", program)) for _ in range(3)) < READY_S

    def help_s() -> float:
        start_s = time.perf_counter()
        user.run("internvl-rt", "--help")
        return time.perf_counter() - start_s

    assert min(help_s() for _ in range(10)) < HELP_S


def test_the_types_of_a_program_are_found_where_the_wheel_is_installed(user: User) -> None:
    program = shutil.copy(ROOT / "tests" / "support" / "typed_program.py", user.folder)
    cache = f"--cache-dir={user.folder / 'types'}"
    command = [sys.executable, "-m", "mypy", "--strict", cache, f"--python-executable={user.bin / 'python'}", program]
    done = subprocess.run(command, cwd=user.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_second_user_finds_measures_and_calls_a_kernel(user: User) -> None:
    assert re.search(r"^rms_norm +RMSNorm", user.run("internvl-rt", "kernels"), re.MULTILINE)
    assert "from internvl_rt.kernels.rms_norm import rms_norm" in user.run("internvl-rt", "kernels", "rms_norm")
    document = last_line(user.run("internvl-rt", "bench", "kernels", "rms_norm/width_896", "--json", "rms_norm.json"))
    assert document == json.loads((user.folder / "rms_norm.json").read_text())
    (row,) = document["rows"]
    assert row["name"] == "rms_norm/width_896/float32"
    assert row["roof_percent"] > 0
    printed = user.run("python", user.example("kernel_in_torch"), TRITON_INTERPRET="1")
    assert "largest difference from the reference" in printed


def test_the_third_user_measures_and_serves_a_model(user: User) -> None:
    assert "InternVL3-8B" in user.run("internvl-rt", "info", "InternVL3-8B")
    assert last_line(user.run("internvl-rt", "bench", "decode", "tiny", "--quick"))["part"] == "decode"
    sample = Path(user.run("python", "-c", SAMPLE).strip())
    url = f"data:image/png;base64,{b64encode(sample.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the digits."}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    with subprocess.Popen(
        [user.bin / "internvl-rt", "serve", "tiny", "--port", "0"],
        cwd=user.folder, env=user.environment, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stderr is not None
            lines = (json.loads(line) for line in server.stderr)
            listening = next(line for line in lines if line["event"] == "listening")
            address = f"{listening['url']}/v1/chat/completions"
            request = urllib.request.Request(address, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"] == "4719"
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0
