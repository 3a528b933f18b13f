"""Writes the page of a result of bench/compare_cpu.py: the table, the goals, and in words where a peer is better.

python bench/cpu_page.py FILE.json
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from options import exit_with
from report import table

from internvl_rt.bench.document import DocumentError, load

Document = Mapping[str, Any]
Row = Mapping[str, Any]
BUSY = "one busy core"
OURS, PLAIN = "ours-auto", "plain"
LIMITS = {"first_picture_s": 0.30, "per_token_1_s": 0.75, "per_token_16_s": 0.40}  # of ours over plain
BUSY_LIMIT = 2.5  # times slower than with all cores free


class Measure(NamedTuple):
    """A column. unit and scale: of the numbers shown. takes: how a sentence says that a side takes so much."""

    key: str
    label: str
    unit: str
    scale: float
    takes: str

    def shown(self, row: Row) -> str:
        value = row[self.key] * self.scale
        return f"{value:,.0f} {self.unit}" if value >= 1000 else f"{value:.3g} {self.unit}"


def measures(rows: Sequence[Row]) -> list[Measure]:
    """All that was measured, in the order of columns."""
    found = [
        Measure("first_picture_s", "first token, picture", "s", 1, "to the first token of a prompt with a picture"),
        Measure("first_text_s", "first token, text", "s", 1, "to the first token of a text as long"),
    ]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("per_token_") and "median" not in key)
    for key in keys:
        number = key.split("_")[2]
        what = "1 sequence" if number == "1" else f"{number} sequences"
        found.append(Measure(key, f"step of {what}", "ms", 1e3, f"for a step of {what}"))
    found.append(Measure("loaded_bytes", "after loading", "MB", 1e-6, "of memory after loading"))
    found.append(Measure("peak_bytes", "peak", "MB", 1e-6, "of memory at the peak"))
    return found


class Result:
    """The rows of a document by what they are."""

    def __init__(self, document: Document) -> None:
        settings, *rows = document["rows"]
        self.settings: Row = settings
        self.rows: list[Row] = [row for row in rows if "left_out" not in row]
        self.left_out: list[Row] = [row for row in rows if "left_out" in row]
        self.quiet = {row["side"]: row for row in self.rows if "beside" not in row}
        self.busy = {row["side"]: row for row in self.rows if "beside" in row}
        self.measures = measures(self.rows)

    def table(self) -> list[dict[str, str]]:
        """The best of each number; of times, the median behind it."""
        return [self._line(row) for row in self.rows]

    def _line(self, row: Row) -> dict[str, str]:
        name = f"{row['side']}, beside {row['beside']}" if "beside" in row else row["side"]
        line = {"side": name, "computes in": row["dtype"], "threads": str(row["threads"])}
        for each in self.measures:
            if each.key in row:
                middle = row.get(f"{each.key.removesuffix('_s')}_median_s")
                line[each.label] = each.shown(row) + (f" ({middle * each.scale:.3g})" if middle is not None else "")
            else:
                line[each.label] = "not measured"
        return line

    def goals(self) -> list[dict[str, str]]:
        """Each goal with its limit, what was measured, and whether it is met."""
        ours, plain = self.quiet.get(OURS, {}), self.quiet.get(PLAIN, {})
        found = [
            _goal(f"{each.label}, of plain's", LIMITS[each.key], ours, plain, each.key)
            for each in self.measures
            if each.key in LIMITS
        ]
        peer = self.quiet.get(f"transformers-{ours.get('dtype')}", {})
        found.append(_goal("peak memory, of transformers' in the same precision", 1.0, ours, peer, "peak_bytes"))
        for each in self.measures if self.busy else ():
            if each.unit != "MB":
                label = f"{each.label}, beside {BUSY}"
                found.append(_goal(label, BUSY_LIMIT, self.busy.get(OURS, {}), ours, each.key))
        return found

    def ratios(self) -> list[dict[str, str]]:
        """Every side's numbers over plain's."""
        plain = self.quiet.get(PLAIN)
        if plain is None:
            return []
        return [
            {"side": name}
            | {
                each.label: f"{row[each.key] / plain[each.key]:.2f}" if each.key in row else "not measured"
                for each in self.measures
            }
            for name, row in self.quiet.items()
            if name != PLAIN
        ]

    def losses(self) -> list[str]:
        """A sentence for each number in which a peer is better than ours in the same precision."""
        found = []
        for row in self._peers():
            ours = self.quiet.get(f"ours-{row['dtype']}", {})
            found += [
                f"{row['runtime']} in {row['dtype']} takes {each.shown(row)} {each.takes}, and we take"
                f" {each.shown(ours)}: {ours[each.key] / row[each.key]:.2f} times as much."
                for each in self.measures
                if each.key in row and each.key in ours and row[each.key] < ours[each.key]
            ]
        return found

    def where_we_lose(self) -> list[str]:
        if not self._peers():
            return ["No peer was measured, so nothing is said about where a peer is better."]
        return self.losses() or ["No peer that was measured is better than ours in the same precision in any number."]

    def notes(self) -> list[str]:
        """What else a reader must know, a sentence each."""
        found = [f"Not measured: {row['side']}{_beside(row)}: {row['left_out']}." for row in self.left_out]
        if any(row["side"] == "llama.cpp-bfloat16" for row in self.rows):
            found.append("llama.cpp-bfloat16 keeps keys and values as float16, its default, of as many bytes.")
        found += [
            f"{row['side']} gave {row['equal_tokens']} of {row['of_tokens']} tokens as ours in {row['dtype']} did,"
            " counted in each answer up to the first that differs."
            for row in self._peers()
            if "equal_tokens" in row
        ]
        if self.busy.keys() >= {PLAIN} and PLAIN in self.quiet:
            slower = "; ".join(
                f"{each.label} {self.busy[PLAIN][each.key] / self.quiet[PLAIN][each.key]:.2f}"
                for each in self.measures
                if each.unit != "MB"
            )
            found.append(f"Times slower beside {BUSY}, plain: {slower}.")
        return found

    def _peers(self) -> list[Row]:
        return [row for row in self.quiet.values() if row["runtime"] not in ("ours", "plain")]


def _beside(row: Row) -> str:
    return f" beside {row['beside']}" if "beside" in row else ""


def _goal(label: str, limit: float, row: Row, base: Row, key: str) -> dict[str, str]:
    line = {"goal": label, "at most": f"{limit:g}"}
    if key not in row or key not in base:
        return line | {"measured": "", "": "not measured"}
    ratio = row[key] / base[key]
    return line | {"measured": f"{ratio:.2f}", "": "met" if ratio <= limit else "**missed**"}


def render(document: Document) -> str:
    result, found = Result(document), document["environment"]
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items() if key != "side")
    lines = [f"# On a CPU: {found['device']}, {found['date'][:10]}", ""]
    if result.settings["model"] == "quick":
        lines += ["**Run with a tiny shape: it shows that everything runs, and measures nothing.**", ""]
    lines += ["## Where we lose", "", *(f"* {sentence}" for sentence in result.where_we_lose()), ""]
    missed = [goal["goal"] for goal in result.goals() if goal[""] == "**missed**"]
    if missed:
        lines += [f"Goals missed: {'; '.join(missed)}.", ""]
    lines += ["## Times and memory", "", f"{settings}.", "", *table(result.table()), ""]
    lines += ["The best of all rounds, and in brackets the median. A step gives each sequence a token.", ""]
    lines += [*(f"* {note}" for note in result.notes()), "", "## Goals", "", *table(result.goals()), ""]
    if ratios := result.ratios():
        lines += ["## Over plain", "", *table(ratios), ""]
        lines += ['`plain` is `backend="torch", dtype="float32"`: the references in plain torch.', ""]
    versions = {row["side"]: row["version"] for row in result.quiet.values()}
    lines += [
        "## Machine",
        "",
        *table([{"": key, "value": value} for key, value in found.items() if value is not None]),
    ]
    lines += ["", *table([{"side": side, "computes with": version} for side, version in versions.items()])]
    lines += ["", f"`{document['command']}`"]
    return "\n".join(lines) + "\n"


def show(document: Document) -> None:
    """Prints the same to a terminal, without the machine."""
    result = Result(document)
    for rows in (result.table(), result.goals(), result.ratios()):
        if rows:
            texts = [list(rows[0]), *(list(row.values()) for row in rows)]
            widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
            for line in texts:
                print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
            print()
    print(*result.notes(), "Where we lose:", *result.where_we_lose(), sep="\n")


def write_page(path: Path) -> Path:
    """Writes the page of a file of results beside it. Raises DocumentError."""
    part = load(path)["parts"].get("compare_cpu", {})
    if "document" not in part:
        raise DocumentError(f"{path}: expected a result of bench/compare_cpu.py; bench/report.py writes other pages")
    page = path.with_suffix(".md")
    page.write_text(render(part["document"]), encoding="utf-8")
    return page


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(write_page(Path(sys.argv[1])))
    except DocumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_with(main)
