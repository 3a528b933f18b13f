"""Tests `vit_attention` beyond its contract: refusals, the choice of loads, and that tiles are independent."""

import math
from typing import Any

import pytest
import torch

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels._plans import AttentionPlan
from internvl_rt.kernels.vit_attention import SPEC, plan_vit_attention, vit_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES, PATCHES, HEADS, CHANNELS = 2, 4, 3, 16
WIDTH, ROWS = HEADS * CHANNELS, TILES * (PATCHES + 1)


def arguments(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    qkv = torch.randn(ROWS, 3 * WIDTH, device=DEVICE)
    norms = {name: torch.ones(WIDTH, device=DEVICE) for name in ("q_norm_E", "k_norm_E")}
    return {"qkv_RK": qkv, "num_tiles": TILES, "head_dim": CHANNELS, **norms, "eps": 1e-6, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_RK": torch.zeros(ROWS, 3 * WIDTH, dtype=torch.float64)}, "qkv_RK: expected one of .*float64"),
        ({"qkv_RK": torch.zeros(1, ROWS, 3 * WIDTH)}, "qkv_RK: expected two dimensions, got 3"),
        ({"qkv_RK": torch.zeros(ROWS, 3 * WIDTH + 16)}, "qkv_RK: expected 3 . H . 16 columns"),
        ({"qkv_RK": torch.zeros(ROWS, 0)}, "qkv_RK: expected 3 . H . 16 columns"),
        ({"qkv_RK": torch.zeros(3 * WIDTH, ROWS).t()}, "qkv_RK: expected a contiguous last dimension"),
        ({"qkv_RK": torch.zeros(ROWS, 3 * 1025 * 16)}, "qkv_RK: expected with norms at most 16384 channels"),
        *(({"head_dim": c}, f"head_dim: expected one of .16, 32, 64, 128., got {c}") for c in (0, 8, 24, 80, 256)),
        *(({"num_tiles": n}, f"num_tiles: expected a divisor of 10 rows, got {n}") for n in (-1, 0, 3, 11)),
        ({"q_norm_E": None}, "k_norm_E: expected both norms or neither"),
        ({"k_norm_E": None}, "k_norm_E: expected both norms or neither"),
        ({"q_norm_E": torch.ones(CHANNELS)}, "q_norm_E: expected shape .48,., got .16,."),
        ({"k_norm_E": torch.ones(WIDTH, dtype=torch.float16)}, "k_norm_E: expected torch.float32, got torch.float16"),
        ({"plan": AttentionPlan(128, 48, 8, 2)}, "plan: block_n: expected one of .* got 48"),
        ({"plan": AttentionPlan(128, 64, 8, 0)}, "plan: num_stages: expected one of .* got 0"),
        ({"out": torch.zeros(ROWS, WIDTH + 1)}, "out: expected shape"),
        ({"out": torch.zeros(WIDTH, ROWS).t()}, "out: expected a contiguous last dimension"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    moved = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        vit_attention(**arguments(**moved))


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy warns of this in the interpreter
@pytest.mark.parametrize("patches", [64, 65])  # 64 are read by tensor descriptors, 65 by pointers with a mask
def test_a_tile_does_not_depend_on_the_tiles_beside_it(patches: int) -> None:
    case = Case("three", {"I": 3, "L": patches, "H": 1, "C": 16})
    inputs = SPEC.make_inputs(case, torch.float16, DEVICE)
    qkv = inputs["qkv_RK"]
    rows = [[*range(tile * patches, (tile + 1) * patches), 3 * patches + tile] for tile in range(3)]
    alone = [vit_attention(**{**inputs, "qkv_RK": qkv[rows[tile]], "num_tiles": 1}) for tile in range(3)]
    qkv[rows[1]] = math.nan
    together = vit_attention(**inputs)
    assert torch.equal(together[rows[0]], alone[0])
    assert torch.equal(together[rows[2]], alone[2])
    assert together[rows[1]].isnan().all()


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("case", SPEC.model_cases, ids=lambda case: case.name)
def test_real_models_read_keys_by_the_copy_engine_where_there_is_one(case: Case, capability: int) -> None:
    assert uses_tma(case, capability) == (capability in (90, 100))


@pytest.mark.parametrize(
    "sizes",
    [
        {"L": 1000},  # the copy engine's boxes of keys would reach into the next tile
        {"L": 0},
        {"L": 1024, "padding": 4},  # the rows do not begin at multiples of 16 bytes
    ],
)
def test_pointers_are_used_where_boxes_do_not_fit(sizes: dict[str, int]) -> None:
    assert not uses_tma(Case("other", {"I": 2, "H": 16, "C": 64, **sizes}), 90)


def test_what_was_measured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A given plan comes first, then the measured plan for the tiles, patches, heads and channels, then the default."""
    asked = []

    def choose(*sizes: Any) -> AttentionPlan | None:
        asked.append(sizes[:4])
        return AttentionPlan(64, 128, num_warps=4, num_stages=2) if sizes[0] == 13 else None

    monkeypatch.setattr("internvl_rt.kernels.vit_attention.choose_attention_plan", choose)

    def blocks(case: Case, **given: Any) -> tuple[int, int, int, int, int]:
        inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta")) | given
        launch = plan_vit_attention(**inputs, out=torch.empty_like(SPEC.reference(**inputs)), target=TARGETS[90])[-1]
        constexprs = launch.constexprs
        return constexprs["BLOCK_M"], constexprs["BLOCK_N"], launch.num_warps, launch.num_stages, launch.grid[0]

    one, many = (next(case for case in SPEC.model_cases if case.name == f"vit_300m_{n}_tiles") for n in (1, 13))
    assert blocks(many) == (64, 128, 4, 2, 13 * 16 * 17)
    assert blocks(one) == (128, 64, 8, 3, 16 * 9)
    assert blocks(many, plan=AttentionPlan(256, 64, 16, 2)) == (256, 64, 16, 2, 13 * 16 * 5)
    assert asked == [(13, 1024, 16, 64), (1, 1024, 16, 64)]


@pytest.mark.parametrize(("patches", "padding", "made"), [(1024, 0, True), (1000, 0, False), (1024, 4, False)])
def test_the_host_makes_a_descriptor_only_where_boxes_fit(patches: int, padding: int, made: bool) -> None:
    """In no case does the kernel make the descriptor itself, which would need scratch memory."""
    case = Case("other", {"I": 2, "L": patches, "H": 16, "C": 64, "padding": padding})
    inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
    inputs["plan"] = AttentionPlan(128, 64, num_warps=8, num_stages=3, host_descriptor=True)
    launch = plan_vit_attention(**inputs, out=torch.empty_like(SPEC.reference(**inputs)), target=TARGETS[90])[-1]
    assert not launch.descriptors
    assert ("descriptor" in launch.args) == made
    if made:
        descriptor = launch.args["descriptor"]
        assert descriptor.base is inputs["qkv_RK"]
        assert (descriptor.shape, descriptor.strides) == ([2 * 1025, 3 * 1024], [3 * 1024, 1])
        assert descriptor.block_shape == [64, 64]


def uses_tma(case: Case, capability: int) -> bool:
    inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
    out = torch.empty_like(SPEC.reference(**inputs))
    flag = plan_vit_attention(**inputs, out=out, target=TARGETS[capability])[-1].constexprs["USE_TMA"]
    assert isinstance(flag, bool)
    return flag
