"""The kernels choose by the table that the tuner writes; a new table replaces the old one whole or not at all."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from tune_candidates import product_plans  # noqa: E402
from tune_table import Entry, attention_entries, measured_on, product_entries, write_table  # noqa: E402

from internvl_rt.kernels._launch import TARGETS  # noqa: E402
from internvl_rt.kernels._plans import CUBLAS, CUBLAS_TWICE, AttentionPlan, GemmPlan, Tables, choose_plan, load_tables  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H200 = TARGETS[90]
WIDE, LOW = (product_plans(H200)[name] for name in ("wide", "low"))
NOTHING: dict[str, list[Entry]] = {"gemm_epilogue": [], "unshuffle_project": [], "vit_attention": []}
MEASURED = {"date": "2026-01-01", "gpu": "none", "triton": "3.7.1", "torch": "2.13.0"}


def test_a_default_that_is_the_fastest_for_some_tiles_is_an_entry_there() -> None:
    default, other = AttentionPlan(128, 64, 8, 3), AttentionPlan(128, 128, 8, 2)
    key = (1024, 16, 64)
    listed = attention_entries({key: {1: default, 4: other, 13: default}}, {key: default})
    assert [(each["tiles_max"], AttentionPlan(**each["plan"])) for each in listed] == [
        (1, default),
        (4, other),
        (13, default),
    ]
    assert attention_entries({key: {1: default, 13: default}}, {key: default}) == []


def test_the_kernels_choose_what_was_measured(tmp_path: Path) -> None:
    """A choice holds from half of the fewest rows that were measured up to the most."""
    chosen = {
        (3072, 1024, "none"): {1025: CUBLAS, 4100: WIDE, 13325: LOW},
        (4096, 1024, "gelu"): {13325: WIDE, 1025: WIDE},
        (896, 896, "residual"): {64: LOW, 3392: CUBLAS},
        (512, 512, "rows"): {64: CUBLAS},
        (1024, 4096, "residual"): {1025: CUBLAS_TWICE, 13325: CUBLAS},
        (256, 256, "none"): {1: LOW},
    }
    entries = product_entries(chosen)
    assert entries == product_entries(dict(reversed(chosen.items())))
    write_table(tmp_path / "sm_90.json", {**NOTHING, "gemm_epilogue": entries}, MEASURED, H200)

    def plan(rows: int, n: int, k: int, epilogue: str) -> GemmPlan:
        return choose_plan(rows, n, k, epilogue, torch.bfloat16, H200, folder=tmp_path)

    for (n, k, epilogue), by_rows in chosen.items():
        for rows, expected in by_rows.items():
            assert plan(rows, n, k, epilogue) == expected
    assert [plan(rows, 3072, 1024, "none") for rows in (1, 1026, 4101, 13326)] == [CUBLAS, WIDE, LOW, CUBLAS]
    assert [plan(rows, 4096, 1024, "gelu") for rows in (512, 513, 5000, 13326)] == [CUBLAS, WIDE, WIDE, CUBLAS]
    assert [plan(rows, 896, 896, "residual") for rows in (32, 33, 65)] == [CUBLAS, LOW, CUBLAS]
    assert [plan(rows, 1024, 4096, "residual") for rows in (512, 513, 1026)] == [CUBLAS, CUBLAS_TWICE, CUBLAS]
    assert len(entries) == 3 + 2 + 2 + 2 + 1


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    write_table(path, NOTHING, MEASURED, H200)
    before = path.read_bytes()
    assert load_tables(path, H200) == Tables()
    too_large = product_entries({(64, 64, "none"): {64: replace(WIDE, num_stages=8)}})
    with pytest.raises(ValueError, match="shared memory"):
        write_table(path, {**NOTHING, "gemm_epilogue": too_large}, MEASURED, H200)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


def test_a_file_says_device_date_commit_and_tools() -> None:
    said = measured_on(DEVICE)
    assert said.keys() == MEASURED.keys()
    assert " at commit " in said["date"]
    assert said["torch"] == torch.__version__
