"""Writes the readable page of a result file, and its pictures.

    python bench/report.py bench/results/<device>/<date>.json [--no-plots]

Writes `<date>.md` and, with matplotlib, `<date>-<picture>.png` beside the file.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from goals import CARDS, GOALS
from options import exit_with
from proof import AGREEMENT, CONTRACT, unproven_operations

from internvl_rt.bench.document import DocumentError, load, rows_of
from internvl_rt.bench.roofs import Roof, measured_roof

Document = Mapping[str, Any]
Row = dict[str, Any]
LAUNCHES_NEAR = 2.0  # an operation whose roof is below the time of this many graph nodes is bound by its launch
TESTS = (CONTRACT, AGREEMENT, "gpu_tests", "sanitizer")
NO_DOUBT = ("not asked for", "no CUDA device")  # tests that did not run for these reasons cast no doubt on times
ALT = {
    "roofline": "every kernel under the measured roof",
    "batch": "time per token against batch",
    "prompt": "vision against tiles, time to the first token against prompt tokens",
}
TITLES = {
    "build": "Build", "contract": "Kernels against their references",
    "model_agreement": "Whole models against references", "gpu_tests": "Tests marked `gpu`", "tune": "Tuning",
    "sanitizer": "compute-sanitizer", "roofline": "Roofline", "decode_1b": "Decode, 1B",
    "decode_1b_without_pdl": "Decode, 1B, without programmatic dependent launch",
    "decode_1b_without_graphs": "Decode, 1B, without CUDA graphs",
    "decode_1b_plain": "Decode, 1B, one sequence, to compare the experiments with",
    "decode_1b_prefetch_keys": "The same with `prefetch_keys`",
    "decode_1b_prefetch_weights": "The same with `prefetch_weights`",
    "decode_1b_early_trigger": "The same with `early_trigger`",
    "decode_1b_tokens_to_host": "The same with `tokens_to_host`",
    "decode_1b_all_experiments": "The same with all four", "decode_1b_plain_again": "The same without any",
    "step_1b": "The kernels of a decode step, 1B",
    "step_1b_without_pdl": "The same without programmatic dependent launch", "decode_8b": "Decode, 8B",
    "vision_1b": "Vision, 1B", "prefill_1b": "Prefill, 1B", "prefill_8b": "Prefill, 8B", "kernels": "Kernels",
    "rows_1b": "1,025 rows a tile against 1,024",
    "compare_transformers": "Against transformers", "serve_1b": "Serving, 1B",
}  # fmt: skip


def render(document: Document, pictures: Sequence[Path] = (), guide: str = "[README](../README.md)") -> str:
    """guide: names the page that says how to read this one."""
    found = document["environment"]
    lines = [f"# {found['device']}, {found['date'][:10]}", ""]
    if found["device_kind"] == "cpu":
        lines += ["**Run at small settings on a CPU: it shows that everything runs, and measures nothing.**", ""]
    lines += [*_summary(document), "", f"How to read this: {guide}.", "", "## Goals", ""]
    lines += [*_goals(document), "", "## Machine", ""]
    lines += table([{"": key, "value": value} for key, value in found.items() if value is not None])
    lines += ["", "## What ran", "", *table(_runs(document)), ""]
    for picture in pictures:
        lines += [f"![{ALT[picture.stem.rpartition('-')[2]]}]({picture.name})", ""]
    for name, part in document["parts"].items():
        rows = part.get("document", {}).get("rows", [])
        if rows and name != "build":
            lines += [f"## {TITLES.get(name, name)}", "", *_sentences(document, part)]
            furthest = by_operation(rows, measured_roof(document)) if name == "kernels" else []
            if furthest:
                lines += ["By operation, the case furthest from its roof:", "", *table(furthest), ""]
            lines += [*table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(document: Document) -> Iterable[str]:
    """The sentences for a reader who reads no further."""
    parts = document["parts"]
    passed = sum(row.get("passed", 0) for row in rows_of(document, "tests"))
    doubts = [
        f"{name} ({part['status']}{': ' * ('reason' in part)}{part.get('reason', '')})"
        for name, part in parts.items()
        if name in TESTS and part["status"] != "done" and part.get("reason") not in NO_DOUBT
    ]
    unproven = unproven_operations(parts)
    if not doubts and not unproven:
        yield f"Proven: {passed:,} tests passed, and whatever is timed below is marked so."
    else:
        yield f"**Not all is proven: {'; '.join(doubts) or 'no tests ran'}.** {passed:,} tests passed."
        yield ""
        listed = "; ".join(f"`{name}` ({why})" if name else f"all ({why})" for name, why in unproven.items())
        yield f"Unproven operations: {listed or 'none'}. What uses them is timed all the same, and marked."
    stopped = [name for name, part in parts.items() if part["status"] in ("failed", "stopped") and name not in TESTS]
    if stopped:
        yield ""
        listed = "; ".join(f"{name} ({parts[name]['status']}: {parts[name].get('reason', '')})" for name in stopped)
        yield f"Parts that failed or ran out of time: {listed}."
    sentence = furthest(rows_of(document, "kernels"), measured_roof(document))
    if sentence:
        yield ""
        yield sentence


def furthest(rows: Sequence[Row], roof: Roof | None) -> str:
    """Says which kernel is furthest from its roof, and what bounds it; '' if no kernel was measured."""
    timed = _with_roofs(rows)
    bound = [row for row in timed if what_bounds(row, roof) != "launch"]
    text = ""
    if bound:
        worst = min(bound, key=lambda row: row["roof_percent"])
        what = what_bounds(worst, roof)
        work = f"{worst['bytes'] / 1e6:,.4g} MB" if what == "memory bandwidth" else f"{worst['flops'] / 1e9:,.4g} GFLOP"
        text = (
            f"Furthest from its roof: `{worst['name']}` at {worst['roof_percent']:.0f} % of it."
            f" {what.capitalize()} bounds it: {work} take {worst['roof_us']:,.4g} us at the least,"
            f" and it takes {worst['median_us']:,.4g} us."
        )
        if what == "memory bandwidth" and "copy_us" in worst:
            text += f" A plain copy that moves as many bytes takes {worst['copy_us']:,.4g} us."
    if len(bound) < len(timed):
        text += (
            f" {len(timed) - len(bound)} of {len(timed)} cases are bound by their launch instead: their roof is below"
            f" {LAUNCHES_NEAR:g} nodes of a graph, {_node_us(roof):.3g} us each."
        )
    return text.strip()


def by_operation(rows: Sequence[Row], roof: Roof | None) -> list[Row]:
    """For each operation the case furthest from its roof (cases bound by a launch come last), and its best baseline."""
    worst: dict[str, Row] = {}
    for row in sorted(_with_roofs(rows), key=lambda row: (what_bounds(row, roof) == "launch", row["roof_percent"])):
        worst.setdefault(row["name"].partition("/")[0], row)
    cases = []
    for row in worst.values():
        others = [each for each in rows if each["name"] == row["name"] and {"baseline", "median_us"} <= each.keys()]
        others = [each for each in others if "partial" not in each]  # partial ones do less than the kernel
        line = {"furthest case": f"`{row['name']}`", "us": row["median_us"], "roof_us": row["roof_us"]}
        line |= {"% of roof": row["roof_percent"], "bound by": what_bounds(row, roof)}
        if others:
            best = min(others, key=lambda each: each["median_us"])
            line |= {"best baseline": best["baseline"], "times faster": best["median_us"] / row["median_us"]}
        cases.append(line)
    return cases


def what_bounds(row: Row, roof: Roof | None) -> str:
    if row["roof_us"] <= LAUNCHES_NEAR * _node_us(roof):
        return "launch"
    return "memory bandwidth" if row["roof_kind"] == "bandwidth" else "arithmetic"


def _node_us(roof: Roof | None) -> float:
    return roof.graph_node_us if roof else 0.0


def _with_roofs(rows: Sequence[Row]) -> list[Row]:
    """The rows of the project's own kernels that were timed."""
    needed = {"roof_percent", "roof_us", "roof_kind", "median_us"}
    return [row for row in rows if "baseline" not in row and needed <= row.keys()]


def _goals(document: Document) -> list[str]:
    rows, device = [], document["environment"]["device"]
    card = next((card for card in CARDS if card in device), CARDS[-1])
    for goal in GOALS:
        value, verdict = goal.verdict(document)
        measured = "" if value is None else f"{value:,.4g} {goal.unit}"
        limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit(device):g} {goal.unit}"
        rows.append({f"goal, on an {card}": goal.text, "set": limit, "measured": measured, "": verdict})
    return table(rows)


def _runs(document: Document) -> list[Row]:
    keys = ("status", "reason", "wall_s", "command")
    return [
        {"part": name, **{key: f"`{part[key]}`" if key == "command" else part[key] for key in keys if key in part}}
        for name, part in document["parts"].items()
    ]


def _sentences(document: Document, part: Mapping[str, Any]) -> list[str]:
    rows: list[Row] = part["document"]["rows"]
    roof = measured_roof(document)
    kind = part["document"]["part"]
    text = ""
    if kind == "kernels":
        text = furthest(rows, roof)
        left_out = part["document"].get("left_out", [])
        if left_out:
            text += f" {len(left_out)} cases were left out for want of time or memory."
    elif kind == "roofline" and roof:
        dtype, peak = max(roof.peak_tflops.items(), key=lambda item: item[1])
        text = (
            f"What does fewer than {roof.ridge():,.0f} FLOP for each byte is bound by memory, even in {dtype}:"
            f" {peak:,.4g} TFLOP/s over {roof.copy_gb_s:,.0f} GB/s."
        )
    elif kind in ("vision", "prefill", "decode") and roof:
        text = _against_roof(rows, roof)
    elif kind == "compare_transformers":
        ratios = [row for row in rows if row.get("side") == "ratio"]
        text = " ".join(
            f"{row['model']}: {1 / row['per_token_s_ratio']:.3g} times transformers' pace." for row in ratios
        )
    if part["status"] != "done":
        text = f"**{part['status'].capitalize()}: {part.get('reason', '')}.** {text}".strip()
    return [text, ""] if text else []


def _against_roof(rows: Sequence[Row], roof: Roof) -> str:
    """Says which whole pass or step is furthest from the roof that this run measured."""
    shares = []
    for row in rows:
        dtype = str(row.get("name", "")).rpartition("/")[2]
        if {"flops", "bytes", "median_us"} <= row.keys() and dtype in roof.peak_tflops and row["median_us"] > 0:
            floor_us = roof.floor_us(row["flops"], row["bytes"], dtype)
            by_memory = row["bytes"] / roof.copy_gb_s / 1e3 >= floor_us
            shares.append((floor_us / row["median_us"], floor_us, by_memory, row))
    if not shares:
        return ""
    share, floor_us, by_memory, row = min(shares, key=lambda each: each[0])
    what = "memory bandwidth" if by_memory else "arithmetic"
    return (
        f"Furthest from the roof measured in this run: `{row['name']}` at {100 * share:.0f} % of it, bound by {what}"
        f" ({floor_us / 1e3:,.4g} ms at the least, {row['median_us'] / 1e3:,.4g} ms taken)."
    )


def table(rows: Sequence[Row]) -> list[str]:
    """A table with its columns in the order in which rows name them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-plots", action="store_true", help="the page alone")
    args = parser.parse_args()
    try:
        document = load(args.file)
    except DocumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pictures: list[Path] = []
    if not args.no_plots:
        if find_spec("matplotlib"):
            from internvl_rt.bench.plots import draw_all

            pictures = draw_all(document, args.file)
        else:
            print("no pictures: they need matplotlib (pip install 'internvl-rt[bench]')", file=sys.stderr)
    page = args.file.with_suffix(".md")
    guides = (
        {} if (page.parent.parent / "README.md").exists() else {"guide": "bench/results/README.md of the repository"}
    )
    page.write_text(render(document, pictures, **guides), encoding="utf-8")
    print(*(str(path) for path in (page, *pictures)), sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
