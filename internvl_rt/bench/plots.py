"""Draws the pictures of a result file, without a screen: roofline, latency by batch, time by tiles and by tokens.

A picture without data is left out.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from internvl_rt.bench.document import rows_of
from internvl_rt.bench.roofs import Roof, measured_roof

Document = Mapping[str, Any]
Row = dict[str, Any]
MARKERS = "osDv^<>PX*hp"
STYLE = {"axes.grid": True, "axes.grid.which": "major", "grid.alpha": 0.3, "figure.dpi": 110, "font.size": 9}
NARROW = 3.0  # an axis whose ends differ by less than this factor is not logarithmic
BOUNDS = ("low_us", "high_us")
SIZE = (9.0, 5.4)


def draw_all(document: Document, path: Path) -> list[Path]:
    """Writes `<path's stem>-<picture>.png` beside `path`; returns the paths of the pictures that were drawn."""
    pictures: dict[str, Callable[[Document], Figure | None]] = {
        "roofline": draw_roofline,
        "batch": draw_batch,
        "prompt": draw_prompt,
    }
    written = []
    with plt.rc_context(cast(Any, STYLE)):
        for name, draw in pictures.items():
            figure = draw(document)
            if figure is not None:
                target = path.with_name(f"{path.stem}-{name}.png")
                figure.savefig(target)
                plt.close(figure)
                written.append(target)
    return written


def draw_roofline(document: Document) -> Figure | None:
    """Draws a point for every kernel, and a hollow one for each of its alternatives."""
    rows = [row for row in rows_of(document, "kernels") if {"flops", "bytes", "median_us"} <= row.keys()]
    rows = [row for row in rows if min(row["flops"], row["bytes"], row["median_us"]) > 0]
    roof = measured_roof(document)
    if not rows or roof is None:
        return None
    figure, axes = _axes(document, "Kernels under the measured roof")
    operations = sorted({_operation(row) for row in rows})
    colours = plt.get_cmap("tab20")([*range(0, 20, 2), *range(1, 20, 2)])  # the pale colours come last
    for index, operation in enumerate(operations):
        mine = [row for row in rows if _operation(row) == operation]
        style = {"color": colours[index % 20], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
        own = [row for row in mine if "baseline" not in row]
        others = [row for row in mine if "baseline" in row]
        axes.plot(*_points(own), **style, markersize=6, alpha=0.85, label=operation)
        axes.plot(*_points(others), **style, markersize=5, alpha=0.8, fillstyle="none")
    intensity = [row["flops"] / row["bytes"] for row in rows]
    _draw_roofs(axes, roof, min(intensity) / 2, 8 * max(*intensity, roof.ridge()))
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of device memory, at least", ylabel="TFLOP/s")
    if any("baseline" in row for row in rows):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: used instead")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=8)
    return figure


def draw_batch(document: Document) -> Figure | None:
    """Draws the time per token against the batch, with a line for each model and context."""
    rows = [row for row in rows_of(document, "decode") if {"batch", "median_us"} <= row.keys()]
    if not rows:
        return None
    figure, axes = _axes(document, "Decode: time per token against batch")
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[f"{_model(row)}, context {row.get('context_tokens', '?'):,}"].append(row)
    _draw_lines(axes, lines, "batch", "batch, sequences", "ms per token")
    return figure


def draw_prompt(document: Document) -> Figure | None:
    """Draws the vision tower's time against tiles (left) and the time to the first token against tokens (right)."""
    sides = (
        ("vision", "tiles", "tiles of a picture", "ms per pass", "Vision tower and projector"),
        ("prefill", "prompt_tokens", "prompt tokens", "ms to the first token", "Time to the first token"),
    )
    found = []
    for side in sides:
        rows = [row for row in rows_of(document, side[0]) if {side[1], "median_us"} <= row.keys()]
        found += [(side, rows)] * bool(rows)
    if not found:
        return None
    figure, all_axes = plt.subplots(1, len(found), figsize=(SIZE[0] * 1.2, 4.8), layout="constrained", squeeze=False)
    for axes, ((_, field, xlabel, ylabel, title), rows) in zip(all_axes[0], found, strict=True):
        lines: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            kind = ", with a picture" if row.get("tiles") and field == "prompt_tokens" else ""
            lines[_model(row) + kind].append(row)
        _draw_lines(axes, lines, field, xlabel, ylabel)
        axes.set_title(title, fontsize=10)
    figure.suptitle(_caption(document), fontsize=9)
    return figure


def _draw_lines(axes: Axes, lines: Mapping[str, list[Row]], field: str, xlabel: str, ylabel: str) -> None:
    """Draws medians in milliseconds, with the 10th and 90th percentile if they are known."""
    ticks: set[float] = set()
    heights: list[float] = []
    tops: list[float] = []  # of the bars, which may be far above the medians
    for index, (label, unsorted) in enumerate(sorted(lines.items())):
        rows = sorted(unsorted, key=lambda row: row[field])
        x = [row[field] for row in rows]
        y = [row["median_us"] / 1e3 for row in rows]
        bounds = [[row[name] / 1e3 if name in row else m for m, row in zip(y, rows, strict=True)] for name in BOUNDS]
        axes.errorbar(
            x,
            y,
            yerr=np.abs(np.subtract(bounds, y)),
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            capsize=3,
            label=label,
        )
        ticks.update(x)
        heights += y
        tops += bounds[1]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xscale("log", base=2)
    if max(heights) > NARROW * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.15 * max(tops))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xticks(_apart(sorted(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="best", fontsize=8)


def _apart(values: list[float]) -> list[float]:
    """The values whose labels do not touch each other on a log axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.35 * kept[-1]:
            kept.append(value)
    return kept


def _draw_roofs(axes: Axes, roof: Roof, left: float, right: float) -> None:
    """Draws the memory's slope up to the highest peak, and each data type's peak from where the slope meets it."""
    meets = {dtype: peak * 1e3 / roof.copy_gb_s for dtype, peak in roof.peak_tflops.items()}
    x = np.geomspace(min(left, *meets.values()), roof.ridge(), 50)
    axes.plot(x, x * roof.copy_gb_s / 1e3, color="black", linewidth=1.2)
    slope = f"copy {roof.copy_gb_s:,.0f} GB/s"
    axes.annotate(slope, (x[20], x[20] * roof.copy_gb_s / 1e3), (-6, 4), textcoords="offset points", ha="right")
    groups: list[list[str]] = []  # groups of peaks so close that their labels would overlap
    for dtype, peak in sorted(roof.peak_tflops.items(), key=lambda item: item[1]):
        axes.plot([meets[dtype], right], [peak, peak], color="black", linewidth=1.0, linestyle="--")
        if not groups or peak > 1.3 * roof.peak_tflops[groups[-1][0]]:
            groups.append([])
        groups[-1].append(dtype)
    for group in groups:
        label = ", ".join(f"{dtype} {_digits(roof.peak_tflops[dtype])}" for dtype in group)
        top = roof.peak_tflops[group[-1]]
        axes.annotate(label, (right, top), (0, 5), textcoords="offset points", ha="right", fontsize=8)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row["flops"] / row["bytes"] for row in rows], [row["flops"] / row["median_us"] / 1e6 for row in rows]


def _operation(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def _model(row: Row) -> str:
    """The model's name in `<part>/<model>/<case>/<dtype>`."""
    return str(row["name"]).split("/")[-3]


def _axes(document: Document, title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.set_title(f"{title}\n{_caption(document)}", fontsize=10)
    return figure, axes


def _caption(document: Document) -> str:
    found = document["environment"]
    return f"{found['device']}, {found['date'][:10]}, commit {found['commit'][:10]}, torch {found['torch']}"
