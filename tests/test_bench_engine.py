"""The engine's benches, small: that they run to their end and say what they should, not what they measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(BENCH / name), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def test_a_second_question_encodes_nothing_again_and_the_last_line_is_json() -> None:
    result = json.loads(run("reuse.py", "--model=tiny", "--rounds=1", "--goal=0.1", "--fork-goal=100")[-1])
    assert result["tiles_encoded_again"] == 0
    assert min(result["first_s"], result["second_s"], result["one_answer_s"], result["four_answers_s"]) > 0
    assert result["speedup"] == pytest.approx(result["first_s"] / result["second_s"])


def test_the_cost_of_a_step_is_printed_by_part() -> None:
    lines = run("host_cost.py", "--sequences=4", "--steps=20")
    parts = {line[:40].strip(): float(line[40:]) for line in lines if line.startswith("  ")}
    together = parts.pop("together, timed by part")
    assert sum(parts.values()) == pytest.approx(together, abs=0.1 * len(parts))
    assert min(value for part, value in parts.items() if not part.startswith("all else")) > 0
    assert lines[-1].startswith("a step: median ")
