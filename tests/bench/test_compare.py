"""The comparison with transformers runs on a tiny shape; its numbers are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = ("first_token_s", "per_token_s", "picture_s")
BENCH = Path(__file__).parents[2] / "bench" / "compare_transformers.py"


@pytest.mark.slow
def test_both_sides_give_the_same_tokens_and_the_last_line_is_json() -> None:
    command = [sys.executable, str(BENCH), "--quick", "--tiles=2", "--tokens=5", "--threads=1"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    result = json.loads(output[-1])
    assert result["equal_tokens"] == result["tokens"] == 5
    assert min(result[side][time] for side in ("ours", "theirs") for time in TIMES) > 0
    assert result["ratio"].keys() == result["ours"].keys() == {*TIMES, "peak_bytes"}
    assert any(line.startswith("time to first token") for line in output)
