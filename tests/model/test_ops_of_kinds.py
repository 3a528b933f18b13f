"""Every table multiplies every kind of linear as the references do, whatever the number of rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.checkpoint.quantization import FOUR_BITS, Scheme
from internvl_rt.kernels._int4 import pack_int4
from internvl_rt.model.internvl import InternVL, ModelWeights, map_linears
from internvl_rt.model.linear import AnyLinear, Linear, Linear4, Linear8, Norm, quantise_to_8_bits
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.ops_invariant import invariant_ops
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.stored_linear import quantise_shapes
from support.forward import all_logits
from support.small_models import DEVICE, EXPERTS, INTERNLM2, QWEN2, QWEN3, build_model

TOKENS = [*range(5, 20), *[47] * 4, *range(30, 35)]


def in_4_bits(linear: Linear, *, symmetric: bool) -> Linear4:
    """Rounds to the nearest, in groups of 32."""
    groups = linear.weight_NK.view(linear.num_outputs, -1, 32)
    least, most = groups.amin(-1), groups.amax(-1)
    scale = torch.maximum(-least, most) / 7 if symmetric else (most - least) / 15
    zero = torch.full_like(scale, 8) if symmetric else (-least / scale).round().clamp(0, 15)
    number = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
    zeros = None if symmetric else zero.to(torch.uint8)
    return Linear4(pack_int4(number.view_as(linear.weight_NK)), scale, zeros, linear.bias_N, linear.num_inputs, 32)


def in_blocks(linear: Linear) -> Linear8:
    """Has a scale for every 128 columns of a row, as files with scales of blocks do."""
    whole = quantise_to_8_bits(linear, torch.float8_e4m3fn)
    scale_NG = whole.scale_NG * torch.rand(linear.num_outputs, -(-linear.num_inputs // 128), device=DEVICE).add(0.5)
    return Linear8(whole.weight_NK, scale_NG, linear.bias_N)


KINDS: dict[str, Any] = {
    "fp8": lambda linear: quantise_to_8_bits(linear, torch.float8_e4m3fn),
    "fp8 blocks": in_blocks,
    "int8": lambda linear: quantise_to_8_bits(linear, torch.int8),
    "int4": lambda linear: in_4_bits(linear, symmetric=True),
    "int4 asymmetric": lambda linear: in_4_bits(linear, symmetric=False),
}
kinds = pytest.mark.parametrize("kind", KINDS)
tables = pytest.mark.parametrize("table", [triton_ops, invariant_ops], ids=["triton", "invariant"])


def quantised(weights: ModelWeights, kind: str) -> ModelWeights:
    def quantise(path: str, linear: AnyLinear) -> AnyLinear:
        assert isinstance(linear, Linear)
        is_dense = not path.startswith("decoder.layers.") or path.endswith(".router")
        made: AnyLinear = linear if is_dense else KINDS[kind](linear)
        return made

    return map_linears(weights, quantise)


def assert_near(actual: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < limit, f"relative error {error:.3g}"


@pytest.mark.fast("triton-fp8-qwen2")
@torch.inference_mode()
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3, INTERNLM2, EXPERTS], ids=["qwen2", "qwen3", "internlm2", "experts"])
@kinds
@tables
def test_a_quantised_decoder_equals_the_references_in_prompts_and_decodes(table: Any, kind: str, decoder: Any) -> None:
    model = build_model(decoder=decoder)
    model = InternVL(model.config, quantised(model.weights, kind), TORCH)
    dense = map_linears(model.weights, lambda _, linear: Linear(linear.dense(torch.float32), linear.bias_N))
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    expected = all_logits(InternVL(model.config, dense, TORCH), TOKENS, tiles, context_id=47)
    assert_near(all_logits(model, TOKENS, tiles, context_id=47), expected)
    model = InternVL(model.config, model.weights, table(DEVICE))
    assert_near(all_logits(model, TOKENS, tiles, context_id=47, chunk_lens=[20, 1, 3]), expected)


@pytest.mark.fast("17-int8", "64-int4")
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 33, 64, 65])
def test_products_in_pieces_are_those_of_all_rows(num_rows: int, kind: str) -> None:
    ops, linear = triton_ops(DEVICE), KINDS[kind](Linear(torch.randn(48, 96, device=DEVICE), None))
    x, residual = torch.randn(num_rows, 96, device=DEVICE), torch.randn(num_rows, 24, device=DEVICE)
    norm = Norm(torch.rand(96, device=DEVICE), None, 1e-6)
    for how in ({"norm": norm}, {"norm": norm, "activation": "swiglu"}):
        # All gates of one row may be small, as differences of large sums: 2.3e-5 was the most of 300 seeds.
        limit = 1e-4 if "activation" in how else 2e-5
        assert_near(ops.linear(x, linear, **how), TORCH.linear(x, linear, **how), limit)
    half = linear.take_rows(slice(24))
    expected = TORCH.linear(x, half, residual=residual)
    assert_near(ops.linear(x, half, residual=residual), expected)  # in the residual's memory


@pytest.mark.fast("token-qwen2")
@torch.inference_mode()
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("inputs", ["token", "static"])
@pytest.mark.usefixtures("one_order_of_sums")  # without it the interpreter cuts bits off instead of rounding to FP8
def test_prompts_round_the_inputs_of_fp8_products_as_the_references_do(inputs: Any, decoder: Any) -> None:
    """A sum in another order may round an input to the next FP8 number, so results are only about equal."""

    def quantise(path: str, linear: AnyLinear) -> AnyLinear:
        assert isinstance(linear, Linear)
        if not path.startswith("decoder.layers."):
            return linear
        made = quantise_to_8_bits(linear, torch.float8_e4m3fn, inputs)
        return made if inputs == "token" else replace(made, input_scale_1=torch.full((1,), 2.0**-5, device=DEVICE))

    model = build_model(decoder=decoder)
    weights = map_linears(model.weights, quantise)
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    expected = all_logits(InternVL(model.config, weights, TORCH), TOKENS, tiles, context_id=47)
    actual = all_logits(InternVL(model.config, weights, triton_ops(DEVICE)), TOKENS, tiles, context_id=47)
    dense = map_linears(weights, lambda _, linear: Linear(linear.dense(torch.float32), linear.bias_N))
    exact = all_logits(InternVL(model.config, dense, TORCH), TOKENS, tiles, context_id=47)
    assert (actual - expected).norm() < 0.005 * expected.norm()
    assert (exact - expected).norm() > 0.01 * expected.norm()


@torch.inference_mode()
@pytest.mark.parametrize("inputs", ["token", "static"])
def test_the_references_round_the_inputs_of_fp8_products_as_the_file_says(inputs: Any) -> None:
    linear = quantise_to_8_bits(Linear(torch.randn(16, 64), torch.randn(16)), torch.float8_e4m3fn, inputs)
    scale = torch.tensor([2.0**-6])
    if inputs == "static":
        linear = Linear8(linear.weight_NK, linear.scale_NG, linear.bias_N, inputs, scale)
    x = torch.randn(5, 64)
    x[0] = 0
    scales = scale if inputs == "static" else x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    rounded = (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales
    wanted = rounded @ linear.dense(torch.float32).t() + linear.bias_N
    assert torch.allclose(TORCH.linear(x, linear), wanted, atol=1e-5)
    assert not torch.allclose(TORCH.linear(x, linear), x @ linear.dense(torch.float32).t() + linear.bias_N, atol=1e-3)
    one_row = TORCH.linear(x[2:3], linear)
    assert torch.allclose(TORCH.linear(x, linear)[2:3], one_row, atol=1e-6)


def test_the_shapes_of_a_kind_are_known_before_a_number_is() -> None:
    dense = Linear(torch.empty(24, 320, device="meta"), None)
    four = quantise_shapes(dense, FOUR_BITS.groups[0][1])
    assert isinstance(four, Linear4)
    assert (four.words_NW.shape, four.scale_NG.shape, four.num_inputs) == ((24, 48), (24, 3), 320)
    blocks = quantise_shapes(dense, Scheme("compressed", 8, is_float=True, group=128, block_rows=128))
    assert isinstance(blocks, Linear8)
    assert (blocks.weight_NK.shape, blocks.scale_NG.shape) == ((24, 320), (24, 3))


@torch.inference_mode()
@kinds
@pytest.mark.usefixtures(
    "one_order_of_sums"
)  # without it the interpreter cuts bits off instead of rounding to bfloat16
def test_every_table_has_the_dense_weight_of_a_kind(kind: str) -> None:
    linear = KINDS[kind](Linear(torch.randn(40, 160, device=DEVICE), None))
    tables: tuple[Ops, ...] = (TORCH, triton_ops(DEVICE))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for ops in tables:
            assert torch.equal(ops.dense(linear, dtype), linear.dense(dtype))
