"""The roof that a run measured on its own device, read from the rows of its part `roofline`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_rt.bench.document import rows_of


@dataclass(frozen=True, slots=True)
class Roof:
    copy_gb_s: float  # the rate of the largest copy, which is larger than every cache
    peak_tflops: Mapping[str, float]  # by data type
    graph_node_us: float = 0.0  # from one small kernel of a graph to the next; 0 without graphs

    def ridge(self) -> float:
        """The FLOP per byte above which even the fastest data type computes longer than it loads."""
        return max(self.peak_tflops.values()) * 1e3 / self.copy_gb_s

    def floor_us(self, flops: float, bytes_moved: float, dtype: str) -> float:
        """The least time for this work. Raises KeyError for a data type whose peak was not measured."""
        return max(bytes_moved / self.copy_gb_s / 1e3, flops / self.peak_tflops[dtype] / 1e6)


def measured_roof(document: Mapping[str, Any]) -> Roof | None:
    """Returns None if the run measured no bandwidth or no peak."""
    rows = {str(row.get("name")): row for row in rows_of(document, "roofline")}
    copies = [(row["bytes"], row["gb_s"]) for name, row in rows.items() if name.startswith("copy/")]
    peaks = {row["dtype"]: row["tflops"] for name, row in rows.items() if name.startswith("product/")}
    if not copies or not peaks:
        return None
    return Roof(max(copies)[1], peaks, rows.get("graph_node", {}).get("median_us", 0.0))
