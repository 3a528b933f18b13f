"""The scripts in bench/ take arguments in range only, and end with one line whatever the disk and the reader do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def modules(monkeypatch):
    """The scripts' own modules, which are no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    import options
    import report

    from internvl_rt.bench import document

    return document, options, report


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("seconds", "0"), ("seconds", "-1"), ("seconds", "nan"), ("seconds", "inf"), ("seconds", "two"),
        ("count", "0"), ("count", "1e3"), ("count", "1000000000000"), ("count", "9" * 5000),
        ("device", "tpu"), ("device", "nonsense"), ("device", "meta"),
        ("device", "cuda:99"), ("device", "cuda:999"), ("device", "cuda:-1"),
    ],
)  # fmt: skip
def test_a_number_or_device_out_of_range_is_refused(modules, kind, text, capsys):
    _, options, _ = modules
    parser = options.argparse.ArgumentParser()
    parser.add_argument("--it", type=getattr(options, kind))
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args([f"--it={text}"])
    assert exit_.value.code == 2
    assert "argument --it: " in capsys.readouterr().err.splitlines()[-1]


def test_a_script_whose_reader_leaves_or_whose_disk_is_full_ends_without_a_traceback():
    program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); from options import exit_with; "
    program += "exit_with(lambda: print('x' * 1_000_000) or 0)"
    for command, message in (("| head -c 1", ""), ("> /dev/full", "error: [Errno 28] No space left on device\n")):
        arguments = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {command}', sys.executable, program]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (1, message)


def test_a_full_disk_leaves_no_draft_of_a_result(modules, tmp_path, monkeypatch):
    document, _, _ = modules

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        document.save({"schema": 1, "environment": {}, "budget_s": 1, "parts": {}}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_a_page_outside_the_results_links_to_nothing_that_is_missing(modules, tmp_path, monkeypatch):
    _, _, report = modules
    found = {"schema": 1, "environment": {"device": "cpu", "date": "2026-01-01", "device_kind": "cpu"}, "parts": {}}
    file = tmp_path / "out" / "x.json"
    file.parent.mkdir()
    file.write_text(json.dumps(found | {"budget_s": 1}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(file), "--no-plots"])
    for has_guide in (False, True):
        if has_guide:
            (tmp_path / "README.md").touch()
        assert report.main() == 0
        assert ("](../README.md)" in file.with_suffix(".md").read_text()) == has_guide
