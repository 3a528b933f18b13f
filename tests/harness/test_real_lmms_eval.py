"""The command of docs/evaluation.md, in an environment with lmms-eval: killed once, it ends with the right accuracy."""

import json
import os
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest

from internvl_rt import Engine
from support.digits import measure_accuracy
from support.environments import make_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "lmms_eval"
TASK = "internvl_rt_digits"
NUMBER = 40  # pictures
# What lmms-eval imports for a task like this. All that it requires are 1.7 GB, and a torchvision that fits torch. It
# imports a module of filelock that filelock 4 does not have.
NEEDED = "accelerate datasets evaluate filelock==3.32.7 loguru pytablewriter pytz sacrebleu tenacity".split()
PATIENCE_S = 120
CHOICES = """
task: choices
dataset_path: imagefolder
dataset_kwargs: {data_dir: digits}
test_split: train
output_type: multiple_choice
doc_to_visual: image
doc_to_text: question
doc_to_choice: "{{[answer ~ '0', answer, '4' ~ answer]}}"
doc_to_target: 1
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with lmms-eval that sees the packages of this one, torch and internvl_rt among them."""
    return make_environment(tmp_path_factory.mktemp("lmms") / "environment", NEEDED, alone=["lmms-eval"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    subprocess.run([python, EXAMPLE / "draw_digits.py", "--number", str(NUMBER)], cwd=folder, check=True)
    return folder


def start(
    python: Path,
    folder: Path,
    model_args: str,
    *more: str,
    tasks: Path = EXAMPLE,
    task: str = TASK,
    out: str = "results",
) -> subprocess.Popen[str]:
    command = [python, "-m", "lmms_eval", "--model", "internvl_rt", "--model_args", f"pretrained=tiny,{model_args}"]
    command += ["--include_path", tasks, "--tasks", task, "--output_path", out, *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], results: Path) -> dict[str, dict[str, float]]:
    """Waits for a run, and returns the measures that it reports of each task."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    reports = list(results.glob("**/*results.json"))
    assert len(reports) == 1, output[-5000:]
    measures: dict[str, dict[str, float]] = json.loads(reports[0].read_text())["results"]
    return measures


def test_a_run_that_was_killed_goes_on_and_reports_the_accuracy(python: Path, folder: Path) -> None:
    model_args, answers = "device=cpu,dtype=float32,max_num_seqs=1,resume=answers.jsonl", folder / "answers.jsonl"

    def lines() -> list[bytes]:
        return answers.read_bytes().splitlines() if answers.exists() else []

    first = start(python, folder, model_args)
    deadline_s = time.monotonic() + PATIENCE_S
    while len(lines()) < 5 and first.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    output, _ = first.communicate()
    kept = lines()
    assert 5 <= len(kept) < NUMBER, output[-5000:]
    answers.write_bytes(b"".join(line + b"\n" for line in kept) + b'{"key": "cut o')

    share = finish(start(python, folder, model_args), folder / "results")[TASK]["exact_match,none"]
    exercises = runpy.run_path(str(EXAMPLE / "draw_digits.py"))["draw_exercises"](NUMBER)
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32") as engine:
        assert share == measure_accuracy(engine, exercises)
    assert 0.9 <= share < 1  # so that the answers are compared at all
    assert lines()[: len(kept)] == kept
    assert len({json.loads(line)["key"] for line in lines()}) == len(lines()) == NUMBER


def test_choices_by_likelihood_are_scored_in_the_simple_form(python: Path, folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "digits.yaml").write_text((EXAMPLE / "digits.yaml").read_text())
    (folder / "tasks" / "choices.yaml").write_text(CHOICES)
    form = {"tasks": folder / "tasks", "task": f"{TASK},choices", "out": "simple"}
    measures = finish(start(python, folder, "device=cpu", "--force_simple", **form), folder / "simple")
    assert measures[TASK]["exact_match,none"] > 0.9
    assert measures["choices"]["acc,none"] > 0.9
