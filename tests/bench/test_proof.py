"""The tests of a run decide which of the rows that it times are proven."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from proof import AGREEMENT, CONTRACT, DECODER, VISION, mark, unproven_operations, why_unproven

NOTHING = frozenset[str]()


def entries(contract: str = "done", agreement: str = "done", **failed: int) -> dict[str, Any]:
    """Returns the results of a run. failed: how many of an operation's ten tests failed."""
    names = ("gemv", "vit_attention", "rms_norm")
    counts = {name: failed.get(name, 0) for name in names}
    rows = [{"name": name, "passed": 10 - bad, "failed": bad, "errors": 0} for name, bad in counts.items()]
    return {CONTRACT: {"status": contract, "document": {"rows": rows}}, AGREEMENT: {"status": agreement}}


def test_everything_is_proven_where_all_tests_passed() -> None:
    assert unproven_operations(entries()) == {}
    assert why_unproven("gemv/1b_o_1/bfloat16", NOTHING, entries(), whole_model=False) == ""
    assert why_unproven("decode/InternVL3-1B/1x2048/bfloat16", DECODER, entries(), whole_model=True) == ""


def test_a_failing_operation_leaves_those_that_do_not_use_it_proven() -> None:
    found = entries("failed", gemv=2)
    assert why_unproven("gemv/1b_o_1/bfloat16", NOTHING, found, whole_model=False) == "gemv: 2 of 10 tests failed"
    assert why_unproven("vit_attention/x/bfloat16", NOTHING, found, whole_model=False) == ""
    assert why_unproven("decode/x", DECODER, found, whole_model=True) == "gemv: 2 of 10 tests failed"
    assert why_unproven("vision/x", VISION, found, whole_model=True) == ""


@pytest.mark.parametrize("status", ["stopped", "not run"])
def test_a_contract_that_did_not_end_proves_nothing(status: str) -> None:
    """This holds also if the contract found a failure before: the other tests may not have run."""
    ended = {"stopped": "contract did not run to its end", "not run": "contract did not run"}[status]
    assert why_unproven("vit_attention/x", NOTHING, entries(status), whole_model=False) == ended
    assert why_unproven("vit_attention/x", NOTHING, entries("stopped", gemv=1), whole_model=False) != ""
    assert why_unproven("vit_attention/x", NOTHING, {}, whole_model=False) == "contract did not run"


def test_whole_models_need_agreement_besides() -> None:
    found = entries(agreement="failed")
    assert why_unproven("vision/x", VISION, found, whole_model=True) == "model_agreement failed"
    assert why_unproven("vit_attention/x", NOTHING, found, whole_model=False) == ""


def test_marks_stand_in_every_row_but_those_of_others() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "gemv/a/bfloat16"},
        {"name": "gemv/a/bfloat16", "baseline": "cublas"},
        {"name": "rms_norm/b"},
    ]
    mark(rows, NOTHING, entries("failed", gemv=1), whole_model=False)
    assert [row.get("proof") for row in rows] == ["unproven", None, "proven"]
