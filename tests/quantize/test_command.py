"""`internvl-rt quantize`, as a user types it: a table, a document, errors of one line, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from internvl_rt.cli import main
from internvl_rt.quantize import quantising
from internvl_rt.quantize.questions import SAMPLES

W4 = ["quantize", "tiny", "--scheme", "w4a16", "--group-size", "32", "--device", "cpu"]


def test_a_table_says_what_it_costs_and_the_folder_answers(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([*W4, out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "error", "without", "a", "search"]
    rows = [line.split() for line in lines[1:5]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(float(row[1].strip("%")) < float(row[2].strip("%")) for row in rows)
    assert lines[5] == f"{out}: 1.4 MiB, dense 2.2 MiB"
    assert lines[6].startswith("greedy answers: 6 of 6 are those of the dense model; 27 of 27 tokens")
    assert main(["chat", out, "--image", str(SAMPLES / "4719.png"), "Read the digits."]) == 0
    assert capsys.readouterr().out == "4719\n"


def test_json_is_one_document(tmp_path, capsys):
    assert main(["quantize", "tiny", str(tmp_path / "out"), "--scheme", "fp8", "--no-compare", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(tmp_path / "out")
    assert document["num_bytes"] < document["dense_bytes"]
    assert (document["layers"], document["agreement"]) == ([], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int3"], "invalid choice: 'int3'"),
        ([], "required: --scheme"),
        (["--scheme", "w4a16", "--group-size", "100"], "invalid choice: 100 (choose from 32, 64, 128)"),
        (["--scheme", "fp8", "--group-size", "64"], "group_size is of scheme 'w4a16' alone"),
        (["--scheme", "fp8", "--no-compare", "--calibration", "no-such"], "fp8 without compare runs no prompts"),
        (["--scheme", "w4a16", "--calibration", "no-such"], "'no-such' is no folder"),
        (["--scheme", "w4a16", "--device", "tpu"], "device must be"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    try:
        code = main(["quantize", "tiny", str(tmp_path / "out"), *arguments])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_says_where_it_goes_on(error, tmp_path, capsys, monkeypatch):
    original = quantising.Unfinished.finish_layer

    def stop(self, report):
        original(self, report)
        raise error

    monkeypatch.setattr(quantising.Unfinished, "finish_layer", stop)
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert main([*W4, str(tmp_path / "out")]) == code
    printed = capsys.readouterr().err
    assert f"what is written so far stays in {tmp_path / '.out-unfinished'}; the same command goes on" in printed
    assert ("No space left" in printed) == (code == 2)
    assert "Traceback" not in printed
    monkeypatch.undo()
    assert main([*W4, str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_interrupt_of_the_comparison_leaves_the_whole_folder_and_its_table(more, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantising, "compare_answers", stop)
    assert main([*W4, *more, str(tmp_path / "out")]) == 130
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out'} is whole; only the comparison of answers is missing" in printed.err
    assert (f"{tmp_path / 'out'}: 1.4 MiB" in printed.out) == (not more)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_is_told_where_stderr_is_no_terminal(tmp_path, capsys):
    assert main([*W4, "--no-compare", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quantise: ")]
    assert [line.split(" error ")[0] for line in lines] == [f"quantise: layer {n} of 4" for n in (1, 2, 3, 4)]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_complete_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "internvl_rt", *W4, "--no-compare", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / ".out-unfinished" / "state.json"
    while process.poll() is None and not (state.exists() and '"decoder.layers.0."' in state.read_text()):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out").exists() != (tmp_path / ".out-unfinished").exists() or process.returncode == 0
    if not (tmp_path / "out").exists():
        assert subprocess.run(command, capture_output=True, check=True).stdout
    assert (tmp_path / "out" / "config.json").exists()
    assert not state.parent.exists()
