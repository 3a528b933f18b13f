"""The engine answers through its public interface; the model is the checkpoint in the package."""

import threading

import numpy as np
import pytest

from internvl_rt import Engine, MediaError, RequestError, SamplingParams
from support.calls import ask, check_idle

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)  # an answer about a picture of noise could end early
RNG = np.random.default_rng(5)


def picture(height=60, width=150):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


CONVERSATIONS = [
    ask("Read the digits.", picture()),
    ask("Hello"),
    ask("Which picture shows the larger number?", picture(), picture(90, 90)),
    [*ask("Read the digits.", picture(40, 200)), {"role": "assistant", "content": "12"}, *ask("How many are there?")],
]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    """Answers each conversation while no other runs; its prompt is one chunk."""
    return [engine.chat(messages, GREEDY) for messages in CONVERSATIONS]


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def test_greedy_output_does_not_depend_on_the_batch(engine, alone):
    replies = engine.generate(CONVERSATIONS * 3, GREEDY)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone] * 3


@pytest.mark.parametrize("max_tokens_per_step", [1, 7, 16, 64])
def test_greedy_output_does_not_depend_on_the_chunk_size(alone, max_tokens_per_step):
    with Engine.from_pretrained("tiny", device="cpu", max_tokens_per_step=max_tokens_per_step, block_size=16) as engine:
        replies = engine.generate(CONVERSATIONS, GREEDY)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone]


def test_more_requests_than_places_all_get_answers(alone):
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=2) as engine:
        replies = engine.generate(CONVERSATIONS * 2, GREEDY)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone] * 2


def test_sampled_output_depends_on_its_seed_alone(engine):
    params = [SamplingParams(max_tokens=12, temperature=3.0, seed=seed) for seed in range(4)]
    together = engine.generate([CONVERSATIONS[1]] * 4, params)
    single = [engine.chat(CONVERSATIONS[1], each) for each in params]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in single]
    assert len({tuple(reply.token_ids) for reply in single}) > 1


def test_engine_seed_makes_unseeded_requests_reproducible():
    def draws():
        with Engine.from_pretrained("tiny", device="cpu", seed=3) as engine:
            params = SamplingParams(max_tokens=8, temperature=3.0)
            return [reply.token_ids for reply in engine.generate([CONVERSATIONS[1]] * 3, params)]

    first = draws()
    assert first == draws()
    assert len(set(map(tuple, first))) > 1


def test_streamed_pieces_add_up_to_the_reply(engine, alone):
    for messages, expected in zip(CONVERSATIONS, alone, strict=True):
        pieces = list(engine.stream(messages, GREEDY))
        assert "".join(piece.text for piece in pieces) == pieces[-1].reply.text == expected.text
        assert [piece.reply for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_closing_a_stream_cancels_its_request(engine):
    stream = engine.stream(ask("Hello"), SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    assert engine.cache.blocks.num_sequences == 1
    stream.close()
    assert engine.cache.blocks.num_sequences == 0


def test_streams_of_several_threads_share_the_steps(engine, alone):
    texts = [""] * len(CONVERSATIONS)

    def consume(index):
        for piece in engine.stream(CONVERSATIONS[index], GREEDY):
            texts[index] += piece.text

    threads = [threading.Thread(target=consume, args=(index,)) for index in range(len(CONVERSATIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [reply.text for reply in alone]


def test_picture_is_encoded_once_whatever_the_chunks(monkeypatch):
    encoded = []
    with Engine.from_pretrained("tiny", device="cpu", max_tokens_per_step=5) as engine:
        model = engine.model
        original = model.encode_tiles
        monkeypatch.setattr(model, "encode_tiles", lambda tiles: encoded.append(len(tiles)) or original(tiles))
        reply = engine.chat(CONVERSATIONS[2], GREEDY)
    assert sum(encoded) * engine.config.tokens_per_tile == reply.usage.image_tokens


@pytest.mark.parametrize("error", [RuntimeError("device fault"), KeyboardInterrupt()])
def test_failure_in_a_step_ends_its_requests_and_nothing_else(engine, alone, monkeypatch, error):
    original, calls = engine.model.run_step, []

    def fail_once(step, caches):
        calls.append(step)
        if len(calls) == 2:
            raise error
        return original(step, caches)

    monkeypatch.setattr(engine.model, "run_step", fail_once)
    with pytest.raises(type(error)):
        engine.chat(CONVERSATIONS[0], GREEDY)
    assert engine.chat(CONVERSATIONS[0], GREEDY).token_ids == alone[0].token_ids


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("device fault"), KeyboardInterrupt()])
def test_a_step_whose_tokens_are_lost_ends_its_requests_and_nothing_else(engine, alone, monkeypatch, error, run_ahead):
    original, calls = engine.runner.collect, []

    def fail_third(running):
        calls.append(running)
        if len(calls) == 3:
            raise error
        return original(running)

    monkeypatch.setattr(engine.loop, "run_ahead", run_ahead)
    monkeypatch.setattr(engine.runner, "collect", fail_third)
    with pytest.raises(type(error)):
        engine.chat(CONVERSATIONS[0], GREEDY)
    assert engine.chat(CONVERSATIONS[0], GREEDY).token_ids == alone[0].token_ids


def test_bad_request_in_a_batch_names_its_index_and_leaves_the_engine_usable(engine, alone):
    with pytest.raises(MediaError, match=r"request 1: .*no-such\.png"):
        engine.generate([CONVERSATIONS[0], ask("What?", "no-such.png")], GREEDY)
    assert engine.chat(CONVERSATIONS[0], GREEDY).token_ids == alone[0].token_ids


def test_usage_and_timings_account_for_the_request(alone):
    reply = alone[0]
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert 0 < reply.usage.image_tokens < reply.usage.prompt_tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(reply.token_ids)
    t = reply.timings
    stages = t.media_s + t.tile_s + t.vision_s + t.prefill_s + t.decode_s
    assert min(t.tile_s, t.vision_s, t.prefill_s) > 0
    assert stages <= t.total_s
    assert t.media_s + t.tile_s + t.vision_s + t.prefill_s <= t.first_token_s <= t.total_s
    assert t.num_decoded == len(reply.token_ids) - 1


def test_answer_ends_at_max_tokens_or_at_the_context_window():
    params = SamplingParams(max_tokens=10_000, ignore_eos=True)
    with Engine.from_pretrained("tiny", device="cpu", max_model_len=200) as engine:
        reply = engine.chat(ask("Hello"), params)
        assert (reply.finish_reason, reply.usage.total_tokens) == ("length", 200)
        with pytest.raises(RequestError, match="may have 200"):
            engine.chat(ask("a" * 1000), params)


def test_stop_string_and_stop_token_end_an_answer(engine):
    free = engine.chat(ask("Hello"), SamplingParams(max_tokens=6, ignore_eos=True))
    token = free.token_ids[0]
    stopped = engine.chat(ask("Hello"), SamplingParams(max_tokens=6, stop_token_ids=[token]))
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([token], "", "stop")


def test_integer_positions_and_delta_one_are_the_same(engine, alone):
    assert engine.chat(CONVERSATIONS[0], GREEDY, v2pe_delta=1).token_ids == alone[0].token_ids


def test_no_conversations_give_no_replies(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"device": "meta"}, "device must be auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype must be auto"),
        ({"block_size": 48}, "block_size must be one of"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer from 1"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step must be an integer from 1"),
        ({"kv_cache_bytes": 1000}, "raise kv_cache_bytes"),
        ({"v2pe_delta": 0.3}, "delta"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"max_tiles": 1000}, "max_tiles"),
        ({"max_model_len": 0}, "max_model_len"),
    ],
)
def test_engine_options_outside_their_range_are_refused_by_name(arguments, message):
    with pytest.raises(RequestError, match=message):
        Engine.from_pretrained("tiny", **{"device": "cpu", **arguments})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="max_seqs"):
        Engine.from_pretrained("tiny", max_seqs=3)


def test_closed_engine_refuses_requests():
    engine = Engine.from_pretrained("tiny", device="cpu")
    engine.close()
    with pytest.raises(RequestError, match="the engine is closed"):
        engine.chat(ask("Hello"))
