"""Says which operations, and so which timed rows, this run's tests have proven.

An operation is proven if every test of its contract ran and passed. A timed row is proven if all operations that it
uses are proven and, for a whole model, if the tests of whole models against their references passed as well.
"""

from collections.abc import Mapping
from typing import Any

Entries = Mapping[str, Mapping[str, Any]]  # the parts of a result file, by name

CONTRACT, AGREEMENT = "contract", "model_agreement"
VISION = frozenset(
    "resize_tiles patch_embed layer_norm rms_norm add_norm vit_attention gemm_epilogue unshuffle_norm"
    " unshuffle_project".split()
)
DECODER = frozenset(
    "embed_tokens rms_norm gemm_epilogue qkv_rope_kv gemv gemv_qkv decode_attention prefill_attention swiglu sample"
    " copy_blocks dequantise gemv_4bit gemv_8bit quantise_rows rms_norm_fp8 swiglu_fp8 gemm_fp8"
    " route_experts expert_gate_up expert_down".split()
)
BAD = ("failed", "errors", "memory_errors")  # what a row of tests counts; each must be 0


def unproven_operations(entries: Entries) -> dict[str, str]:
    """The reason by operation, for those that failed a test of their contract; under "" why no operation is proven."""
    contract = entries.get(CONTRACT, {"status": "not run"})
    rows = contract.get("document", {}).get("rows", [])
    found = {str(row["name"]): _shown(row) for row in rows if _is_bad(row)}
    if contract["status"] != "done" and not found:
        found[""] = f"{CONTRACT} {_ended(contract['status'])}"
    elif contract["status"] == "stopped":
        found[""] = f"{CONTRACT} did not run to its end"
    return found


def why_unproven(name: str, uses: frozenset[str], entries: Entries, *, whole_model: bool) -> str:
    """Why a row may be wrong; "" if it is proven. The name of one operation's row begins with that operation."""
    unproven = unproven_operations(entries)
    used = uses or {name.partition("/")[0]}
    reasons = [f"{each}: {why}" for each, why in unproven.items() if each in used]
    if "" in unproven and not reasons:
        reasons.append(unproven[""])
    agreement = entries.get(AGREEMENT, {"status": "not run"})["status"]
    if whole_model and agreement != "done":
        reasons.append(f"{AGREEMENT} {_ended(agreement)}")
    return "; ".join(reasons)


def mark(rows: list[dict[str, Any]], uses: frozenset[str], entries: Entries, *, whole_model: bool) -> None:
    """Writes "proven" or "unproven" into every row that is not a baseline."""
    for row in rows:
        if "baseline" not in row:
            why = why_unproven(str(row.get("name", "")), uses, entries, whole_model=whole_model)
            row["proof"] = "unproven" if why else "proven"


def _is_bad(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) for key in BAD)


def _shown(row: Mapping[str, Any]) -> str:
    total = sum(row.get(key, 0) for key in ("passed", *BAD))
    first = f", {row['first']} the first" if "first" in row else ""
    return f"{sum(row.get(key, 0) for key in BAD)} of {total:,} tests failed{first}"


def _ended(status: str) -> str:
    return {"stopped": "did not run to its end", "failed": "failed", "done": "passed"}.get(status, "did not run")
