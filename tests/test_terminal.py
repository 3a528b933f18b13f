"""Whatever the streams, the encoding, the disk or the moment of Ctrl-C: the program ends with one line."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from internvl_rt.checkpoint.config import KNOWN_MODELS
from internvl_rt.cli import main

SAMPLE = Path(__file__).parents[1] / "internvl_rt" / "tiny" / "samples" / "4719.png"
PROGRAM = [sys.executable, "-m", "internvl_rt"]


def shell(command, *, stdin=b"", **environment):
    """Runs a command line of bash, in which `$RUN` is the program; returns exit code, stdout and stderr."""
    variables = {"RUN": f"{sys.executable} -m internvl_rt", "PYTHONUNBUFFERED": "", **environment}
    done = subprocess.run(
        ["bash", "-c", command], input=stdin, capture_output=True, timeout=120, check=False, env=os.environ | variables
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert b"Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "backslashreplace")


# This ends before torch is imported.
CHEAP = "$RUN info nosuch"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (f"{CHEAP} <&-", 2, "no such folder"),
        (f"{CHEAP} >&-", 2, "stdout is closed, so no answer can be printed"),
        (f"{CHEAP} 2>&-", 2, ""),
        (f"{CHEAP} 2>/dev/full", 2, ""),
        (f"{CHEAP} <&- >&- 2>&-", 2, ""),
        ("$RUN chat --help >/dev/full", 2, "No space left on device"),
        ("PYTHONUNBUFFERED=1 $RUN chat --help >/dev/full", 2, "No space left on device"),
        ("PYTHONUNBUFFERED=1 $RUN --version >/dev/full", 2, "No space left on device"),
        ("$RUN chat --help >&-", 2, "stdout is closed"),
        ("$RUN chat tiny <&-", 2, "stdin is closed, so no question can be read from it; give a PROMPT"),
        ("$RUN chat tiny $'caf\\xe9'", 2, "PROMPT is not valid utf-8 at 'caf\\udce9'"),
        ("$RUN chat tiny --system $'caf\\xe9' Hi", 2, "--system is not valid utf-8"),
        ("$RUN chat tiny --image $'caf\\xe9.png' Hi", 2, "image 'caf\\udce9.png' does not exist"),
        ("$RUN chat $'caf\\xe9\\e[2J' Hi", 2, "'caf\\udce9\\x1b[2J': no such folder"),
        ("$RUN chat tiny --image ~nobody-here/x.png Hi", 2, "image '~nobody-here/x.png' does not exist"),
        ("$RUN chat tiny --max-tokens 0 Hi", 2, "max_tokens must be"),
        ("$RUN chat tiny --seed -1 Hi", 2, "seed must be"),
        ("$RUN chat tiny --seed $(printf '9%.0s' {1..5000}) Hi", 2, "invalid int value: '999"),
        (
            "$RUN chat tiny --imagine $'\\e[2J\\nsecond line' Hi",
            2,
            "unrecognized arguments: --imagine \\x1b[2J\\nsecond",
        ),
        ("$RUN $'chat\\n\\e[2J'", 2, "invalid choice: 'chat\\n\\x1b[2J'"),
        ("$RUN write-random InternVL3-1B /dev/null/x", 2, "'/dev/null'"),
        ("$RUN write-random InternVL3-1B $(printf 'x%.0s' {1..5000})", 2, "File name too long"),
        ("$RUN write-random nosuch there", 2, "none of the known models"),
    ],
)
def test_what_the_system_or_an_argument_gets_wrong_is_one_line(command, code, message):
    found, stdout, stderr = shell(command, LC_ALL="C.UTF-8")
    assert (found, stdout) == (code, b"")
    *usage, last = stderr.splitlines() or [""]
    assert message in last
    assert len(last) < 2500
    assert not usage or usage[0].startswith("usage: ")


def test_what_a_library_warns_of_is_not_printed_beside_the_one_line(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")  # Pillow warns, too
    code, _, stderr = shell(f"$RUN chat tiny --image {tmp_path}/large.png Hi")
    assert code == 2
    assert "raise max_pixels" in stderr
    assert stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    code, _, stderr = shell("$RUN chat --help | true; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="")
    assert stderr == ""
    assert code in (0, 1)  # 0 if the help was written before the reader left


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_cannot_show_the_output_gets_escape_sequences(tmp_path, monkeypatch, encoding):
    folder = tmp_path / "模型"
    folder.mkdir()
    (folder / "config.json").write_text(KNOWN_MODELS["InternVL3-1B"].read_text())
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    codes = [main(["info", str(folder)]), main(["info", str(folder / "no")])]
    shown = "模型" if encoding == "utf-8" else "\\u6a21\\u578b"
    assert codes == [0, 2]
    assert all(shown in stream.buffer.getvalue().decode(encoding) for stream in streams.values())


def test_a_conversation_survives_bytes_that_are_no_text_and_every_mistake(tmp_path):
    (tmp_path / "broken.png").symlink_to("nowhere")
    lines = [
        *(b"/image", b"/image ", b"/image " + b"x" * 100_000, b"/image \0", b"/image ~nobody/x", b"/image caf\xe9.png"),
        *(
            b"/image " + bytes(tmp_path),
            b"/image " + bytes(tmp_path / "broken.png"),
            b"/image /dev/zero",
            b"/what\x1b[2J",
        ),
        *(b"/image " + bytes(SAMPLE), b"caf\xe9?", b"Read the digits.", b"", b"   ", b"/reset now", b"/video nothing"),
    ]
    code, stdout, stderr = shell("$RUN chat tiny", stdin=b"\n".join(lines), PYTHONIOENCODING="ascii")
    assert (code, stdout) == (0, b"4719\n")
    assert "/image needs the name of a file: /image FILE" in stderr
    assert "the question is not valid" in stderr
    assert "no command /what\\x1b[2J" in stderr
    assert "\x1b" not in stderr
    assert max(map(len, stderr.splitlines())) < 600


# Sends SIGINT to itself when a module is first looked for; then the import swallows the exception, as some do in C.
INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.getpid()
            except BaseException:
                pass
sys.meta_path.insert(0, Finder)
sys.argv = ["internvl-rt", "chat", "tiny", "Hi"]
from internvl_rt.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module",
    ["internvl_rt.cli", "argparse", "internvl_rt.inputs.sampling_params", "internvl_rt.checkpoint.find", "torch"],
)
def test_ctrl_c_while_modules_are_imported_ends_the_program(module):
    arguments = [sys.executable, "-c", INTERRUPTED.format(module=module)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_ctrl_c_at_the_prompt_of_a_conversation_does_not_end_it():
    main_side, program_side = pty.openpty()
    process = subprocess.Popen([*PROGRAM, "chat", "tiny"], stdin=program_side, stdout=program_side, stderr=program_side)
    os.close(program_side)

    def read_until(text, meanwhile=lambda: None):
        seen, end_s = b"", time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end_s, seen
            if select.select([main_side], [], [], 1)[0]:
                seen += os.read(main_side, 1000)
            else:
                meanwhile()

    try:
        read_until(b"> ")
        interrupt = partial(process.send_signal, signal.SIGINT)
        interrupt()  # is noticed with the next key only, if it comes just before the terminal is waited for
        read_until(b"/exit or Ctrl-D ends", meanwhile=interrupt)
        os.write(main_side, f"/image {SAMPLE}\nRead the digits.\n".encode())
        read_until(b"4719\r\n")
        os.write(main_side, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main_side)


@pytest.mark.parametrize(
    "arguments",
    [
        "chat nosuch Hi",
        "info nosuch",
        "bench decode nosuch",
        "bench decode random:nosuch",
        "chat tiny --temperature 500 Hi",
    ],
)
def test_a_wrong_name_or_option_is_told_before_torch_is_imported(arguments):
    program = "import sys; from internvl_rt.cli import main; print(main(), {'torch', 'numpy'} & sys.modules.keys())"
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "2 set()\n", done.stderr
