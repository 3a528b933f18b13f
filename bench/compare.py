"""Compares two result files: what became slower or faster, and whether that is more than noise.

    python bench/compare.py old.json new.json [--all]

Rows of both files belong together if part and name are the same; their medians are compared. The ratio new / old lies
between new low / old high and new high / old low, where low and high are a run's 10th and 90th percentiles. It counts
as a change if this interval does not contain 1. Times without percentiles are not compared.

The exit code is 0, or 1 if something became slower, or 2 if the files cannot be compared.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options import exit_with

from internvl_rt.bench.document import DocumentError, load, rows_of

SAME = ("device", "device_kind", "driver", "torch", "triton", "num_threads")  # a difference in one of these is printed
DECISIVE = ("device", "device_kind")
KINDS = ("roofline", "kernels", "vision", "prefill", "decode", "serve")
IDENTITY = ("name", "baseline", "side")


@dataclass(frozen=True, slots=True)
class Change:
    name: str
    old_us: float
    new_us: float
    low: float  # bounds of new / old
    high: float

    @property
    def ratio(self) -> float:
        return self.new_us / self.old_us

    @property
    def verdict(self) -> str:
        return "SLOWER" if self.low > 1 else "faster" if self.high < 1 else "same"


def identity(row: Mapping[str, Any]) -> str:
    """A text that identifies the row in every run."""
    return ": ".join((row["in"], " ".join(str(row[key]) for key in IDENTITY if key in row)))


def timings(document: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Name, low, median and high of each time; a row may have several, such as `median_us` and `vision_median_us`."""
    for kind in KINDS:
        for row in rows_of(document, kind):
            for field in row:
                if field.endswith("median_us"):
                    prefix = field.removesuffix("median_us")
                    low, high = row.get(f"{prefix}low_us"), row.get(f"{prefix}high_us")
                    if low and high:
                        yield f"{identity(row)} {prefix.rstrip('_')}".rstrip(), (low, row[field], high)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Raises DocumentError if the devices differ or the files have no row in common."""
    for key in DECISIVE:
        one, other = (document["environment"].get(key) for document in (old, new))
        if one != other:
            raise DocumentError(f"expected results of the same {key}, got {one!r} and {other!r}")
    before, after = dict(timings(old)), dict(timings(new))
    common = [name for name in before if name in after]
    if not common:
        raise DocumentError(f"expected rows in common, got {len(before)} timings and {len(after)} others")
    changes = []
    for name in common:
        (low, median, high), (new_low, new_median, new_high) = before[name], after[name]
        changes.append(Change(name, median, new_median, new_low / high, new_high / low))
    return sorted(changes, key=lambda change: -change.ratio)


def render(changes: list[Change], *, everything: bool) -> str:
    shown = [change for change in changes if everything or change.verdict != "same"]
    width = max((len(change.name) for change in shown), default=4)
    lines = [f"{'':{width}} {'old us':>12} {'new us':>12} {'ratio':>7}  between"] if shown else []
    lines += [
        f"{c.name:{width}} {c.old_us:12,.2f} {c.new_us:12,.2f} {c.ratio:7.3f}"
        f"  {c.low:.3f} and {c.high:.3f}  {c.verdict}"
        for c in shown
    ]
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("SLOWER", "faster", "same")}
    lines.append(f"{len(changes)} compared: " + ", ".join(f"{n} {verdict.lower()}" for verdict, n in counts.items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also what did not change")
    args = parser.parse_args()
    try:
        old, new = load(args.old), load(args.new)
        changes = compare(old, new)
    except DocumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key in SAME:
        one, other = (document["environment"].get(key) for document in (old, new))
        if one != other:
            print(f"note: {key} differs: {one} and {other}")
    print(render(changes, everything=args.all))
    only = len(dict(timings(old)).keys() - dict(timings(new)).keys())
    if only:
        print(f"{only} timings of the old file are missing from the new one")
    return int(any(change.verdict == "SLOWER" for change in changes))


if __name__ == "__main__":
    exit_with(main)
