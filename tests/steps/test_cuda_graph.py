"""Tests vision passes and steps that run as CUDA graphs: which graph runs, what it reads, where the result is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.find import random_config
from internvl_rt.steps.cuda_graph import TILE_BUCKETS, TileGraphs, cuda_capture
from internvl_rt.steps.device_stream import DeviceStream
from internvl_rt.steps.step_graph import GRAPH_TOKENS, NUM_TOKENS, decode_buckets, layer_buckets, prefill_buckets
from support.recorder import Recorder

SIDE = 4


def encode(tiles: Tensor) -> Tensor:
    """Replaces the model: computes [I, 2, 3] from each tile alone."""
    return tiles.float().flatten(1)[:, :6].view(-1, 2, 3) * 2


def build(buckets=(1, 2, 4), everything=True):
    recorder = Recorder()
    graphs = TileGraphs(encode, SIDE, torch.device("cpu"), recorder, buckets)
    for job in graphs.captures(everything=everything):
        job.run()
    return graphs, recorder


def draw(num_tiles: int) -> Tensor:
    return torch.randint(0, 256, (num_tiles, SIDE, SIDE, 3), dtype=torch.uint8)


def test_all_buckets_are_captured_the_largest_first() -> None:
    graphs, recorder = build((1, 4, 2))
    assert recorder.captured == [4, 2, 1]
    assert graphs.max_tiles == 4


def test_a_bucket_that_was_not_captured_is_captured_when_tiles_need_it() -> None:
    graphs, recorder = build((1, 4, 2), everything=False)
    assert recorder.captured == [4, 1]
    for _ in range(2):
        tiles = draw(2)
        assert torch.equal(graphs.encode(tiles), encode(tiles))
    assert recorder.captured == [4, 1, 2]
    assert recorder.replayed == [2, 2]


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

    stream = DeviceStream(device)
    stream.adopt([weight])
    with stream.use():
        graphs = TileGraphs(compute, SIDE, device, cuda_capture(), (1, 2, 4))
        for job in graphs.captures(everything=False):
            job.run()
        check_replays(graphs, compute, device)


def check_replays(graphs: TileGraphs, compute: Callable[[Tensor], Tensor], device: torch.device) -> None:
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


CONVERSATIONS = [[{"role": "user", "content": text}] for text in ("Hello", "Read the digits.", "And now?")]


@torch.inference_mode()
def test_decode_steps_from_graphs_give_the_tokens_of_eager_steps() -> None:
    """Covers batches between two buckets and sequences that end earlier; checks that the graphs are replayed."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 6, 4)]
    with Engine.from_pretrained("tiny", device="cpu", backend="torch", dtype="float32", max_model_len=64) as engine:
        expected = [reply.token_ids for reply in engine.generate(CONVERSATIONS, params)]
        recorder = Recorder()
        engine.runner.capture(max_num_seqs=4, max_model_len=64, max_tokens_per_step=1, capture=recorder)
        assert recorder.captured[len(TILE_BUCKETS) : len(TILE_BUCKETS) + 3] == [4, 2, 1]
        assert [reply.token_ids for reply in engine.generate(CONVERSATIONS, params)] == expected
        assert recorder.replayed == [64, 4, *[4, 4, 2, 1, 1]], "layers and head of the prompts, then decode steps"
        engine.cache.blocks.check_invariants()


@torch.inference_mode()
def test_prefills_from_graphs_give_the_tokens_of_eager_prefills() -> None:
    """Covers pictures, several sequences in a step, prompts beyond the largest bucket, and prompts in chunks."""
    sample = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
    content = [{"type": "image", "image": str(sample)}, {"type": "text", "text": "Read the digits."}]
    conversations = [*CONVERSATIONS, [{"role": "user", "content": content}], [{"role": "user", "content": "a" * 900}]]
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)
    for budget in (8192, 40):
        options = {"max_model_len": 2048, "prefix_cache": False, "max_tokens_per_step": budget}
        with Engine.from_pretrained("tiny", device="cpu", backend="torch", **options) as engine:
            expected = engine.generate(conversations, params)
            recorder = Recorder()
            engine.runner.capture(max_num_seqs=4, max_model_len=2048, max_tokens_per_step=200, capture=recorder)
            replies = engine.generate(conversations[:4], params) + engine.generate(conversations[4:], params)
            assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
            for reply, eager in zip(replies, expected, strict=True):
                logprobs = [[token.logprob for token in each.logprobs] for each in (reply, eager)]
                assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
            used = set(recorder.replayed) & set(NUM_TOKENS)
            assert used == ({128} if budget == 8192 else {64}), "four prompts together, then one that is too long"


def forbid_steps_without_a_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(step: object) -> None:
        raise AssertionError(f"a step ran without a graph: {step}")

    monkeypatch.setattr(engine.runner, "_compute", compute)


def let_draws_write_to_the_host(engine: Engine) -> None:
    engine.model.ops = replace(engine.model.ops, writes_to_host=True)


@pytest.mark.parametrize("writes_to_host", [False, True])
@torch.inference_mode()
def test_sequences_decode_beside_prompts_in_one_graph(writes_to_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New prompts join every second step, one of them as a chunk of one token; the tokens are those of each alone."""
    texts = ["Hello", "Read the digits.", "And now?", "a" * 90, "Once more", "b" * 150]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    options = {"max_model_len": 512, "prefix_cache": False, "max_num_seqs": 4, "max_tokens_per_step": 67}
    with Engine.from_pretrained("tiny", device="cpu", backend="torch", **options) as engine:
        expected = [engine.chat(conversation, params).token_ids for conversation in conversations]
        if writes_to_host:
            let_draws_write_to_the_host(engine)
        recorder = Recorder()
        engine.runner.capture(
            max_num_seqs=4, max_model_len=512, max_tokens_per_step=67, everything=False, capture=recorder
        )
        engine.loop.run_ahead = True
        forbid_steps_without_a_graph(engine, monkeypatch)
        requests = []
        for conversation in conversations:
            requests.append(engine.new_request(engine.prepare(conversation), params))
            engine.loop.submit(requests[-1])
            for _ in range(2):
                engine.loop.step()
        while engine.loop.step():
            pass
        assert [request.reply.token_ids for request in requests] == expected
        beside = [number for number, size in enumerate(recorder.replayed) if size in (4 + 64, 4 + 67)]
        assert beside, "sequences decoded beside prompts"
        assert {recorder.replayed[number + 1] for number in beside} <= {1, 2, 4, 8}, "each such step drew tokens"
        engine.cache.blocks.check_invariants()


@pytest.mark.parametrize("writes_to_host", [False, True])
@torch.inference_mode()
def test_a_capture_in_the_middle_keeps_the_tokens_that_the_step_before_has_drawn(writes_to_host: bool) -> None:
    """The first decode step after a prompt needs a new graph, before the host has read the tokens that it reads."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=5)
    with Engine.from_pretrained("tiny", device="cpu", backend="torch", max_model_len=512, max_num_seqs=20) as engine:
        expected = [reply.token_ids for reply in engine.generate(CONVERSATIONS * 4, params)]
        if writes_to_host:
            let_draws_write_to_the_host(engine)
        recorder = Recorder()
        engine.runner.capture(
            max_num_seqs=20, max_model_len=512, max_tokens_per_step=300, everything=False, capture=recorder
        )
        before = len(recorder.captured)
        engine.loop.run_ahead = True
        assert [reply.token_ids for reply in engine.generate(CONVERSATIONS * 4, params)] == expected
        assert 16 in recorder.captured[before:], "a graph of decode steps"


def test_prefill_buckets_waste_little() -> None:
    sizes = sorted(NUM_TOKENS)
    assert max((large - small) / large for small, large in pairwise(sizes[2:])) <= 0.25


def test_any_number_of_sequences_may_decode_beside_a_prompt() -> None:
    config = random_config("InternVL3-1B").decoder
    for most, expected in ((4, {0, 4}), (64, {0, 64}), (200, {0, 64, 200})):
        assert {decodes for decodes, _, _ in layer_buckets(config, most, 2048)} == expected


def test_prefills_run_from_graphs_as_long_as_the_gpu_would_wait_for_their_launches_and_up_to_2048_tokens() -> None:
    configs = {name: random_config(f"InternVL3-{name}").decoder for name in ("1B", "8B", "78B")}
    most = {name: max(prefill_buckets(config, 8192)) for name, config in configs.items()}
    assert most["1B"] >= 3392 + 64, "the prompt of a picture of 13 tiles"
    assert most["8B"] == most["78B"] == GRAPH_TOKENS == 2048
    assert prefill_buckets(configs["1B"], 1000)[-2:] == [896, 1000], "the largest step has a graph of its own"
    assert prefill_buckets(configs["1B"], 3) == [64]
