"""The comparison on a CPU: its page from invented numbers, the order of its visits, a run of ours on a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.result_schema import violations
from support.results import ENVIRONMENT, part

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import compare_cpu
import cpu_page
from cpu_runtimes import RUNTIMES

from internvl_rt.bench.document import load, save

Row = dict[str, Any]
BENCH = Path(__file__).parents[2] / "bench"
PICTURE, STEP, PEAK = "first_picture_s", "per_token_1_s", "peak_bytes"


def row(side: str, dtype: str, picture_s: float = 1.0, **numbers: Any) -> Row:
    found = {"side": side, "runtime": side.partition("-")[0], "dtype": dtype, "version": f"{side} 1.0", "threads": 2}
    found |= {
        PICTURE: picture_s,
        "first_picture_median_s": picture_s * 1.1,
        "first_text_s": 0.5,
        STEP: 0.1,
        "per_token_16_s": 0.4,
        "load_s": 2.0,
        "loaded_bytes": 2e9,
        PEAK: 3e9,
    }
    return found | numbers


def page(*rows: Row, model: str = "InternVL3-1B") -> str:
    document = part("compare_cpu", [{"side": "settings", "model": model, "rounds": 4}, *rows])["document"]
    return cpu_page.render(document)


def test_each_number_in_which_a_peer_is_better_gets_a_sentence_with_both_numbers() -> None:
    ours = row("ours-float32", "float32")
    found = page(ours, row("llama.cpp-float32", "float32", 0.8, **{STEP: 0.05, PEAK: 4e9}))
    assert (
        "llama.cpp in float32 takes 0.8 s to the first token of a prompt with a picture, and we take 1 s:"
        " 1.25 times as much." in found
    )
    assert "llama.cpp in float32 takes 50 ms for a step of 1 sequence, and we take 100 ms: 2.00 times" in found
    assert found.count("and we take") == 2


def test_a_peer_is_compared_at_its_own_precision() -> None:
    found = page(
        row("ours-float32", "float32"), row("ours-bfloat16", "bfloat16", 0.4), row("t-bfloat16", "bfloat16", 0.5)
    )
    assert "and we take" not in found
    assert "No peer that was measured is better than ours in the same precision in any number." in found


def test_without_peers_the_page_does_not_say_that_none_is_better() -> None:
    found = page(row("ours-float32", "float32"))
    assert "No peer was measured" in found
    assert "No peer that was measured is better" not in found


def test_a_side_that_was_left_out_is_named_with_its_reason() -> None:
    found = page(row("plain", "float32"), {"side": "openvino-bfloat16", "left_out": "no bfloat16 on this processor"})
    assert "Not measured: openvino-bfloat16: no bfloat16 on this processor." in found


def test_goals_are_met_or_missed_by_ours_over_plain() -> None:
    ours = row("ours-auto", "bfloat16", 0.29, **{STEP: 0.08, PEAK: 2.9e9})
    beside = row("ours-auto", "bfloat16", 0.8, beside="one busy core", **{STEP: 0.1})
    found = page(ours, row("plain", "float32"), row("transformers-bfloat16", "bfloat16"), beside)
    goals = {line.split(" | ")[0]: line for line in found.partition("## Goals")[2].splitlines()}
    assert goals["| first token, picture, of plain's"].endswith("| 0.3 | 0.29 | met |")
    assert goals["| step of 1 sequence, of plain's"].endswith("| 0.75 | 0.80 | **missed** |")
    assert goals["| peak memory, of transformers' in the same precision"].endswith("| 1 | 0.97 | met |")
    assert goals["| first token, picture, beside one busy core"].endswith("| 2.5 | 2.76 | **missed** |")
    (missed,) = (line for line in found.splitlines() if line.startswith("Goals missed: "))
    assert missed.count(";") == 2  # the step of 16 too, which takes as long as plain's
    assert "step of 16 sequences, of plain's" in missed


def test_a_goal_without_its_numbers_is_not_measured() -> None:
    found = page(row("ours-auto", "float32"))
    assert "| peak memory, of transformers' in the same precision | 1 |  | not measured |" in found


def test_a_page_of_the_tiny_shape_says_that_it_measures_nothing() -> None:
    assert "measures nothing" in page(row("plain", "float32"), model="quick")
    assert "measures nothing" not in page(row("plain", "float32"))


def test_equal_tokens_are_counted_up_to_the_first_that_differs() -> None:
    ours = {"picture": [1, 2, 3], "0 of 1": [4, 5]}
    found = compare_cpu.equal_tokens({}, {"picture": [1, 9, 3], "0 of 1": [4, 5]}, ours)
    assert found == {"equal_tokens": 3, "of_tokens": 5}


def test_sides_are_visited_in_turn_and_then_backwards_and_one_that_fails_is_not_visited_again() -> None:
    sides, order = compare_cpu.SIDES[:3], list[str]()

    def ask(side: compare_cpu.Side) -> Row:
        order.append(side.name)
        if side is sides[1]:
            raise compare_cpu.SideError("not installed")
        return {"visit": len(order)}

    left_out = {}
    visits = compare_cpu.measure(sides, 2, ask, left_out)
    first, second, third = (side.name for side in sides)
    assert order == [first, second, third, third, first]
    assert visits == {first: [{"visit": 1}, {"visit": 5}], third: [{"visit": 3}, {"visit": 4}]}
    assert left_out == {second: "not installed"}


def test_a_converter_that_fails_is_run_once_for_both_precisions_and_its_last_line_is_the_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"  # counts its calls
    python.write_text(f"#!/bin/sh\necho call >> {tmp_path}/calls\necho 'RuntimeError: no such model' >&2\nexit 3\n")
    python.chmod(0o755)
    args = compare_cpu.parse([f"--peer-python={python}"])
    for side in (side for side in compare_cpu.SIDES if side.runtime == "openvino"):
        with pytest.raises(compare_cpu.SideError, match=r"converted: RuntimeError: no such model \(exit code 3\)"):
            compare_cpu.convert(side, tmp_path, args)
    assert (tmp_path / "calls").read_text() == "call\n"


def test_a_row_has_the_best_and_the_median_of_all_visits() -> None:
    known = {"dtype": "float32", "version": "1", "threads": 2, "tokens": {}}
    visits = [
        {**known, PICTURE: [3.0, 2.0], STEP: [0.2, 0.4, 0.3], "load_s": 5.0, "loaded_bytes": 7, PEAK: 9},
        {**known, PICTURE: [4.0, 5.0], STEP: [0.1, 0.5, 0.6], "load_s": 4.0, "loaded_bytes": 8, PEAK: 8},
    ]
    found = compare_cpu.summarise(compare_cpu.SIDES[0], visits)
    assert (found[PICTURE], found["first_picture_median_s"]) == (2.0, 3.5)
    assert (found[STEP], found["per_token_1_median_s"]) == (0.1, pytest.approx(0.35))
    assert (found["load_s"], found["loaded_bytes"], found[PEAK]) == (4.0, 8, 9)


def test_every_side_has_a_runtime() -> None:
    assert {side.runtime for side in compare_cpu.SIDES} == RUNTIMES.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "expected a number from 1 to a million"),
        (["--sides", "vllm"], "invalid choice: 'vllm'"),
        (["--llama-cpp", "/"], "/ has no convert_hf_to_gguf.py"),
        (["--peer-python", "/nowhere/python"], "/nowhere/python is no program"),
    ],
)
def test_a_wrong_argument_is_told(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_cpu.parse(arguments)
    assert complaint in capsys.readouterr().err


def test_a_page_is_written_again_from_its_file_and_refuses_other_results(tmp_path: Path) -> None:
    kept = part("compare_cpu", [{"side": "settings", "model": "InternVL3-1B"}, row("plain", "float32")])
    path = tmp_path / "results.json"
    document = {"schema": 1, "environment": ENVIRONMENT, "budget_s": 0, "parts": {"compare_cpu": kept}}
    save(document, path)
    assert not violations(load(path))
    assert "plain" in cpu_page.write_page(path).read_text()
    save(document | {"parts": {}}, path)
    with pytest.raises(cpu_page.DocumentError, match="expected a result of bench/compare_cpu"):
        cpu_page.write_page(path)


@pytest.mark.slow
def test_ours_is_measured_beside_a_busy_core_and_a_peer_that_is_missing_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "compare_cpu.py"), "--quick", "--busy", "--rounds=1", "--threads=1"]
    command += [
        "--steps=3",
        "--rows",
        "1",
        "2",
        f"--out={tmp_path}",
        "--sides",
        "ours-auto",
        "plain",
        "llama.cpp-float32",
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    result = json.loads(output[-1])
    (file,) = tmp_path.glob("*.json")
    assert not violations(load(file))
    assert load(file)["parts"]["compare_cpu"]["document"] == result
    assert "Not measured: llama.cpp-float32: " in file.with_suffix(".md").read_text()
    rows = {(row["side"], row.get("beside")): row for row in result["rows"]}
    for side in ("ours-auto", "plain"):
        for beside in (None, "one busy core"):
            assert min(rows[side, beside][key] for key in (PICTURE, "first_text_s", STEP, "per_token_2_s")) > 0
    assert any(line.startswith("first token, picture, beside one busy core") for line in output)
