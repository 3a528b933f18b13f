"""The model of VLMEvalKit answers its threads in one batch, and a command runs the harness with it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from types import SimpleNamespace

import pytest

from internvl_rt import ContextLengthError, MediaError, StepError

SAMPLES = files("internvl_rt") / "tiny" / "samples"
NUMBERS = ("4719", "862053", "905", "42", "7", "31415")


@pytest.fixture
def harness(adapter):
    return adapter("vlmevalkit")


def ask(number):
    return [
        {"type": "image", "value": str(SAMPLES / f"{number}.png")},
        {"type": "text", "value": "Read the digits."},
    ]


def test_threads_get_their_own_answers_from_one_batch(harness):
    model = harness.Model("tiny", device="cpu", max_new_tokens=12)
    assert model.is_api  # so that VLMEvalKit asks in threads, and keeps each answer
    with ThreadPoolExecutor(6) as threads:
        assert tuple(threads.map(model.generate, map(ask, NUMBERS * 3))) == NUMBERS * 3
    stats = model.engine.stats()
    assert stats["requests_stop"] == 18
    assert stats["steps"] < stats["generated_tokens"] / 1.5


def test_a_conversation_goes_on(harness):
    model = harness.Model("tiny", device="cpu")
    turns = [
        {"role": "user", "content": ask("4719")},
        {"role": "assistant", "content": [{"type": "text", "value": "4719"}]},
        {"role": "user", "content": [{"type": "text", "value": "Count the digits."}]},
    ]
    assert model.chat_inner(turns) == "4"


class Recorder:
    """Stands in for the engine: keeps what it is asked, or raises."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def chat(self, messages, params):
        self.asked += messages
        if self.error:
            raise self.error
        return SimpleNamespace(text="yes")


def record(harness, monkeypatch, **options):
    recorder = Recorder(**options)
    monkeypatch.setattr(harness, "Engine", SimpleNamespace(from_pretrained=lambda *_, **__: recorder))
    return harness.Model("tiny"), recorder


def test_a_frame_of_a_video_is_one_tile_and_a_picture_has_its_own_number(harness, monkeypatch):
    monkeypatch.setattr(harness, "DATASET_MODALITY", lambda name: "VIDEO" if name == "Video-MME" else "IMAGE")
    model, recorder = record(harness, monkeypatch)
    message = [{"type": "image", "value": "a.png"}, {"type": "video", "value": "a.mp4"}, {"type": "text", "value": "?"}]
    for dataset in ("Video-MME", "MMBench", None):
        assert model.generate_inner(message, dataset) == "yes"
    rest = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]
    assert [turn["content"] for turn in recorder.asked] == [
        [{"type": "image", "image": "a.png", "max_tiles": 1}, *rest],
        [{"type": "image", "image": "a.png"}, *rest],
        [{"type": "image", "image": "a.png"}, *rest],
    ]


@pytest.mark.parametrize("error", [MediaError("no picture"), ContextLengthError("too long")])
def test_a_question_that_cannot_be_asked_is_a_failure_that_is_asked_again(error, harness, monkeypatch, caplog):
    model, _ = record(harness, monkeypatch, error=error)
    assert model.generate_inner(ask("42"), "MMBench") == f"Failed to obtain answer via API. {error}"
    assert f"no answer to a question of MMBench: {error}" in caplog.text


def test_a_fault_of_the_engine_ends_the_run(harness, monkeypatch):
    model, _ = record(harness, monkeypatch, error=StepError("out of memory"))
    with pytest.raises(StepError):
        model.generate_inner(ask("42"))


@pytest.fixture
def run(tmp_path, write_stand_in):
    """Runs the command with what stands in for VLMEvalKit. layout: where its run.py is."""

    def run(*arguments, layout):
        write_stand_in("vlmeval", tmp_path)
        script = tmp_path / "vlmeval" / "run.py"
        (tmp_path / "vlmeval" / "__init__.py").touch()
        if layout == "clone":
            script.rename(tmp_path / "run.py")
        elif layout == "none":
            script.unlink()
        command = [sys.executable, "-m", "internvl_rt.harness.vlmevalkit", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.fast("package")
@pytest.mark.parametrize("layout", ["clone", "package"])
def test_the_command_hands_a_model_and_its_options_to_the_harness(layout, run):
    pictures = [str(SAMPLES / f"{number}.png") for number in NUMBERS[:2]]
    done = run("tiny", "--device", "cpu", "--data", *pictures, layout=layout)
    assert (done.stdout, done.returncode) == ("tiny 4719\ntiny 862053\n", 0), done.stderr
    done = run("tiny", "--device", "cpu", "--max-model-len", "16", "--data", pictures[0], layout=layout)
    assert done.stdout.startswith("tiny Failed to obtain answer via API. the prompt has more than "), done.stderr


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_wrong(run):
    done = run("tiny", "--data", "MMBench", layout="none")
    assert done.returncode == 1
    assert done.stderr.endswith("run.py is missing; install VLMEvalKit from a clone: pip install -e VLMEvalKit\n")
    done = run("tiny", "--max-tiles", "0", "--data", "MMBench", layout="clone")
    assert done.returncode == 2
    assert done.stderr.endswith("argument --max-tiles: expected an integer from 1 to 128, got '0'\n"), done.stderr
    done = run("tiny", "--max-tyles", "1", "--data", "MMBench", layout="clone")
    assert done.stderr.endswith("run.py: error: unrecognized arguments: --max-tyles 1\n")
