"""Passes and steps from graphs: which one runs, what it reads, whose memory the result is."""

from functools import partial

import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.cuda_graph import TILE_BUCKETS, DecodeGraphs, Replay, TileGraphs, decode_buckets

SIDE = 4


def encode(tiles: Tensor) -> Tensor:
    """Stands in for the model: [I, 2, 3] of each tile alone."""
    return tiles.float().flatten(1)[:, :6].view(-1, 2, 3) * 2


class Recorder:
    """Captures without a GPU: a replay computes again into the first result, as a graph does."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, compute):
        result = compute()
        self.captured.append(len(result))

        def run() -> None:
            self.replayed.append(len(result))
            result.copy_(compute())

        return Replay(run, result)


def build(buckets=(1, 2, 4)):
    recorder = Recorder()
    return TileGraphs(encode, SIDE, torch.device("cpu"), buckets=buckets, capture=recorder), recorder


def draw(num_tiles: int) -> Tensor:
    return torch.randint(0, 256, (num_tiles, SIDE, SIDE, 3), dtype=torch.uint8)


def test_all_buckets_are_captured_the_largest_first() -> None:
    graphs, recorder = build((1, 4, 2))
    assert recorder.captured == [4, 2, 1]
    assert graphs.max_tiles == 4


@pytest.mark.parametrize(("num_tiles", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_the_smallest_bucket_that_holds_the_tiles_runs(num_tiles: int, bucket: int) -> None:
    graphs, recorder = build()
    tiles = draw(num_tiles)
    assert torch.equal(graphs.encode(tiles), encode(tiles))
    assert recorder.replayed == [bucket]


def test_a_result_outlives_the_next_replay() -> None:
    graphs, _ = build()
    first_tiles = draw(3)
    first = graphs.encode(first_tiles)
    graphs.encode(draw(4))
    assert torch.equal(first, encode(first_tiles))


def test_the_default_buckets_hold_every_picture_of_the_official_grid_exactly() -> None:
    assert set(range(1, 14)) <= set(TILE_BUCKETS)


@pytest.mark.gpu
@torch.inference_mode()
def test_replay_equals_eager_bit_for_bit() -> None:
    device = torch.device("cuda")
    weight = torch.randn(SIDE * SIDE * 3, 64, device=device, dtype=torch.bfloat16)

    def compute(tiles: Tensor) -> Tensor:
        return torch.nn.functional.gelu(tiles.flatten(1).bfloat16() @ weight)[:, None]

    graphs = TileGraphs(compute, SIDE, device, buckets=(1, 2, 4))
    for num_tiles in (1, 2, 3, 4) * 250:
        tiles = draw(num_tiles)
        padded = torch.zeros(4 if num_tiles == 3 else num_tiles, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
        padded[:num_tiles] = tiles
        assert torch.equal(graphs.encode(tiles), compute(padded)[:num_tiles])


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_decode_buckets_end_with_the_most_sequences(most: int, expected: list[int]) -> None:
    assert decode_buckets(most) == expected


@torch.inference_mode()
def test_decode_steps_from_graphs_give_the_tokens_of_eager_steps() -> None:
    """Batches between buckets, sequences that come and go; the replays really run, prefills do not."""
    questions = ["Hello", "Read the digits.", "And now?"]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 6, 4)]
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32", max_model_len=64) as engine:
        expected = [reply.token_ids for reply in engine.generate(conversations, params)]
        recorder = Recorder()
        compute = partial(engine.model.run_step, caches=engine.cache.layers)
        graphs = DecodeGraphs(
            compute, engine.cache, torch.device("cpu"), max_num_seqs=4, max_model_len=64, capture=recorder
        )
        assert recorder.captured == [4, 2, 1]
        engine._loop._runner._decode_graphs = graphs
        assert [reply.token_ids for reply in engine.generate(conversations, params)] == expected
        assert recorder.replayed == [4, 4, 2, 1, 1]
        engine.cache.blocks.check_invariants()
