"""A request may ask for several answers, log-probabilities, scores, a deadline, embeddings or structured output."""

import io
import json
import logging
import re
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import RequestError, SamplingParams
from internvl_rt.errors import MediaError, QueueFullError
from internvl_rt.inputs import image as image_module
from internvl_rt.inputs.grammar import Matcher
from internvl_rt.steps import runner
from support.calls import ask, check_idle, load

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_k=5, seed=11)
BLOCK = 16


def open_engine(**options):
    return load(**{"block_size": BLOCK, **options})


@pytest.fixture(scope="module")
def engine():
    with open_engine() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def computed_tokens(engine, monkeypatch):
    """Returns a list to which every later step appends the number of tokens that its decoder pass computes."""
    original, counts = engine.model.run_step, []

    def count(step, caches):
        counts.append(len(step.token_id_T))
        return original(step, caches)

    monkeypatch.setattr(engine.model, "run_step", count)
    return counts


def test_several_answers_share_one_prompt(engine, monkeypatch):
    counts = computed_tokens(engine, monkeypatch)
    drawn = replace(DRAWN, n=4, temperature=3.0, top_k=0)
    reply = engine.chat(ask("Read the digits. In several ways.", SAMPLE), drawn, cache_salt="several")
    assert counts == [reply.usage.prompt_tokens, *[4] * 7]
    assert len({tuple(choice.token_ids) for choice in reply.choices}) > 1
    assert reply.usage.completion_tokens == 32
    assert engine.cache.blocks.stats()["num_copies"] >= 3, "the prompt's last block is copied on write"


def test_a_step_that_fails_before_its_copies_are_made_holds_no_blocks(engine, monkeypatch):
    """An answer's first token copies the prompt's last block; a copied block stays taken until a step copies it."""
    original, calls = runner.lay_out, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return original(*args)

    monkeypatch.setattr(runner, "lay_out", fail_second)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.chat(ask("Read the digits."), replace(DRAWN, n=3))
    stats = engine.cache.blocks.stats()
    assert stats["num_deferred"] == 0


def test_each_answer_is_the_one_that_its_seed_gives_alone(engine):
    several = engine.chat(ask("Read the digits."), replace(DRAWN, n=3))
    first = engine.chat(ask("Read the digits."), DRAWN)
    assert several.choices[0].token_ids == first.token_ids == several.token_ids
    assert several.choices == engine.chat(ask("Read the digits."), replace(DRAWN, n=3)).choices


def test_greedy_answers_are_all_the_same(engine):
    reply = engine.chat(ask("Read the digits.", SAMPLE), replace(GREEDY, n=3))
    assert [choice.token_ids for choice in reply.choices] == [reply.token_ids] * 3


def test_streamed_answers_add_up_one_by_one(engine):
    pieces = list(engine.stream(ask("Hello"), replace(DRAWN, n=3)))
    reply = pieces[-1].reply
    for index, choice in enumerate(reply.choices):
        assert "".join(piece.text for piece in pieces if piece.choice == index) == choice.text
    assert [piece.reply for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_more_answers_than_places_are_refused(engine):
    with pytest.raises(RequestError, match="n is 65, but at most max_num_seqs = 64"):
        engine.chat(ask("Hello"), SamplingParams(n=65))


def test_log_probabilities_are_those_of_the_model(engine):
    reply = engine.chat(ask("Read the digits.", SAMPLE), replace(GREEDY, logprobs=3))
    assert [token.token_id for token in reply.logprobs] == reply.token_ids
    for token in reply.logprobs:
        assert token.top[0] == (token.token_id, token.logprob), "greedy takes the likeliest"
        logprobs = [logprob for _, logprob in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len(token.top) == 3
        assert sum(np.exp(logprobs)) <= 1 + 1e-6


def test_log_probabilities_do_not_see_penalties_and_temperature(engine):
    plain = engine.chat(ask("Hello"), replace(GREEDY, max_tokens=1, logprobs=5))
    bent = engine.chat(
        ask("Hello"), SamplingParams(max_tokens=1, temperature=2.0, min_tokens=1, seed=1, logprobs=5, ignore_eos=True)
    )
    assert dict(plain.logprobs[0].top) == pytest.approx(dict(bent.logprobs[0].top), abs=1e-5)


def test_without_asking_there_are_no_log_probabilities(engine):
    reply = engine.chat(ask("Hello"), GREEDY)
    assert (reply.logprobs, reply.prompt_logprobs) == (None, None)


@pytest.mark.parametrize("max_tokens_per_step", [7, 8192])
def test_prompt_log_probabilities_are_those_of_the_official_logits(max_tokens_per_step):
    with open_engine(max_tokens_per_step=max_tokens_per_step) as engine:
        messages = ask("Read the digits.", SAMPLE)
        for _ in range(2):  # the second request must compute the prefix although it is cached
            reply = engine.chat(messages, replace(GREEDY, max_tokens=1, prompt_logprobs=2))
        prompt = engine.preparer.prepare(messages).prompt
        first, *others = reply.prompt_logprobs
        assert first is None
        assert [token.token_id for token in others] == list(prompt.token_ids[1:])
        assert {len(token.top) for token in others} == {2}
        assert max(token.logprob for token in others) <= 0
        again = engine.chat(messages, replace(GREEDY, max_tokens=1)).token_ids
        assert again == reply.token_ids


def test_a_response_scores_as_it_was_generated(engine):
    messages = ask("Read the digits.", SAMPLE)
    generated = engine.chat(messages, SamplingParams(max_tokens=8, logprobs=0))
    assert generated.finish_reason == "stop"
    (score,) = engine.score(messages, [generated.text], include_end=True)
    assert [token.token_id for token in score.tokens] == generated.token_ids
    assert score.logprobs == pytest.approx([token.logprob for token in generated.logprobs], abs=1e-4)
    assert score.total == pytest.approx(sum(score.logprobs))


def test_a_better_response_scores_higher_and_the_prompt_is_computed_once(engine, monkeypatch):
    messages = ask("Look at the picture and answer with digits only, nothing else. Read!", SAMPLE)
    counts = computed_tokens(engine, monkeypatch)
    right, wrong = engine.score(messages, ["4719", "4718"], cache_salt="score")
    assert right.total > wrong.total
    prompt_len = len(engine.preparer.prepare(messages).prompt.token_ids)
    assert sum(counts) < 2 * prompt_len + 16
    assert sum(engine.score(messages, ["4719"], cache_salt="score")[0].logprobs) == pytest.approx(right.total, abs=1e-4)
    assert counts[-1] < BLOCK + 8


@pytest.mark.parametrize("response", ["", None])
def test_a_response_without_text_is_refused(engine, response):
    with pytest.raises(RequestError, match="responses: expected texts that are not empty"):
        engine.score(ask("Hello"), [response])


def test_visual_tokens_may_come_from_elsewhere(engine):
    with_picture = engine.chat(ask("Read the digits.", SAMPLE), GREEDY)
    (visual_XD,) = engine.encode_images([SAMPLE])
    assert len(visual_XD) == with_picture.usage.image_tokens
    for given in (visual_XD, visual_XD.numpy()):
        content = [{"type": "image_embeds", "image_embeds": given}, {"type": "text", "text": "Read the digits."}]
        reply = engine.chat([{"role": "user", "content": content}], GREEDY)
        assert reply.token_ids == with_picture.token_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:-1], "with a multiple of"),
        (lambda v: v[:0], "with a multiple of"),
        (lambda v: v[:, :-1], "expected floating-point numbers"),
        (lambda v: v[None], "expected floating-point numbers"),
        (lambda v: v.int(), "expected floating-point numbers .*, got int32"),
        (lambda v: v.index_fill(0, torch.tensor([3]), torch.nan), "numbers are not finite in float32"),
        (lambda v: v.repeat(3000, 1), "visual tokens, but only"),
        (lambda v: v.tolist(), "expected a tensor"),
    ],
)
def test_visual_tokens_that_do_not_fit_are_refused(engine, change, message):
    (visual_XD,) = engine.encode_images([SAMPLE])
    content = [{"type": "image_embeds", "image_embeds": change(visual_XD)}, {"type": "text", "text": "Read!"}]
    with pytest.raises(RequestError, match=f"image_embeds: .*{message}"):
        engine.chat([{"role": "user", "content": content}], GREEDY)


def test_a_picture_that_comes_again_is_neither_decoded_nor_encoded(engine, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 150, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    first = engine.chat(ask("Read the digits.", stream.getvalue()), GREEDY)
    before = engine.stats()
    monkeypatch.setattr(image_module, "tile_image", None)
    monkeypatch.setattr(engine.model, "encode_tiles", None)
    turn = {"role": "system", "content": "Another beginning, so that no prefix is shared."}
    again = engine.chat([turn, *ask("Read the digits.", stream.getvalue())], GREEDY)
    assert again.usage.cached_tokens == 0
    assert again.usage.image_tokens == first.usage.image_tokens
    after = engine.stats()
    assert after["visual_cache_hits"] == before["visual_cache_hits"] + 1
    assert after["encoded_tiles"] == before["encoded_tiles"]


def test_visual_tokens_belong_to_the_caller_who_may_write_into_them(engine):
    picture = np.random.default_rng(12).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    expected = engine.encode_images([picture])[0].tolist()
    for _ in range(2):  # computed now, and kept from an earlier call
        visual_XD = engine.encode_images([picture])[0]
        visual_XD.zero_()
        visual_XD.numpy()[:] = 1
    assert engine.encode_images([picture])[0].tolist() == expected


def test_pictures_are_read_and_encoded_one_after_another(engine):
    picture = np.full((2000, 2000, 3), 99, np.uint8)
    tracemalloc.start()
    try:
        assert len(engine.encode_images([picture] * 12)) == 12
        assert tracemalloc.get_traced_memory()[1] < 3 * picture.nbytes
    finally:
        tracemalloc.stop()
    before = engine.stats()["encoded_tiles"]
    for wrong in (5, np.zeros((4, 4), np.uint8)):
        with pytest.raises(MediaError, match="image"):
            engine.encode_images([np.full((56, 56, 3), 98, np.uint8), wrong])
    assert engine.stats()["encoded_tiles"] == before


def test_visual_tokens_are_shared_only_by_requests_of_equal_salt(engine, monkeypatch):
    engine.chat(ask("Read the digits.", SAMPLE), GREEDY, cache_salt="mine")
    before = engine.stats()["encoded_tiles"]
    engine.chat(ask("How many?", SAMPLE), GREEDY, cache_salt="mine")
    assert engine.stats()["encoded_tiles"] == before
    engine.chat(ask("How many?", SAMPLE), GREEDY, cache_salt="theirs")
    assert engine.stats()["encoded_tiles"] > before


def test_speculation_changes_no_answer_and_takes_fewer_steps():
    params = [SamplingParams(max_tokens=40, ignore_eos=True), replace(DRAWN, max_tokens=40)]
    messages = ask("Read! " * 6, SAMPLE)
    answers, steps = [], []
    for num_draft_tokens in (0, 5):
        with open_engine(num_draft_tokens=num_draft_tokens) as engine:
            answers.append([engine.chat(messages, each).token_ids for each in params])
            steps.append(engine.stats()["steps"])
            engine.cache.blocks.check_invariants()
    assert answers[0] == answers[1]
    assert steps[1] < steps[0]


def test_an_answer_that_takes_too_long_ends_where_it_is(engine, monkeypatch):
    original = engine.model.run_step
    monkeypatch.setattr(engine.model, "run_step", lambda *args: time.sleep(0.05) or original(*args))
    reply = engine.chat(ask("Hello"), SamplingParams(max_tokens=500, ignore_eos=True), timeout_s=1.0)
    assert reply.finish_reason == "timeout"
    assert 0 < len(reply.token_ids) < 30
    assert 1 <= reply.timings.total_s < 10
    with pytest.raises(RequestError, match="timeout_s must be a number above 0"):
        engine.chat(ask("Hello"), timeout_s=0)


def test_a_full_queue_refuses_and_takes_again_later():
    with open_engine(max_num_seqs=2, max_waiting=0) as engine:
        streams = [engine.stream(ask("Hello"), replace(GREEDY, max_tokens=100)) for _ in range(3)]
        for stream in streams[:2]:
            next(stream)
        with pytest.raises(QueueFullError, match="2 requests are in flight, which is the limit"):
            next(streams[2])
        streams[0].close()
        assert engine.chat(ask("Hello"), GREEDY).token_ids
        streams[1].close()


def test_what_cannot_fit_is_refused_before_it_is_read(engine, monkeypatch):
    monkeypatch.setattr("internvl_rt.inputs.prepare.open_picture", None)
    with pytest.raises(RequestError, match=r"has 9000 pictures and frames of videos, but only \d+ tiles"):
        engine.chat(ask("Read!", *[SAMPLE] * 9000))
    with pytest.raises(RequestError, match=r"characters, which cannot fit"):
        engine.chat(ask("a" * 5_000_000))


def test_statistics_count_what_was_done():
    with open_engine() as engine:
        engine.chat(ask("Hello"), GREEDY)
        engine.stream(ask("Hello"), GREEDY).close()  # a stream whose first piece nobody asked for does not count
        stream = engine.stream(ask("Hello"), GREEDY)
        next(stream)
        assert engine.stats()["running"] == 1
        stream.close()
        stats = engine.stats()
    assert stats["requests_length"] == stats["requests_cancelled"] == 1
    assert stats["running"] == stats["waiting"] == 0
    assert stats["generated_tokens"] >= 9
    assert stats["steps"] >= 9


def test_one_line_for_each_request_and_nothing_of_its_content_in_it(engine, caplog):
    with caplog.at_level(logging.DEBUG, logger="internvl_rt"):
        engine.chat(ask("Tell me a secret.", SAMPLE), GREEDY)
    (record,) = [record for record in caplog.records if record.name == "internvl_rt"]
    assert '"outcome": "length"' in record.message
    assert '"completion_tokens": 8' in record.message
    assert "secret" not in record.message


def test_a_bar_shows_the_progress_of_many_requests(engine, capsys):
    replies = engine.generate([ask("Hello")] * 5, GREEDY, progress=True)
    assert len(replies) == 5
    assert "5/5" in capsys.readouterr().err


SCHEMA = {
    "type": "object",
    "properties": {
        "digits": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        "sure": {"type": "boolean"},
    },
    "required": ["digits", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_keeps_to_its_schema(engine, temperature):
    params = SamplingParams(max_tokens=200, json_schema=SCHEMA, temperature=temperature, top_k=20, seed=5, n=3)
    for choice in engine.chat(ask("Read the digits.", SAMPLE), params).choices:
        if choice.finish_reason == "stop":
            value = json.loads(choice.text)
            assert value.keys() == {"digits", "sure"}
            assert all(isinstance(digit, int) for digit in value["digits"])
        else:  # max_tokens cut the answer, since the grammar bounds neither whitespace nor numbers
            assert choice.text.lstrip().startswith("{")


def test_an_answer_matches_its_expression_beside_answers_that_need_not(engine):
    params = [SamplingParams(max_tokens=30, regex="[0-9]{2}-[a-c]+!", seed=1, temperature=1.5), GREEDY, GREEDY]
    free = engine.chat(ask("Hello"), GREEDY)
    replies = engine.generate([ask("Hello")] * 3, params)
    end = "!" if replies[0].finish_reason == "stop" else ""  # otherwise max_tokens cut the answer
    assert re.fullmatch("[0-9]{2}-[a-c]+" + end, replies[0].text)
    assert [reply.token_ids for reply in replies[1:]] == [free.token_ids] * 2


def test_a_complete_answer_ends_whatever_min_tokens_says(engine):
    reply = engine.chat(ask("Hello"), SamplingParams(max_tokens=30, min_tokens=20, regex="[0-9]{3}", ignore_eos=True))
    assert re.fullmatch("[0-9]{3}", reply.text)
    assert reply.finish_reason == "stop"


def test_a_broken_grammar_is_refused_at_once(engine):
    with pytest.raises(RequestError, match="regex"):
        engine.chat(ask("Hello"), SamplingParams(regex="(unclosed"))


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(engine, monkeypatch):
    original, calls = Matcher.fill_mask, []

    def fail_third(matcher, mask_W):
        calls.append(matcher)
        if len(calls) == 3:
            raise RequestError("the grammar has become too complex")
        original(matcher, mask_W)

    monkeypatch.setattr(Matcher, "fill_mask", fail_third)
    streams = [engine.stream(ask("Hello"), each) for each in (SamplingParams(max_tokens=9, regex="[0-9]{8}"), GREEDY)]
    free = list(streams[1])[-1].reply
    with pytest.raises(RequestError, match="too complex"):
        list(streams[0])
    assert free.token_ids == engine.chat(ask("Hello"), GREEDY).token_ids
