"""The command line, as a user types it, gives the right output, exit codes and errors of one line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internvl_rt import Engine
from internvl_rt.cli import main
from internvl_rt.model.internvl import InternVL
from support.configs import QIANFAN_OCR
from support.scripted_text import script

SAMPLES = Path(__file__).parents[1] / "internvl_rt" / "tiny" / "samples"
SAMPLE = SAMPLES / "4719.png"


def run(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "internvl_rt", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_chat_answers_a_question_about_a_picture(capsys):
    assert main(["chat", "tiny", "--image", str(SAMPLE), "Read the digits."]) == 0
    assert capsys.readouterr().out == "4719\n"


def test_the_reasoning_goes_to_stderr_and_leaves_the_answer_alone(capsys, monkeypatch):
    assert main(["chat", "tiny", "--think", "Hello"]) == 2
    assert "think: this model was not trained to reason" in capsys.readouterr().err
    script(monkeypatch, ["so", ".</think>", "\n4", "2"], ["never", " ends"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\nAnd now?\n"))
    asked = []
    original = Engine.stream
    monkeypatch.setattr(
        Engine, "stream", lambda engine, each, *more, **how: asked.append(each) or original(engine, each, *more, **how)
    )
    assert main(["chat", "tiny", "--think", "--ignore-eos", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "42\n\n"
    assert printed.err.endswith("so.\nnever ends")
    assert asked[1][1] == {"role": "assistant", "content": "42"}


def test_timings_go_to_stderr_and_leave_the_answer_alone(capsys):
    assert main(["chat", "tiny", "--timings", "--image", str(SAMPLE), "Read the digits."]) == 0
    printed = capsys.readouterr()
    assert printed.out == "4719\n"
    assert "first token" in printed.err


def test_interactive_chat_keeps_the_conversation_and_survives_mistakes():
    mistakes = ["/image no.png", f"/image {'x' * 5000}", "/what"]
    lines = [f"/image {SAMPLE}", "Read the digits.", *mistakes, "How many digits are there?", "/exit", "Hello"]
    done = run("chat", "tiny", stdin="\n".join(lines))
    assert (done.returncode, done.stdout.split()) == (0, ["4719", "4"])
    assert "image 'no.png' does not exist" in done.stderr
    assert "no command /what" in done.stderr


def test_a_question_that_takes_more_memory_than_there_is_leaves_the_conversation(capsys, monkeypatch):
    def stream(engine, messages, params, **others):
        if any("too much" in str(message) for message in messages):
            raise MemoryError
        return original(engine, messages, params, **others)

    original = Engine.stream
    monkeypatch.setattr(Engine, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"too much\n/image {SAMPLE}\nRead the digits.\n"))
    assert main(["chat", "tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "4719\n"
    assert "memory ran out; this question is forgotten" in printed.err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError("a\nfault")])
def test_a_step_that_fails_is_one_line_and_ends_no_conversation(capsys, monkeypatch, error):
    def fail_once(model, *args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return original(model, *args)

    original, calls = InternVL.run_step, []
    monkeypatch.setattr(InternVL, "run_step", fail_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n/image {SAMPLE}\nRead the digits.\n"))
    assert main(["chat", "tiny", "--ignore-eos", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert "4719" in printed.out
    assert [type(error).__name__ in line for line in printed.err.splitlines()] == [False] * 4 + [True]

    calls.clear()
    assert main(["chat", "tiny", "Hello", "--ignore-eos"]) == 2
    assert capsys.readouterr().err.startswith("internvl-rt: ")


def test_a_part_that_is_missing_leads_to_the_doctor(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "internvl_rt.engine.engine", None)  # as if the compiled part were not built
    assert main(["chat", "tiny", "Hi"]) == 2
    assert "internvl-rt doctor says what is missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["chat"], ["info"], ["doctor"], ["quantize"], ["write-random"]])
def test_help_explains_and_does_not_load_torch(command):
    program = "import sys; from internvl_rt.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", program, *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "internvl-rt" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "./no-such-model", "Hi"], "no-such-model"),
        (["chat", "tiny", "--image", "no.png", "Hi"], "image 'no.png' does not exist"),
        (["chat", "tiny", "--image", str(SAMPLES), "Hi"], "is not a regular file"),
        (["chat", "tiny", "--video", "https://host.test/clip.mp4", "Hi"], "is a URL, which is not fetched"),
        (["chat", "tiny", "--image", __file__, "Hi"], "test_cli.py"),
        (["chat", "tiny", "--temperature", "-1", "Hi"], "temperature must be"),
        (["chat", "tiny", "--device", "tpu", "Hi"], "device must be"),
        (["chat", "tiny", "--v2pe-delta", "0.3", "Hi"], "v2pe_delta"),
        (["chat", "tiny", "--v2pe-delta", "1/0", "Hi"], "expected a power of two from 1 to 1/256, or auto, got '1/0'"),
        (["chat", "tiny", "--max-tiles", "0", "Hi"], "max_tiles"),
        (["info", "internvl3-8b"], "a hub id such as OpenGVLab/InternVL3-8B"),
        (["info", "tiny", "--gpus", "5"], "4 query heads, can be split among at most 4 ranks"),
        (["info", "tiny", "--gpus", "0"], "expected a number above 0, got '0'"),
        (["write-random", "InternVL3-7B", "out"], "InternVL3-7B"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:  # argparse exits by itself
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    *usage, last = printed.err.splitlines()
    assert message in last
    assert not usage or usage[0].startswith("usage: ")
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [["chut"], ["chat"], ["chat", "tiny", "--imagine", "x"], []])
def test_wrong_usage_gives_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: internvl-rt" in capsys.readouterr().err


def test_info_prints_a_card_and_json_for_programs(capsys):
    assert main(["info", "InternVL3-8B"]) == 0
    assert "7,944.4 M" in capsys.readouterr().out
    assert main(["info", "InternVL3-8B", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert main(["info", "InternVL3-8B", "--gpus", "2", "--json"]) == 0
    split = json.loads(capsys.readouterr().out)
    assert (split["parameters"], split["each_gpu"]["num_gpus"]) == (card["parameters"], 2)
    assert round(sum(card["parameters"][part] for part in ("vision", "projector", "decoder")) / 1e9, 3) == 7.944


def test_info_knows_internvls_classes_under_other_names_and_says_why_a_relative_does_not_run(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QIANFAN_OCR))
    assert main(["info", str(tmp_path)]) == 0
    assert "4,741.4 M" in capsys.readouterr().out
    file.write_text(json.dumps(QIANFAN_OCR | {"architectures": ["NVLM_D"]}))
    assert main(["info", str(tmp_path)]) == 2
    assert "which NVLM-D is not: its tiles have tags" in capsys.readouterr().err


def test_interrupt_ends_with_exit_code_130():
    arguments = [sys.executable, "-m", "internvl_rt", "chat", "tiny", "--max-tokens", "20000", "--ignore-eos", "Hello"]
    process = subprocess.Popen(
        [*arguments, "--temperature", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # wait until the answer has begun
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_best_of_prints_the_best_answer_and_tells_the_scores(capsys):
    ask = ["best-of", "tiny", "--image", str(SAMPLE), "Read the digits.", "-n", "3", "--seed", "1"]
    assert main([*ask, "--vote"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("4719\n", "scores: 1.000 1.000 1.000\n")
    assert main([*ask, "--judge", "--all"]) == 0
    printed = capsys.readouterr()
    assert [line.partition("] ")[2] for line in printed.out.splitlines()] == ["4719"] * 3
    wild = ["--temperature", "4", "--max-tokens", "9"]
    assert main([*ask, "--critic", "tiny", "--json", "--system", "Read.", *wild]) == 0
    document = json.loads(capsys.readouterr().out)
    scores = [answer["score"] for answer in document["answers"]]
    assert scores == sorted(scores, reverse=True)
    assert all(answer["score"] == pytest.approx(answer["steps"][0]["score"]) for answer in document["answers"])
    assert {answer["index"] for answer in document["answers"]} == {0, 1, 2}


BAD_BEST_OF = {
    "no way to choose": (["a"], "one of the arguments --critic --judge --vote is required"),
    "two ways": (["a", "--vote", "--judge"], "not allowed with argument"),
    "no prompt": (["--vote"], "expected a PROMPT, got none"),
    "no answers": (["a", "--vote", "-n", "0"], "n must be an integer from 1"),
    "no steps": (["a", "--critic", "tiny", "--max-steps", "0"], "--max-steps: expected a number above 0"),
    "a threshold of a vote": (["a", "--vote", "--stop-score", "0.5"], "--stop-score: expected a number beside"),
    "a threshold that is none": (["a", "--judge", "--stop-score", "nan"], "--stop-score: expected a number beside"),
    "steps of a vote": (["a", "--vote", "--max-steps", "3"], "--max-steps: expected a number above 0 beside --critic"),
    "a device of no critic": (["a", "--vote", "--critic-device", "cpu"], "--critic-device: there is no --critic"),
    "no critic there": (["a", "--critic", "missing"], "'missing': no such folder"),
    "a broken picture": (["a", "--vote", "--image", __file__], "is not a readable JPEG"),
    "a wrong device": (["a", "--critic", "tiny", "--critic-device", "gpu"], "device must be auto, cpu"),
}


@pytest.mark.parametrize("wrong", BAD_BEST_OF)
def test_a_mistake_in_best_of_is_one_line(capsys, wrong):
    given, message = BAD_BEST_OF[wrong]
    try:
        code = main(["best-of", "tiny", *given])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert message in printed.err.splitlines()[-1]
