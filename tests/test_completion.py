"""A shell completes commands, options and files by the script that the program prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from internvl_rt import completion
from internvl_rt.cli import main
from internvl_rt.errors import RequestError

# What bash does when somebody presses the tabulator behind these words.
COMPLETE = """
eval "$({python} -m internvl_rt completion bash)"
COMP_WORDS=({words} ""); unset 'COMP_WORDS[-1]'; COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_internvl_rt
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(words: str, cwd: Path) -> set[str]:
    script = COMPLETE.format(python=sys.executable, words=words)
    done = subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.fast("names", "paths")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("internvl-rt ''", {"chat", "info", "doctor", "kernels", "bench", "serve", "completion", "write-random"}),
        ("internvl-rt bench ''", {"vision", "prefill", "decode", "serve", "kernels", "roofline"}),
        ("internvl-rt bench kernels --base", {"--baseline"}),
        ("internvl-rt serve tiny --max-num-", {"--max-num-seqs"}),
        ("internvl-rt chat tiny --image pa", {"page.png"}),
        ("internvl-rt completion ''", {"bash", "fish", "zsh"}),
    ],
    ids=["names", "names of names", "options of names", "options", "paths", "choices"],
)
def test_bash_completes(words: str, found: set[str], tmp_path: Path) -> None:
    (tmp_path / "page.png").touch()
    assert completed(words, tmp_path) >= found


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_the_scripts_of_other_shells_know_the_same(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("write-random", "baseline", "max-num-seqs", "show-tiles"))


def test_what_is_missing_or_unknown_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "cmd"])
    assert "invalid choice: 'cmd'" in capsys.readouterr().err
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"completion needs shtab, .*; pip install 'internvl-rt\[completion\]'"):
        completion.script("bash", lambda of_serve: pytest.fail("it was asked first"))
