"""An engine of several ranks, each a process of its own, answers as one does; gloo joins them on the CPU."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.checkpoint.config import load_config
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.engine.ranks import FirstRank
from internvl_rt.errors import CheckpointError
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from support.calls import SHORT, ask, check_idle, load
from support.load import SAMPLES, build_broken_kind, build_kinds, check_nothing_is_left, expected_answers, run_load
from support.load import tiny_pool_bytes as pool_bytes
from support.rank_processes import folders, open_ports, processes_of, wait_until

PICTURE = str(SAMPLES[0])


@pytest.fixture(scope="module")
def one():
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def two():
    with load(tensor_parallel_size=2) as engine:
        yield engine


def test_the_tokens_and_their_probabilities_are_those_of_one_rank(one, two):
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=5, prompt_logprobs=3)
    for messages in (ask("Read the digits.", PICTURE), ask("Hello"), ask("And these?", PICTURE, str(SAMPLES[1]))):
        theirs, ours = one.chat(messages, params), two.chat(messages, params)
        assert ours.token_ids == theirs.token_ids
        for our, their in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert our.logprob == pytest.approx(their.logprob, abs=1e-5)
        found, expected = ([place.logprob for place in reply.prompt_logprobs if place] for reply in (ours, theirs))
        assert found == pytest.approx(expected, abs=1e-5)


def test_scores_embeddings_and_constrained_answers_are_those_of_one_rank(one, two):
    messages = ask("Read the digits.", PICTURE)
    for call in (
        lambda engine: [token.logprob for score in engine.score(messages, ["4719", "12"]) for token in score.tokens],
        lambda engine: [one for place in engine.score_tokens(messages, ["1", "4"], (-1, -2)) for one in place.logprobs],
    ):
        assert call(two) == pytest.approx(call(one), abs=1e-5)
    (ours,), (theirs,) = (engine.encode_images([PICTURE]) for engine in (two, one))
    assert (ours - theirs).abs().max() < 1e-5
    params = SamplingParams(max_tokens=8, regex="[a-f]{3}", logit_bias={20: 3.0}, repetition_penalty=1.2)
    assert two.chat(messages, params).text == one.chat(messages, params).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"num_draft_tokens": 2, "visual_cache_bytes": 0, "max_tokens_per_step": 50, "max_num_seqs": 7}),
        (4, {"kv_cache_dtype": "int8"}),
        (3, {"backend": "torch"}),
    ],
    ids=["two", "four", "three"],
)
def test_mixed_requests_get_what_each_gets_alone(size, options):
    """Steps with prompts, decodes, draft tokens, several answers that copy blocks, preempted and cancelled ones."""
    kinds = [*build_kinds(20, seed=0), build_broken_kind()]
    kept = {name: options[name] for name in ("kv_cache_dtype", "backend") if name in options}
    bytes_of_rank = pool_bytes(42, **kept) // min(size, 2)
    with load(
        tensor_parallel_size=size, max_model_len=640, block_size=16, kv_cache_bytes=bytes_of_rank, **options
    ) as e:
        outcome = run_load(e, kinds, expected_answers(kinds, **kept), num_requests=40, seed=2)
        assert not outcome.wrong, outcome.wrong[0]
        assert outcome.finished + outcome.cancelled + outcome.refused == 40
        check_nothing_is_left(e)


def test_steps_that_several_threads_run_leave_ranks_in_step(two):
    params, texts = SamplingParams(max_tokens=40, ignore_eos=True), []
    threads = [threading.Thread(target=lambda: texts.append(two.chat(ask("Hello"), params).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    check_idle(two)


def test_each_rank_plans_for_its_part(one, two):
    assert two.memory.block_bytes == one.memory.block_bytes // 2
    assert two.memory.weight_bytes < one.memory.weight_bytes
    assert two.memory == plan_parts("tiny", EngineOptions(device="cpu", dtype="float32", tensor_parallel_size=2))


def test_a_model_that_is_a_part_refuses_to_compute_alone(two):
    model = two.model
    with torch.inference_mode(), pytest.raises(RequestError, match="several parts"):
        model.logits(torch.zeros(1, model.config.decoder.hidden_size))
    assert two.chat(ask("Hello"), SHORT).token_ids, "the ranks are in step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 5}, "4 query heads, can be split among at most 4 ranks; lower it"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 17}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "backend": "triton", "batch_invariant": True}, "batch_invariant needs one rank"),
        ({"tensor_parallel_size": 2, "kv_cache_bytes": 1}, "raise kv_cache_bytes"),
    ],
)
def test_what_cannot_be_split_is_refused_before_a_process_is_started(options, message, monkeypatch):
    monkeypatch.setattr(FirstRank, "__init__", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(RequestError, match=message):
        load(**options)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="tensor_parallel_size 3 needs as many GPUs from cuda on, but torch sees 2"):
        Engine.from_pretrained("tiny", device="cuda", tensor_parallel_size=3)


def test_a_rank_that_cannot_load_its_part_says_what_one_rank_says(tmp_path: Path):
    """A number that is not finite is in the columns of rank 1 alone."""
    write_random_checkpoint(_config(tmp_path), tmp_path / "model", dtype=torch.float32)
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    _, end = header["language_model.model.layers.0.mlp.down_proj.weight"]["data_offsets"]
    last = 8 + int.from_bytes(content[:8], "little") + end - 4
    content[last : last + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(content)
    before = folders(), open_ports(), processes_of()
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: numbers are not finite in float32"):
        Engine.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", tensor_parallel_size=2)
    assert (folders(), open_ports(), processes_of()) == before


def test_random_weights_are_those_of_one_rank(tmp_path: Path):
    name = f"random:{_config(tmp_path)}"
    options = {"device": "cpu", "dtype": "float32", "seed": 5, "max_model_len": 256}
    replies = []
    for size in (1, 2):
        with Engine.from_pretrained(name, tensor_parallel_size=size, **options) as engine:
            replies.append(engine.chat(ask("Hello"), SamplingParams(max_tokens=6, ignore_eos=True)).token_ids)
    assert replies[0] == replies[1]


def test_nothing_is_left_of_a_closed_engine_or_of_one_that_was_dropped():
    gc.collect()  # of other tests
    before = folders(), open_ports(), threading.active_count(), processes_of()
    engine = load(tensor_parallel_size=3)
    assert len(processes_of()) == len(before[-1]) + 2
    engine.chat(ask("Hello"), SHORT)
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.chat(ask("Hello"), SHORT)
    assert (folders(), open_ports(), threading.active_count(), processes_of()) == before
    engine = load(tensor_parallel_size=2)
    engine.chat(ask("Hello"), SHORT)
    del engine
    wait_until(lambda: (folders(), open_ports(), threading.active_count(), processes_of()) == before)


def _config(folder: Path) -> Path:
    """Writes a config.json of a model with the tiny checkpoint's sizes."""
    tiny = Path(load_config.__code__.co_filename).parents[1] / "tiny" / "config.json"
    file = folder / "config.json"
    file.write_text(tiny.read_text(encoding="utf-8"), encoding="utf-8")
    return file
