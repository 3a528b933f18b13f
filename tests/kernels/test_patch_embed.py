"""Tests `patch_embed` beyond its contract: mixed dtypes, layouts of tiles and weights, refusals."""

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels.patch_embed import normalise_tiles_reference, patch_embed, patch_embed_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, PATCH, GRID, NUM_TILES = 24, 4, 3, 2
SIDE, DEPTH, TOKENS = PATCH * GRID, 3 * PATCH * PATCH, GRID * GRID + 1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tiles = torch.randint(0, 256, (NUM_TILES, SIDE, SIDE, 3), dtype=torch.uint8)
    shapes = {
        "weight_EK": (WIDTH, DEPTH),
        "bias_E": (WIDTH,),
        "class_E": (WIDTH,),
        "position_UE": (TOKENS, WIDTH),
    }
    weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {name: tensor.to(DEVICE) for name, tensor in {"tiles": tiles, **weights}.items()}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_tiles_of_bytes_and_their_normalised_form_give_the_same_rows() -> None:
    inputs = arguments()
    normalised = {**inputs, "tiles": normalise_tiles_reference(inputs["tiles"])}
    close(patch_embed(**inputs), patch_embed(**normalised))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_tiles_may_have_another_dtype_than_the_weights(dtype: torch.dtype) -> None:
    inputs = arguments()
    inputs["tiles"] = normalise_tiles_reference(inputs["tiles"]).to(dtype)
    close(patch_embed(**inputs), patch_embed_reference(**inputs))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 1, 2), (1, 2, 0, 3), (2, 1, 3, 0)])
def test_tiles_are_read_in_any_memory_order(order: tuple[int, ...]) -> None:
    inputs = arguments()
    stored = inputs["tiles"].permute(order).contiguous()
    back = [order.index(dim) for dim in range(4)]
    tiles = stored.permute(back)
    assert torch.equal(tiles, inputs["tiles"])
    close(patch_embed(**{**inputs, "tiles": tiles}), patch_embed_reference(**inputs))


def test_one_tile_may_stand_for_many() -> None:
    inputs = arguments()
    repeated = inputs["tiles"][:1].expand(3, -1, -1, -1)
    close(patch_embed(**{**inputs, "tiles": repeated}), patch_embed_reference(**{**inputs, "tiles": repeated}))


def test_rows_of_weights_positions_and_output_may_lie_apart() -> None:
    inputs = arguments()
    expected = patch_embed_reference(**inputs)
    for name in ("weight_EK", "position_UE"):
        wide = torch.full((inputs[name].shape[0], inputs[name].shape[1] + 3), torch.nan, device=DEVICE)
        wide[:, :-3] = inputs[name]
        inputs[name] = wide[:, :-3]
    buffer = torch.full((NUM_TILES * TOKENS, WIDTH + 5), torch.nan, device=DEVICE)
    close(patch_embed(**inputs, out=buffer[:, :WIDTH]), expected)
    assert buffer[:, WIDTH:].isnan().all()


def test_class_rows_are_exact_whatever_the_pixels_are() -> None:
    inputs = arguments()
    inputs["tiles"] = torch.full((NUM_TILES, 3, SIDE, SIDE), torch.nan, device=DEVICE)
    rows = patch_embed(**inputs)
    assert rows[: NUM_TILES * (TOKENS - 1)].isnan().all()
    expected = (inputs["class_E"] + inputs["position_UE"][0]).expand(NUM_TILES, -1)
    torch.testing.assert_close(rows[NUM_TILES * (TOKENS - 1) :], expected, rtol=0, atol=0)


@pytest.mark.usefixtures("one_order_of_sums")
def test_a_tile_embeds_the_same_bits_wherever_it_stands() -> None:
    inputs = arguments()
    alone = patch_embed(**{**inputs, "tiles": inputs["tiles"][1:]})
    together = patch_embed(**inputs)
    patches = TOKENS - 1
    assert torch.equal(together[patches : 2 * patches], alone[:patches])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_EK": zeros(WIDTH, DEPTH, dtype=torch.float64)}, "weight_EK: expected one of"),
        ({"weight_EK": zeros(WIDTH, 3, PATCH, PATCH)}, r"weight_EK: expected shape \[E, K\], got \(24, 3, 4, 4\)"),
        ({"weight_EK": zeros(WIDTH, 47)}, r"weight_EK: expected shape \[E, 3 \* patch \* patch\], got \(24, 47\)"),
        ({"weight_EK": zeros(WIDTH, 0)}, r"weight_EK: expected shape \[E, 3 \* patch \* patch\], got \(24, 0\)"),
        ({"weight_EK": zeros(DEPTH, WIDTH).T}, "weight_EK: expected a contiguous last dimension"),
        ({"tiles": zeros(2, SIDE, SIDE, 3, dtype=torch.int32)}, "tiles: expected one of"),
        (
            {"tiles": zeros(SIDE, SIDE, 3, dtype=torch.uint8)},
            r"tiles: expected shape \[I, S, S, 3\], got \(12, 12, 3\)",
        ),
        ({"tiles": zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)}, r"tiles: expected shape \[I, S, S, 3\] with equal"),
        ({"tiles": zeros(2, SIDE, SIDE, 3)}, r"tiles: expected shape \[I, 3, S, S\] with equal sides"),
        ({"tiles": zeros(2, 3, SIDE, 8)}, r"tiles: expected shape \[I, 3, S, S\] with equal sides"),
        ({"tiles": zeros(2, 13, 13, 3, dtype=torch.uint8)}, "tiles: expected sides that are multiples of the patch 4"),
        ({"tiles": zeros(2, 0, 0, 3, dtype=torch.uint8)}, "tiles: expected sides that are multiples of the patch 4"),
        ({"bias_E": zeros(WIDTH + 1)}, r"bias_E: expected shape \(24,\), got \(25,\)"),
        ({"class_E": zeros(WIDTH, dtype=torch.float16)}, "class_E: expected torch.float32, got torch.float16"),
        ({"position_UE": zeros(TOKENS - 1, WIDTH)}, r"position_UE: expected shape \(10, 24\), got \(9, 24\)"),
        ({"out": zeros(NUM_TILES * TOKENS + 1, WIDTH)}, r"out: expected shape \(20, 24\), got \(21, 24\)"),
        ({"tiles": torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8, device="meta")}, "tiles: expected a tensor on"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_embed(**{**arguments(), **change})
