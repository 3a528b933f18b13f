"""Benches of the engine, the cache and loading run small to their end; their numbers are not tested."""

import copy
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from internvl_rt.model.random_checkpoint import write_random_checkpoint
from support.configs import ORIGINAL
from support.rank_processes import wait_until

MARK = "INTERNVL_RT_TEST_MARK"
BENCH = Path(__file__).parents[2] / "bench"


def run(name: str, *arguments: str, exit_codes: tuple[int, ...] = (0,), mark: str = "") -> list[str]:
    """mark: of the environment of the process and of those that it starts."""
    command = [sys.executable, str(BENCH / name), *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env={**os.environ, MARK: mark})
    assert done.returncode in exit_codes
    return done.stdout.splitlines()


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_a_step_costs_because_it_crosses_ranks_is_printed_and_no_process_is_left(tmp_path: Path) -> None:
    lines = run("rank_crossing.py", "--ranks=2", "--sequences=3", "--steps=4", mark=str(tmp_path))
    wait_until(lambda: not marked(str(tmp_path)))
    assert lines[0].endswith("on a CPU, by gloo; NCCL is not measured")
    values = [(line[:46].strip(), float(line[46:])) for line in lines if line.startswith("  ")]
    assert all(value > 0 for part, value in values if not part.startswith("from then"))
    assert [part for part, _ in values] == [
        *("write it", "send it"),
        *("write it", "send it", "from then until the last rank has it", "read it") * 2,
        *("8 sums of 3 x 128", "gather of 3 x 208 logits a rank", "share of 3 tokens", "together"),
        *("1 rank", "2 ranks"),
    ]


@pytest.mark.fast("5-at most 4 ranks")
@pytest.mark.parametrize(("ranks", "message"), [("1", "give 2 or more"), ("5", "at most 4 ranks")])
def test_ranks_that_cannot_be_are_refused_in_one_line(ranks: str, message: str) -> None:
    command = [sys.executable, str(BENCH / "rank_crossing.py"), "--ranks", ranks]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def marked(mark: str) -> list[Path]:
    """Returns the processes in whose environment, or in that of an ancestor, this mark was set."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(entry)
    return found


def test_products_of_each_kind_of_weight_are_timed() -> None:
    *table, last = run("quantised_products.py", "--model=tiny", "--rows", "1", "65", "--rounds=2")
    seconds = json.loads(last)["seconds"]
    kinds = ["bfloat16", "int8", "fp8", "4 bits (128)", "4 bits (32, zeros)"]
    assert {rows: list(times) for rows, times in seconds.items()} == {rows: [*kinds, "lm_head"] for rows in ("1", "65")}
    for index, times in enumerate(seconds.values()):
        assert min(times.values()) > 0
        line = next(line for line in table[6 * index :] if "int8" in line)
        assert line.endswith(f"{(times['int8'] + times['lm_head']) / (times['bfloat16'] + times['lm_head']):.2f}")


@pytest.mark.slow
def test_loading_is_measured_against_its_bound(tmp_path: Path) -> None:
    config = copy.deepcopy(ORIGINAL)
    config["llm_config"] |= {"num_hidden_layers": 1, "vocab_size": 30_000}
    config["vision_config"]["num_hidden_layers"] = 1
    write_random_checkpoint(config, tmp_path / "model", seed=0)
    result = json.loads(
        run("load_memory.py", f"--folder={tmp_path / 'model'}", "--dtype=bfloat16", exit_codes=(0, 1))[-1]
    )
    assert result["bfloat16"]["weight_bytes"] > 100e6
    assert result["bfloat16"]["peak_bytes"] > 0.5 * result["bfloat16"]["weight_bytes"]


@pytest.mark.slow
def test_the_books_of_the_cache_are_measured_from_both_languages(tmp_path: Path) -> None:
    out = tmp_path / "kv_cache.json"
    lines = run(
        "kv_cache.py", "--runs=1", "--python-runs=1", f"--out={out}", exit_codes=(0, 1)
    )  # 1: the bench missed a target
    assert any("append to 256 sequences (Python)" in line for line in lines)
    assert json.loads(out.read_text())
