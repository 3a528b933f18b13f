"""Every table of operations computes attention with sinks and windows, of mixed batches, as a dense softmax does."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._kv_numbers import KV_FORMATS
from internvl_rt.model import processor
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.ops_invariant import invariant_ops
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.step_inputs import Batch
from support.cpu_tables import table
from support.dense_attention import Drawn, assert_near, draw
from support.small_models import DEVICE

CPU = torch.device("cpu")
HEADS = (8, 1, 16)
onednn = pytest.mark.skipif(not processor.runs_onednn(), reason="oneDNN has no products for this processor")
TABLES: dict[str, Callable[[], Ops]] = {
    "torch": lambda: TORCH,
    "avx2": lambda: table(avx512=False),
    "avx512": lambda: table(avx512=True),
    "triton": lambda: triton_ops(DEVICE),
    "invariant": lambda: invariant_ops(DEVICE),
}
of_cpus = [pytest.param(name, marks=onednn if name.startswith("avx") else ()) for name in ("torch", "avx2", "avx512")]


@pytest.fixture(autouse=True)
def everything_is_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few blocks or scores are computed at once, as where sequences are long."""
    torch.manual_seed(0)
    monkeypatch.setattr("internvl_rt.model.ops_cpu.FEW_SCORES", 0)
    monkeypatch.setattr("internvl_rt.model.attention_cpu.AT_ONCE", 2000)
    monkeypatch.setattr("internvl_rt.kernels._paged_attention.AT_ONCE", 2000)


def attend(ops: Ops, drawn: Drawn) -> Tensor:
    return ops.paged_attention(drawn.q_THC, drawn.cache, drawn.batch, **drawn.how)


@torch.inference_mode()
@pytest.mark.parametrize("sink", [None, -10.0, 0.0, 10.0, -1e30])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 128])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", of_cpus)
def test_tables_for_cpus(name: str, block_size: int, window: int | None, sink: float | None) -> None:
    lens, chunks = (1, 127, 128, 129, 500), ((0, 1), (0, 33), (120, 9), (300, 2))
    how = {"window": window, "sink": sink, "block_size": block_size, "dtype": torch.float32}
    for drawn in (draw(lens, chunks, heads=(4, 2, 16), **how), draw((1, 16, 3), heads=HEADS, **how)):
        assert_near(attend(TABLES[name](), drawn), drawn.expected_THC, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 1, 16, 100])
@pytest.mark.parametrize("numbers", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("name", of_cpus)
def test_caches_in_8_bits_on_cpus(name: str, numbers: torch.dtype, window: int | None) -> None:
    drawn = draw((1, 127, 300), ((100, 9),), window=window, sink=0.0, numbers=numbers, heads=HEADS, dtype=torch.float32)
    assert_near(attend(TABLES[name](), drawn), drawn.expected_THC, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", of_cpus)
def test_bfloat16_on_cpus(name: str) -> None:
    how = {"window": 100, "heads": HEADS, "dtype": torch.bfloat16}
    for sink in (None, 0.0, 10.0):
        drawn = draw((1, 127, 300), ((100, 9), (0, 60)), sink=sink, **how)
        actual = attend(TABLES[name](), drawn)
        assert actual.dtype == torch.bfloat16
        assert_near(actual, drawn.expected_THC, 0.03)


@onednn
@torch.inference_mode()
@pytest.mark.parametrize("lens", [(20, 36, 52), (48, 64, 16), (100, 3, 33)])
def test_layers_of_both_kinds_share_a_step_on_a_cpu(lens: tuple[int, ...]) -> None:
    """What is planned once a step is planned once for each window."""
    ops, drawn = table(avx512=True), draw(lens, window=None, sink=0.0, heads=HEADS, dtype=torch.float32)
    whole = attend(ops, drawn)
    narrow = attend(ops, dataclasses.replace(drawn, window=16))
    assert_near(whole, drawn.expected_THC, 1e-5)
    assert (narrow - whole).abs().amax((1, 2)).gt(1e-3).tolist() == [length > 16 for length in lens]
    assert torch.equal(attend(ops, drawn), whole)
    assert torch.equal(attend(ops, dataclasses.replace(drawn, window=16)), narrow)


@pytest.mark.fast("triton-16-0.0", "invariant-128-0.0")
@torch.inference_mode()
@pytest.mark.parametrize("sink", [None, 0.0, 10.0])
@pytest.mark.parametrize("window", [None, 1, 16, 128])
@pytest.mark.parametrize("name", ["triton", "invariant"])
def test_tables_of_the_kernels(name: str, window: int | None, sink: float | None) -> None:
    lens, chunks = (1, 129, 300), ((0, 1), (0, 33), (120, 9))
    drawn = draw(lens, chunks, window=window, sink=sink, heads=HEADS, dtype=torch.float32, device=DEVICE)
    assert_near(attend(TABLES[name](), drawn), drawn.expected_THC, 1e-5)


@torch.inference_mode()
@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("window", [5, 40])
def test_a_token_has_the_same_bits_in_whatever_chunks_and_as_a_decode(window: int) -> None:
    ops = invariant_ops(DEVICE)
    drawn = draw((), ((0, 90),), window=window, sink=0.0, heads=HEADS, dtype=torch.float32, device=DEVICE)
    whole = attend(ops, drawn)
    assert_near(whole, drawn.expected_THC, 1e-5)

    def chunk(first: int, stop: int, num_decodes: int) -> Tensor:
        starts = [0] if num_decodes else [0, stop - first]
        numbers = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([stop], starts))
        seq_len_S, query_start_R1 = numbers
        batch = Batch(seq_len_S, drawn.batch.block_table_SN, query_start_R1, num_decodes, stop - first)
        return attend(ops, dataclasses.replace(drawn, q_THC=drawn.q_THC[first:stop], batch=batch))

    for first, stop in ((0, 1), (0, 33), (33, 40), (40, 41), (41, 90)):
        assert torch.equal(chunk(first, stop, 0), whole[first:stop])
    for token in (0, 4, 5, 63, 64, 89):
        assert torch.equal(chunk(token, token + 1, 1), whole[token : token + 1])
