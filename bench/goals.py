"""The goals that were set for an H200 before anything had run on one, and whether a result file meets each.

An H100's goals are derived from them: the same if arithmetic is the limit; longer by the ratio of the data sheets'
bandwidths, 4.8 to 3.35, for a step of the 8B, which waits for memory; by half as much for the 1B, which waits for it
half of the time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from internvl_rt.bench.document import rows_of

Document = Mapping[str, Any]
Row = dict[str, Any]
Measure = Callable[[Document], float | None]
CARDS = ("H100", "H200")  # as the devices' names contain them
NORMS = ("layer_norm/*", "rms_norm/*", "add_norm/*")
LARGE_BYTES = 64e6  # a smaller norm measures the caches and its launch instead


@dataclass(frozen=True, slots=True)
class Goal:
    """`measure` returns the worst of the goal's values, None if nothing was measured. `limits`: for each card."""

    text: str
    unit: str
    limits: tuple[float, float]
    at_least: bool
    measure: Measure

    def limit(self, device: str) -> float:
        """The limit for the card of this name; for another card that of an H200."""
        return self.limits[0 if CARDS[0] in device else 1]

    def verdict(self, document: Document) -> tuple[float | None, str]:
        """The measured value, if there is one, and a word for how it stands to the goal."""
        found = document["environment"]
        value = self.measure(document) if found["device_kind"] == "cuda" else None
        if value is None:
            return None, "not measured"
        if not any(card in found["device"] for card in CARDS):
            return value, "on another device"
        limit = self.limit(found["device"])
        held = value >= limit if self.at_least else value <= limit
        return value, "held" if held else "missed"


def matching(
    document: Document, kind: str, patterns: tuple[str, ...], fields: Mapping[str, object], *, baselines: bool = False
) -> Iterator[Row]:
    for row in rows_of(document, kind):
        named = any(fnmatchcase(str(row.get("name", "")), pattern) for pattern in patterns)
        if named and ("baseline" in row) == baselines and all(row.get(key) == value for key, value in fields.items()):
            yield row


def least(kind: str, field: str, *patterns: str, scale: float = 1, **fields: object) -> Measure:
    def measure(document: Document) -> float | None:
        rows = matching(document, kind, patterns, fields)
        return min((scale * row[field] for row in rows if field in row), default=None)

    return measure


def most(kind: str, field: str, *patterns: str, scale: float = 1, **fields: object) -> Measure:
    def measure(document: Document) -> float | None:
        rows = matching(document, kind, patterns, fields)
        return max((scale * row[field] for row in rows if field in row), default=None)

    return measure


def lead(pattern: str) -> Measure:
    """Measures how many times faster a kernel is than its fastest baseline, in the case where this is least."""

    def measure(document: Document) -> float | None:
        leads = []
        for row in matching(document, "kernels", (pattern,), {}):
            others = matching(document, "kernels", (row["name"],), {}, baselines=True)
            times = [other["median_us"] for other in others if "median_us" in other and "partial" not in other]
            best = min(times, default=None)
            if best is not None and "median_us" in row:
                leads.append(best / row["median_us"])
        return min(leads, default=None)

    return measure


def _large_norms(document: Document) -> float | None:
    rows = [row for row in matching(document, "kernels", NORMS, {}) if row.get("bytes", 0) >= LARGE_BYTES]
    return min((row["roof_percent"] for row in rows if "roof_percent" in row), default=None)


def _lead_over_transformers(model: str, field: str) -> Measure:
    def measure(document: Document) -> float | None:
        rows = [row for row in rows_of(document, "compare_transformers") if row.get("model") == model]
        times = {row.get("side"): row[field] for row in rows if field in row}
        return times["theirs"] / times["ours"] if {"ours", "theirs"} <= times.keys() else None

    return measure


GOALS = (
    Goal(
        "ViT attention, 64 channels, 13 tiles", "TFLOP/s", (400, 400), True,
        least("kernels", "tflops", "vit_attention/vit_300m_13_tiles/bfloat16"),
    ),
    Goal(
        "ViT attention, 128 channels, 13 tiles", "TFLOP/s", (450, 450), True,
        least("kernels", "tflops", "vit_attention/vit_6b_13_tiles/bfloat16"),
    ),
    Goal(
        "ViT attention, 13 tiles, against torch's best SDPA", "x", (1, 1), True,
        lead("vit_attention/*_13_tiles/bfloat16"),
    ),
    Goal("norms of 64 MB and more, of the measured roof", "%", (88, 88), True, _large_norms),
    Goal(
        "InternViT-300M, 13 tiles", "ms", (19, 19), False,
        most("vision", "median_us", "*InternVL3-1B/*/bfloat16", scale=1e-3, tiles=13),
    ),
    Goal(
        "InternViT-300M, 1 tile", "ms", (1.9, 1.9), False,
        most("vision", "median_us", "*InternVL3-1B/*/bfloat16", scale=1e-3, tiles=1),
    ),
    Goal(
        "InternViT-6B, 13 tiles", "ms", (300, 300), False,
        most("vision", "median_us", "*InternVL3-38B/*/bfloat16", "*InternVL3-78B/*/bfloat16", scale=1e-3, tiles=13),
    ),
    Goal(
        "decode step of the 1B, batch 1, context 2k", "ms", (0.55, 0.45), False,
        most("decode", "median_us", "*InternVL3-1B/1x2048/bfloat16", scale=1e-3, batch=1, context_tokens=2048),
    ),
    Goal(
        "decode step of the 8B, batch 1, context 2k", "ms", (6.0, 4.2), False,
        most("decode", "median_us", "*InternVL3-8B/1x2048/bfloat16", scale=1e-3, batch=1, context_tokens=2048),
    ),
    Goal(
        "decode attention, 64 sequences of 32k, of the measured roof", "%", (80, 80), True,
        least("kernels", "roof_percent", "decode_attention/*_64_x_32768/bfloat16"),
    ),
    Goal(
        "prefill of 3,392 tokens on the 8B", "ms", (85, 85), False,
        most("prefill", "prefill_median_us", "*InternVL3-8B/*/bfloat16", scale=1e-3, prompt_tokens=3392),
    ),
    Goal("sampling, 16 rows", "us", (12, 12), False, most("kernels", "median_us", "sample/*_16_rows*/bfloat16")),
    Goal(
        "picture to embeddings, 300M, against transformers", "x", (2, 2), True,
        _lead_over_transformers("InternVL3-1B", "picture_s"),
    ),
    Goal(
        "time per token of the 1B against transformers", "x", (3, 3), True,
        _lead_over_transformers("InternVL3-1B", "per_token_s"),
    ),
    Goal(
        "time per token of the 8B against transformers", "x", (1.5, 1.5), True,
        _lead_over_transformers("InternVL3-8B", "per_token_s"),
    ),
)  # fmt: skip
