"""Who waits for an engine sees on a terminal what it does: bytes of weights, kernels that are built, graphs."""

import os
import pty
import subprocess
import sys
import termios
from typing import Any

from internvl_rt.model import internvl
from internvl_rt.model.internvl import named_parameters
from internvl_rt.steps import executor
from support.calls import load
from support.recorder import Recorder

# Loads an engine whose bar does not wait a second before it shows.
AT_ONCE = """
from internvl_rt import Engine
from internvl_rt.model import internvl
slow = internvl.tqdm
internvl.tqdm = lambda *args, **options: slow(*args, **{**options, "delay": 0, "mininterval": 0})
Engine.from_pretrained("tiny", device="cpu").close()
"""


class Bar:
    """Stands in for tqdm."""

    def __init__(self, items: Any = (), desc: str = "", **options: Any) -> None:
        self.items, self.desc, self.options, self.updates, self.names = items, desc, options, [], []

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(self.items)

    def update(self, count: int) -> None:
        self.updates.append(count)

    def set_postfix_str(self, name: str) -> None:
        self.names.append(name)


def test_loading_counts_every_byte_of_the_weights(monkeypatch: Any) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(internvl, "tqdm", lambda *args, **options: bars.append(Bar(*args, **options)) or bars[-1])
    with load(backend="torch") as engine:
        expected = sum(parameter.nbytes for parameter in named_parameters(engine.model.weights).values())
    (bar,) = bars
    assert sum(bar.updates) == bar.options["total"] == expected > 1_000_000
    assert len(bar.updates) > 10
    assert (bar.options["unit"], bar.options["disable"], bar.desc) == ("B", None, "weights")


def test_capturing_says_what_it_does(monkeypatch: Any) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(executor, "tqdm", lambda *args, **options: bars.append(Bar(*args, **options)) or bars[-1])
    with load(backend="torch") as engine:
        sizes = {"max_num_seqs": 4, "max_model_len": 64, "max_tokens_per_step": 64}
        engine.runner.capture(**sizes, everything=False, capture=Recorder())
    (bar,) = bars
    assert len(bar.names) == len(bar.items)
    for name in (
        *("kernels that are in no graph", "kernels for 13 tiles", "graph of 1 tiles"),
        *("kernels for a decode step of 2 sequences", "graph of a decode step of 4 sequences"),
        *("graph of 1 draws after prompts", "graph of prompts of 64 tokens beside 0 decodes"),
    ):
        assert name in bar.names, bar.names


def test_a_terminal_shows_it_and_a_file_does_not() -> None:
    command = [sys.executable, "-c", AT_ONCE]
    assert b"weights" not in subprocess.run(command, capture_output=True, check=True).stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = b""
    with subprocess.Popen(command, stderr=theirs) as process:
        os.close(theirs)
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
    assert process.returncode == 0
    assert b"weights" in shown
    assert b"B/s" in shown
