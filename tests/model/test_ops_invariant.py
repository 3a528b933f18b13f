"""With the batch-invariant table results are equal to the bit, whatever is computed beside them, in whatever chunks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, RequestError
from internvl_rt.checkpoint.config import DecoderConfig, VisionConfig
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops_invariant import invariant_ops
from internvl_rt.steps.decodes import NO_DECODES, build_decodes
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.step import Chunk, plan_step
from support.forward import run_step
from support.small_models import DEVICE, EXPERTS, GPT_OSS, QWEN2, QWEN3, VIT_6B, VIT_300M, build_model

pytestmark = pytest.mark.usefixtures("one_order_of_sums")
BLOCK = 16
PROMPT = [3 + 7 * i % 40 for i in range(37)]


def invariant(model: InternVL) -> InternVL:
    return InternVL(model.config, model.weights, invariant_ops(DEVICE))


def sequence_of(seq_id: int, token_ids: list[int], num_generated: int = 0) -> Sequence:
    num_prompt = len(token_ids) - num_generated
    sequence = Sequence(
        seq_id=seq_id,
        token_ids=token_ids[:num_prompt],
        position_T=np.arange(num_prompt, dtype=np.float32),
        next_position=num_prompt,
        pictures=(),
        params=SamplingParams(),
        max_tokens=100,
        stop_ids=frozenset(),
        seed=0,
    )
    sequence.token_ids += token_ids[num_prompt:]
    sequence.num_tokens = len(token_ids)
    return sequence


class Batch:
    """Sequences over one cache, whose steps are computed without an engine."""

    def __init__(self, model: InternVL, sequences: list[Sequence]) -> None:
        self.model = model
        num_blocks = sum(-(-(len(sequence.token_ids) + 4) // BLOCK) for sequence in sequences) + 2
        num_blocks *= model.config.decoder.num_tables
        sizes = {"num_blocks": num_blocks, "block_size": BLOCK, "dtype": model.dtype, "device": model.device}
        self.cache = KVCache(model.config.decoder, **sizes, ops=model.ops)
        for sequence in sequences:
            assert self.cache.admit(sequence) == 0

    def step(self, decoding: list[Sequence], chunks: list[Chunk]) -> Tensor:
        """Returns the logits of all tokens of a step, those of the decodes first."""
        step = plan_step(build_decodes(decoding) if decoding else NO_DECODES, chunks)
        counts = [*[1] * len(decoding), *step.counts]
        assert self.cache.append([sequence.seq_id for sequence in step.sequences], counts)
        return run_step(self.model, step, self.cache)

    def prefill(self, sequence: Sequence, *stops: int) -> list[Tensor]:
        found = []
        for stop in stops:
            found.append(self.step([], [Chunk(sequence, sequence.num_computed, stop)]))
            sequence.num_computed = stop
        return found


@pytest.mark.fast("qwen2-1")
@pytest.mark.parametrize("num_others", [1, 3, 64])
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3, EXPERTS, GPT_OSS], ids=["qwen2", "qwen3", "experts", "gpt_oss"])
@torch.inference_mode()
def test_a_sequence_has_the_same_logits_alone_and_among_others(decoder: DecoderConfig, num_others: int) -> None:
    """It decodes one token and computes a chunk of its prompt, each alone, and beside others of other lengths."""
    model = invariant(build_model(decoder=decoder))

    def sequences(count: int) -> list[Sequence]:
        others = [sequence_of(10 + i, PROMPT[: 2 + i % 9], num_generated=1) for i in range(count)]
        return [sequence_of(0, PROMPT, num_generated=1), sequence_of(1, PROMPT[:21]), *others]

    mine, prompt = sequences(0)
    alone = Batch(model, [mine, prompt])
    whole = alone.prefill(mine, len(PROMPT) - 1)[0]
    decoded = alone.step([mine], [])
    chunk = alone.prefill(prompt, 21)[0]

    mine, prompt, *others = sequences(num_others)
    batch = Batch(model, [mine, prompt, *others])
    chunks = [Chunk(each, 0, len(each.token_ids) - 1) for each in (*others, mine)]
    together = batch.step([], chunks)
    assert torch.equal(together[-len(whole) :], whole)
    for each in (mine, *others):
        each.num_computed = each.num_tokens - 1
    half = num_others // 2
    mixed = batch.step([*others[:half], mine, *others[half:]], [Chunk(prompt, 0, 21)])
    assert torch.equal(mixed[half], decoded[0])
    assert torch.equal(mixed[num_others + 1 :], chunk)


@torch.inference_mode()
def test_a_token_has_the_same_logits_in_whatever_chunks_and_as_a_decode() -> None:
    model, size = invariant(build_model()), len(PROMPT)
    sequence = sequence_of(0, PROMPT)
    whole = Batch(model, [sequence]).prefill(sequence, size)[0]
    for stops in ((5, 6, 30, size), (16, 32, size)):
        sequence = sequence_of(0, PROMPT)
        assert torch.equal(torch.cat(Batch(model, [sequence]).prefill(sequence, *stops)), whole)
    sequence = sequence_of(0, PROMPT, num_generated=3)
    batch = Batch(model, [sequence])
    batch.prefill(sequence, size - 3)
    for index in range(size - 3, size):
        sequence.num_tokens = index + 1
        assert torch.equal(batch.step([sequence], [])[0], whole[index])
        sequence.num_computed = index + 1


@pytest.mark.fast("300m")
@pytest.mark.parametrize("vision", [VIT_300M, VIT_6B], ids=["300m", "6b"])
@torch.inference_mode()
def test_a_tile_has_the_same_visual_tokens_alone_and_among_others(vision: VisionConfig) -> None:
    model = invariant(build_model(vision))
    tiles = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    together = model.encode_tiles(tiles)
    for index in range(3):
        assert torch.equal(model.encode_tiles(tiles[index : index + 1])[0], together[index])


@torch.inference_mode()
def test_it_computes_what_the_references_compute() -> None:
    reference = build_model()
    model = invariant(reference)
    tiles = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    torch.testing.assert_close(model.encode_tiles(tiles), reference.encode_tiles(tiles), rtol=1e-4, atol=1e-4)
    results = []
    for each in (model, reference):
        sequence = sequence_of(0, PROMPT)
        results.append(Batch(each, [sequence]).prefill(sequence, len(PROMPT))[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_option_needs_the_kernels() -> None:
    with pytest.raises(RequestError, match="batch_invariant needs the kernels, but on cpu backend 'auto' means torch"):
        Engine.from_pretrained("tiny", device="cpu", batch_invariant=True)
    with Engine.from_pretrained("tiny", device="cpu", backend="triton", batch_invariant=True) as engine:
        assert engine.model.ops.name == "triton, batch invariant"
