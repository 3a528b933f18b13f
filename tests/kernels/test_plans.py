"""Tests the tables that say how a product is computed: their answers, and which tables are refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels._plans import (
    APART,
    CUBLAS,
    CUBLAS_TWICE,
    FOLDER,
    AttentionPlan,
    GemmPlan,
    check_plan,
    choose_attention_plan,
    choose_plan,
    choose_projection_plan,
    load_tables,
    projection_tilings,
    resolve_plan,
    resolve_projection_plan,
    tilings,
)

H200 = TARGETS[90]
WIDE, SQUARE, LOW = (tilings(H200)[name] for name in ("wide", "square", "low"))
FLAT, TALL = AttentionPlan(64, 64, 4, 3), AttentionPlan(128, 128, 8, 2)
MEASURED = {"date": "2026-01-31", "gpu": "NVIDIA H200", "triton": "3.6.0", "torch": "2.11.0"}


def entry(m_max: int, plan: GemmPlan, n: int = 4096, k: int = 1024, epilogue: str = "gelu") -> dict[str, Any]:
    values = asdict(plan) if plan.block_m else {"kind": plan.kind}
    return {"m_max": m_max, "n": n, "k": k, "epilogue": epilogue, "plan": values}


def projection(m_max: int, plan: GemmPlan) -> dict[str, Any]:
    values = {"kind": "apart"} if plan == APART else asdict(plan)
    return {"m_max": m_max, "n": 896, "k": 4096, "plan": values}


def attention(tiles_max: int, plan: AttentionPlan, **changes: Any) -> dict[str, Any]:
    return {"tiles_max": tiles_max, "patches": 1024, "heads": 16, "channels": 64, "plan": asdict(plan), **changes}


def tables(**changes: Any) -> dict[str, Any]:
    return {"measured": MEASURED, "gemm_epilogue": [], "unshuffle_project": [], "vit_attention": [], **changes}


def write(folder: Path, table: object, name: str = "sm_90.json") -> Path:
    path = folder / name
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = [
        entry(13325, WIDE),  # the entries are not sorted
        entry(1025, SQUARE),
        entry(64, LOW),
        entry(1536, CUBLAS_TWICE),
        entry(2050, CUBLAS),
        entry(1025, WIDE, n=1024, epilogue="residual"),
    ]
    projections = [projection(3328, WIDE), projection(1024, APART), projection(256, LOW)]
    attentions = [attention(13, TALL), attention(1, FLAT)]
    write(tmp_path, tables(gemm_epilogue=entries, unshuffle_project=projections, vit_attention=attentions))
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0, LOW),
        (64, LOW),
        (65, SQUARE),
        (1025, SQUARE),
        (1026, CUBLAS_TWICE),
        (1537, CUBLAS),
        (2051, WIDE),
        (13325, WIDE),
        (13326, CUBLAS),
    ],
)
def test_the_smallest_m_max_that_holds_the_rows_counts(folder: Path, rows: int, expected: GemmPlan) -> None:
    assert choose_plan(rows, 4096, 1024, "gelu", torch.bfloat16, H200, folder=folder) == expected
    assert choose_plan(rows, 4096, 1024, "gelu", torch.float16, H200, folder=folder) == expected


@pytest.mark.parametrize(
    ("n", "k", "epilogue", "dtype", "capability"),
    [
        (4095, 1024, "gelu", torch.bfloat16, 90),
        (4096, 1025, "gelu", torch.bfloat16, 90),
        (1024, 4096, "gelu", torch.bfloat16, 90),
        (4096, 1024, "none", torch.bfloat16, 90),
        (4096, 1024, "gelu", torch.float32, 90),
        (4096, 1024, "gelu", torch.bfloat16, 80),
    ],
)
def test_what_was_not_measured_is_left_to_cublas(folder, n, k, epilogue, dtype, capability) -> None:
    assert choose_plan(1025, n, k, epilogue, dtype, TARGETS[capability], folder=folder) == CUBLAS


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, LOW), (256, LOW), (257, APART), (1024, APART), (1025, WIDE), (3328, WIDE), (3329, APART)],
)
def test_the_projector_chooses_by_its_visual_tokens(folder: Path, tokens: int, expected: GemmPlan) -> None:
    assert choose_projection_plan(tokens, 896, 4096, torch.bfloat16, H200, folder=folder) == expected
    assert choose_projection_plan(tokens, 896, 4095, torch.bfloat16, H200, folder=folder) == APART
    assert choose_projection_plan(tokens, 896, 4096, torch.float32, H200, folder=folder) == APART
    assert choose_projection_plan(tokens, 896, 4096, torch.bfloat16, TARGETS[80], folder=folder) == APART


@pytest.mark.parametrize(("tiles", "expected"), [(1, FLAT), (2, TALL), (13, TALL), (14, TALL)])
def test_more_tiles_than_were_measured_are_more_of_the_same(folder: Path, tiles: int, expected: AttentionPlan) -> None:
    assert choose_attention_plan(tiles, 1024, 16, 64, torch.bfloat16, H200, folder=folder) == expected


@pytest.mark.parametrize(
    ("patches", "heads", "channels", "dtype", "capability"),
    [
        (1023, 16, 64, torch.bfloat16, 90),
        (1024, 15, 64, torch.bfloat16, 90),
        (1024, 16, 128, torch.bfloat16, 90),
        (1024, 16, 64, torch.float32, 90),
        (1024, 16, 64, torch.bfloat16, 80),
    ],
)
def test_attention_that_was_not_measured_has_no_plan(folder, patches, heads, channels, dtype, capability) -> None:
    assert choose_attention_plan(1, patches, heads, channels, dtype, TARGETS[capability], folder=folder) is None


def test_an_installation_without_its_tables_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="install internvl_rt again"):
        choose_plan(1, 1, 1, "none", torch.bfloat16, H200, folder=tmp_path / "plans")


def test_the_tables_of_the_package_are_read_for_targets_that_exist() -> None:
    paths = {path.stem: path for path in FOLDER.iterdir()}
    assert "sm_90" in paths
    for name, path in paths.items():
        load_tables(path, TARGETS[int(name.removeprefix("sm_"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "the tables: expected an object with the keys"),
        ({"measured": {"date": "today"}}, "expected an object with the keys .'date', 'gpu', 'torch', 'triton'"),
        ({"measured": {**MEASURED, "triton": 3.6}}, "measured: expected texts, got .*3.6"),
        ({"measured": None}, "expected no plans where `measured` is null"),
        ({"gemm_epilogue": 3}, "gemm_epilogue: expected a list, got 3"),
        ({"gemm_epilogue": [None]}, r"gemm_epilogue\[0\]: expected an object"),
        (
            {"gemm_epilogue": [entry(64, LOW), entry(64, WIDE)]},
            r"gemm_epilogue\[1\]: a plan for up to 64 is there twice",
        ),
        ({"gemm_epilogue": [entry(64, LOW) | {"why": "fast"}]}, "expected an object with the keys"),
        ({"gemm_epilogue": [entry(64, LOW, epilogue="silu")]}, "epilogue: expected one of .* got 'silu'"),
        ({"gemm_epilogue": [entry(0, LOW)]}, "m_max: expected a positive integer, got 0"),
        ({"gemm_epilogue": [entry(True, LOW)]}, "m_max: expected a positive integer, got True"),
        ({"gemm_epilogue": [entry(64, LOW, n=8.0)]}, "n: expected a positive integer, got 8.0"),
        ({"gemm_epilogue": [entry(64, LOW) | {"plan": {"kind": "fused"}}]}, "expected an object with the keys"),
        ({"gemm_epilogue": [entry(64, LOW) | {"plan": {"kind": "split"}}]}, "expected an object with the keys"),
        ({"gemm_epilogue": [entry(64, replace(LOW, kind="cublas"))]}, "expected 'fused'.* got 'cublas'"),
        ({"gemm_epilogue": [entry(64, replace(LOW, block_k=48))]}, "block_k: expected one of .* got 48"),
        ({"gemm_epilogue": [entry(64, replace(LOW, num_warps=4.0))]}, "num_warps: expected one of .* got 4.0"),
        ({"gemm_epilogue": [entry(64, replace(LOW, use_tma=1))]}, "use_tma: expected one of .* got 1"),
        ({"gemm_epilogue": [entry(64, replace(WIDE, num_stages=5))]}, "at most 232448 bytes .* got 245760"),
        ({"unshuffle_project": [entry(64, LOW)]}, r"unshuffle_project\[0\]: expected an object with the keys .'k', "),
        (
            {"unshuffle_project": [projection(64, LOW) | {"plan": {"kind": "cublas"}}]},
            "expected an object with the keys .'block_k'",
        ),
        ({"unshuffle_project": [projection(64, replace(LOW, kind="apart"))]}, "expected 'fused'.* got 'apart'"),
        ({"unshuffle_project": [projection(0, LOW)]}, "m_max: expected a positive integer, got 0"),
        (
            {"unshuffle_project": [projection(64, APART), projection(64, WIDE)]},
            r"unshuffle_project\[1\]: a plan for up to 64 is there twice",
        ),
        ({"vit_attention": {}}, "vit_attention: expected a list, got {}"),
        ({"vit_attention": [entry(64, LOW)]}, r"vit_attention\[0\]: expected an object with the keys .'channels', "),
        ({"vit_attention": [attention(1, FLAT), attention(1, TALL)]}, "a plan for up to 1 is there twice"),
        ({"vit_attention": [attention(0, FLAT)]}, "tiles_max: expected a positive integer, got 0"),
        ({"vit_attention": [attention(1, FLAT, heads=16.0)]}, "heads: expected a positive integer, got 16.0"),
        (
            {"vit_attention": [attention(1, FLAT) | {"plan": {"block_m": 64}}]},
            "expected an object with the keys .'block_m'",
        ),
        ({"vit_attention": [attention(1, replace(FLAT, block_n=96))]}, "block_n: expected one of .* got 96"),
        (
            {"vit_attention": [attention(1, replace(FLAT, host_descriptor=1))]},
            "host_descriptor: expected one of .* got 1",
        ),
        ({"vit_attention": [attention(1, replace(FLAT, num_warps=True))]}, "num_warps: expected one of .* got True"),
        (
            {"vit_attention": [attention(1, AttentionPlan(128, 128, 8, 4), channels=128)]},
            "at most 232448 bytes .* got 262144",
        ),
    ],
)
def test_a_broken_table_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, tables(**{"gemm_epilogue": [entry(64, LOW)], **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_tables(path, H200)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"measured": null', "\x00"])
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"sm_90\.json: the tables: "):
        load_tables(path, H200)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_tiling_can_be_built_for_its_target(target) -> None:
    for plan in tilings(target).values():
        check_plan(plan, 2, target)
    assert len(set(tilings(target).values())) >= 3
    for plan in projection_tilings(target).values():
        check_plan(plan, 2, target, unfused=(APART,))
    assert len(set(projection_tilings(target).values())) == 3


@pytest.mark.parametrize(
    ("plan", "capability", "dtype", "message"),
    [
        ("tall", 90, torch.bfloat16, "plan: expected one of .*'cublas', 'cublas_twice', 'wide', .* got 'tall'"),
        (replace(WIDE, use_tma=False), 89, torch.bfloat16, "plan: expected at most 101376 bytes .* on sm_89"),
        (WIDE, 90, torch.float32, "plan: expected at most 232448 bytes"),
        (replace(SQUARE, kind="split"), 90, torch.bfloat16, "plan: kind: expected one of"),
        (replace(CUBLAS, block_m=64), 90, torch.bfloat16, "plan: expected the plan 'cublas' without blocks"),
    ],
)
def test_a_plan_that_the_target_cannot_run_is_refused(plan, capability, dtype, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_plan(plan, 64, 4096, 1024, "gelu", dtype, TARGETS[capability])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("cublas", "plan: expected one of .'apart', 'wide', .* got 'cublas'"),
        (CUBLAS, "plan: kind: expected one of"),
        (replace(APART, block_m=64), "plan: expected the plan 'apart' without blocks"),
        (replace(WIDE, num_stages=5), "plan: expected at most 232448 bytes"),
    ],
)
def test_a_plan_that_the_projector_cannot_have_is_refused(plan: GemmPlan | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_projection_plan(plan, 64, 896, 4096, torch.bfloat16, H200)
    with pytest.raises(ValueError, match=r"plan: expected one of .* got 'apart'"):
        resolve_plan("apart", 64, 896, 4096, "gelu", torch.bfloat16, H200)
