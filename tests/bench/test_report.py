"""Result files: the schema, the page, the pictures and comparisons of two files; all numbers are invented."""

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from support.result_schema import violations
from support.results import build_results, environment, part

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import compare
import report
from matplotlib import pyplot as plt

from internvl_rt.bench import plots
from internvl_rt.bench.document import DocumentError, load, parse_last_line, save

Results = dict[str, Any]
MEASURED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/*.json"))
DRAW = {"roofline": plots.draw_roofline, "batch": plots.draw_batch, "prompt": plots.draw_prompt}


@pytest.fixture
def results() -> Results:
    return build_results()


def write(document: Results, path: Path) -> Path:
    path.write_text(json.dumps(document))
    return path


def run(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return main()


# The schema


def test_results_are_valid_and_survive_the_disk(results: Results, tmp_path: Path) -> None:
    assert not violations(results)
    save(results, tmp_path / "new" / "folder.json")
    assert load(tmp_path / "new" / "folder.json") == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder.json"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r.pop("environment"), "$: 'environment' is a required property"),
        (lambda r: r.update(schema=2), "$.schema: 1 was expected"),
        (lambda r: r.update(note="x"), "$: Additional properties are not allowed ('note' was unexpected)"),
        (lambda r: r["environment"].update(device_kind="tpu"), "$.environment.device_kind: "),
        (lambda r: r["environment"].update(date="yesterday"), "$.environment.date: "),
        (lambda r: r["parts"]["build"].update(status="fine"), "$.parts.build.status: "),
        (lambda r: r["parts"]["build"].update(wall_s=-1), "$.parts.build.wall_s: "),
        (lambda r: r["parts"]["build"].update(exit_code=True), "$.parts.build.exit_code: "),
        (
            lambda r: r["parts"]["kernels"]["document"]["rows"][0].update(median_us=None),
            "$.parts.kernels.document.rows[0].median_us: ",
        ),
    ],
)
def test_the_schema_refuses_what_is_wrong(results: Results, change: Callable[[Results], object], place: str) -> None:
    change(results)
    (found,) = violations(results)
    assert found.startswith(place)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_every_result_that_was_kept_is_what_the_schema_allows(path: Path) -> None:
    assert not violations(load(path))


def test_a_draft_that_is_wrong_does_not_replace_the_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(results, path)
    with pytest.raises(DocumentError):
        save({**results, "schema": 0}, path)
    assert load(path) == results


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"rows": [1]}, r"rows: expected a list of objects, got '\[1\]'"),
        ({"rows": "none"}, "rows: expected a list of objects, got 'none'"),
    ],
)
def test_a_document_is_read_if_programs_can_use_it(
    results: Results, change: dict[str, Any], complaint: str | None
) -> None:
    document = results["parts"]["kernels"]["document"] | change
    with pytest.raises(DocumentError, match=complaint) if complaint else nullcontext():
        assert parse_last_line([json.dumps(document)]) == document


@pytest.mark.parametrize("last", ["measured 3 things", "{}", '{"part": "decode", "rows": NaN}', "[1]", ""])
def test_a_bench_ends_with_a_document_or_has_no_result(last: str) -> None:
    with pytest.raises(DocumentError):
        parse_last_line(["a table", last, ""])


# The page


def test_the_page_says_which_kernel_is_furthest_from_its_roof_and_why(results: Results) -> None:
    page = report.render(results)
    assert (
        "Furthest from its roof: `sample/vocab_151674_16_rows/bfloat16` at 30 % of it. Memory bandwidth bounds" in page
    )
    assert "10 MB take 2.5 us at the least, and it takes 8.333 us" in page
    assert "1 of 11 cases are bound by their launch instead" in page  # it is a norm of one row, at 1 % of its roof
    assert "`decode/InternVL3-1B/1x2048/bfloat16` at 64 % of it, bound by memory bandwidth" in page


def test_an_operation_is_shown_by_its_worst_case_beside_its_best_baseline(results: Results) -> None:
    rows = results["parts"]["kernels"]["document"]["rows"]
    name = "gemv/1b_gate_up_1_rows/bfloat16"
    rows += [{"name": name, "baseline": "cublas alone", "partial": True, "median_us": 1.0}]
    rows += [{"name": name, "baseline": "better", "median_us": 4.722}]
    table = {row["furthest case"]: row for row in report.by_operation(rows, report.measured_roof(results))}
    assert table[f"`{name}`"]["best baseline"] == "better"
    assert table[f"`{name}`"]["times faster"] == pytest.approx(0.5, rel=1e-3)
    assert next(iter(table.values()))["% of roof"] == 30
    assert list(table.values())[-1]["bound by"] == "launch"
    assert len(table) == 9


def test_goals_are_held_missed_or_not_measured(results: Results) -> None:
    lines = {line.split(" | ")[0]: line for line in report.render(results).splitlines()}
    assert lines["| decode step of the 1B, batch 1, context 2k"].endswith("| 0.3668 ms | held |")
    assert lines["| decode step of the 8B, batch 1, context 2k"].endswith("| 4.389 ms | missed |")
    assert lines["| InternViT-6B, 13 tiles"].endswith("|  | not measured |")
    assert lines["| prefill of 3,392 tokens on the 8B"].endswith("| 82.31 ms | held |")
    assert lines["| norms of 64 MB and more, of the measured roof"].endswith("| 86 % | missed |")
    assert lines["| ViT attention, 13 tiles, against torch's best SDPA"].endswith("| 1.3 x | held |")
    assert lines["| time per token of the 1B against transformers"].endswith("| 35 x | held |")


def test_a_goal_for_the_gpu_is_not_measured_on_a_cpu(results: Results) -> None:
    results["environment"] = environment(device="some CPU", device_kind="cpu")
    page = report.render(results)
    assert "**Run at small settings on a CPU: it shows that everything runs, and measures nothing.**" in page
    assert "| held |" not in page
    assert "| missed |" not in page


def test_a_goal_is_neither_held_nor_missed_on_a_device_that_it_was_not_set_for(results: Results) -> None:
    results["environment"] = environment(device="Imaginary A100")
    page = report.render(results)
    assert "| decode step of the 8B, batch 1, context 2k | at most 4.2 ms | 4.389 ms | on another device |" in page
    assert "| missed |" not in page


def test_an_h100_has_goals_of_its_own(results: Results) -> None:
    results["environment"] = environment(device="Imaginary H100")
    page = report.render(results)
    assert "| goal, on an H100 |" in page
    assert "| decode step of the 8B, batch 1, context 2k | at most 6 ms | 4.389 ms | held |" in page


def test_a_page_begins_with_what_is_proven(results: Results) -> None:
    passed = 900 + 5 + 30
    assert report.render(results).splitlines()[2].startswith(f"Proven: {passed} tests passed")


def test_the_page_of_a_failure_begins_with_it(results: Results) -> None:
    rows = [{"name": "gemv", "passed": 40, "failed": 2, "errors": 0, "first": "rows_1/float16"}]
    results["parts"]["contract"] = part("tests", rows, status="failed", reason="gemv: 2 failed")
    results["parts"]["vision_1b"] = {"status": "stopped", "reason": "its time was up"}
    head = report.render(results).partition("## Goals")[0]
    assert head.splitlines()[2].startswith("**Not all is proven: contract (failed: gemv: 2 failed).** 75 tests passed.")
    assert "Unproven operations: `gemv` (2 of 42 tests failed, rows_1/float16 the first)." in head
    assert "Parts that failed or ran out of time: vision_1b (stopped: its time was up)." in head
    assert "**Failed: gemv: 2 failed.**" in report.render(results)


def test_a_page_without_tests_says_that_nothing_is_proven(results: Results) -> None:
    results["parts"]["contract"] = {"status": "stopped", "reason": "its time was up"}
    head = report.render(results)
    assert "**Not all is proven: contract (stopped: its time was up).**" in head
    assert "Unproven operations: all (contract did not run to its end)." in head


def test_text_of_others_cannot_break_a_table(results: Results) -> None:
    results["parts"]["serve_1b"]["reason"] = "a | b\nc"
    assert "a \\| b c |" in report.render(results)


# The pictures


def test_one_command_writes_page_and_pictures(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(results, tmp_path / "run.json")
    assert run(report.main, monkeypatch, path) == 0
    page = path.with_suffix(".md").read_text()
    for name in DRAW:
        picture = tmp_path / f"run-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in page
        height, width, _ = plt.imread(picture).shape
        assert 400 < height < width < 1500


@pytest.mark.parametrize("name", DRAW)
def test_no_label_of_a_picture_covers_another(name: str, results: Results) -> None:
    figure = DRAW[name](results)
    assert figure is not None
    figure.canvas.draw()
    for axes in figure.axes:
        texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]
        boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
        assert not [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
        assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes.values())
    plt.close(figure)


def test_every_kernel_is_on_the_roofline_and_none_is_above_it(results: Results) -> None:
    figure = plots.draw_roofline(results)
    assert figure is not None
    (axes,) = figure.axes
    _, labels = axes.get_legend_handles_labels()
    rows = results["parts"]["kernels"]["document"]["rows"]
    assert {row["name"].partition("/")[0] for row in rows} <= set(labels)
    points = [
        (x, y)
        for line in axes.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]
    assert len(points) == len(rows)
    assert all(y <= x * 4.0 for x, y in points)
    plt.close(figure)


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_nothing_is_drawn_of_what_was_not_measured(draw: Callable[[Results], object], results: Results) -> None:
    results["parts"] = {"build": results["parts"]["build"]}
    assert draw(results) is None


# The comparison of two files


def scaled(results: Results, factor: float, name: str) -> Results:
    changed = copy.deepcopy(results)
    for each in changed["parts"].values():
        for row in each.get("document", {}).get("rows", []):
            if row.get("name", "").startswith(name):
                row.update({key: value * factor for key, value in row.items() if key.endswith(("_us",))})
    return changed


@pytest.mark.parametrize(
    ("factor", "exit_code", "verdict"), [(1.5, 1, "SLOWER"), (0.5, 0, "faster"), (1.02, 0, "0 slower, 0 faster")]
)
def test_a_change_counts_where_the_spreads_do_not_overlap(
    factor: float,
    exit_code: int,
    verdict: str,
    results: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = write(results, tmp_path / "old.json")
    new = write(scaled(results, factor, "vit_attention/vit_6b"), tmp_path / "new.json")
    assert run(compare.main, monkeypatch, old, new) == exit_code
    assert verdict in capsys.readouterr().out


def test_the_bounds_of_a_ratio_come_from_both_spreads(results: Results) -> None:
    changes = {change.name: change for change in compare.compare(results, scaled(results, 2, "gemv/8b"))}
    change = changes["kernels: gemv/8b_gate_up_1_rows/bfloat16"]
    assert change.ratio == pytest.approx(2)
    assert (change.low, change.high) == (pytest.approx(2 * 0.98 / 1.03), pytest.approx(2 * 1.03 / 0.98))
    assert "kernels: gemv/8b_gate_up_1_rows/bfloat16 what torch does" in changes


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(environment=environment(device="another")), "of the same device, got 'Imaginary H200'"),
        (lambda r: r.update(environment=environment(device_kind="cpu")), "of the same device_kind"),
        (lambda r: r.update(parts={"build": r["parts"]["build"]}), "expected rows in common"),
        (lambda r: r.pop("parts"), "got an object without parts"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(
    change: Callable[[Results], object],
    complaint: str,
    results: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = write(results, tmp_path / "old.json")
    change(results)
    assert run(compare.main, monkeypatch, old, write(results, tmp_path / "new.json")) == 2
    assert complaint in capsys.readouterr().err


def test_rows_that_are_gone_and_other_versions_are_said(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(results, tmp_path / "old.json")
    results["environment"] = environment(torch="2.12.0")
    del results["parts"]["vision_1b"]
    assert run(compare.main, monkeypatch, old, write(results, tmp_path / "new.json"), "--all") == 0
    output = capsys.readouterr().out
    assert "note: torch differs: 2.11.0 and 2.12.0" in output
    assert "5 timings of the old file are missing from the new one" in output
