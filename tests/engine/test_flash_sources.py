"""Whatever holds pictures is shortened for an InternVL3.5-Flash, and whoever encodes them gives the same answers."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, Engine, RawPrompt, RequestError
from internvl_rt.critic import Judge
from internvl_rt.engine.preparing import has_media
from support.calls import check_idle, collect, run
from support.flash_requests import PARAMS, ask, bits, odds_of, picture, small
from support.flash_requests import load_flash as load
from support.load import SAMPLES, build_video
from support.official_flash import CONTEXT, decide, write_flash
from support.recorder import Recorder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "v2")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine
        check_idle(engine)


def test_frames_of_a_video_decide_together_with_pictures(engine: Engine) -> None:
    messages = ask({"type": "video", "video": build_video(0), "num_frames": 8}, small(1), "What happens?")
    prepared = engine.prepare(messages)
    assert [picture.num_tiles for picture in prepared.pictures] == [1] * 9
    assert bits(prepared) == decide(odds_of(engine, prepared), 0.4, 0.05).tolist()
    sizes = [4 - 3 * each for each in bits(prepared)]
    assert len(set(sizes)) == 2
    for number, size in enumerate(sizes[:8], 1):
        assert f"Frame{number}: <img>{CONTEXT * size}</img>" in prepared.prompt.text
    assert engine.chat(messages, PARAMS).usage.image_tokens == sum(sizes)


def test_what_was_encoded_to_be_decided_is_not_sent_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    load = engine._uploads._load
    monkeypatch.setattr(engine._uploads, "_load", lambda picture: sent.append(picture.digest) or load(picture))
    video = {"type": "video", "video": [small(seed) for seed in range(3)]}
    engine.chat(ask(video, picture(5), "?"), PARAMS)
    assert len(sent) == len(set(sent)) == 4


def test_encoding_counts_as_preparation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = engine.loop.encode
    monkeypatch.setattr(engine.loop, "encode", lambda *arguments: time.sleep(0.05) or encode(*arguments))
    timings = engine.chat(ask(small(0), small(1), "?"), PARAMS).timings
    assert timings.tile_s >= 0.1
    assert timings.vision_s < 0.1


def test_a_step_takes_as_many_pictures_that_are_encoded_as_it_has_tokens_for(engine: Engine) -> None:
    """The limit of tiles in a step is for those that it encodes."""
    messages = ask(*(picture(seed) for seed in range(3)), "?")
    (answer,) = engine.new_request(engine.prepare(messages), PARAMS).answers
    sequence = answer.sequence
    assert engine.loop._scheduler._chunk_stop(sequence, 0, 1000, 1) == (sequence.num_tokens, 0)


def test_threads_for_texts_prepare_no_pictures() -> None:
    assert has_media(RawPrompt("a", torch.zeros(1, 56, 56, 3, dtype=torch.uint8)))
    assert not has_media(RawPrompt("a"))


def test_a_raw_prompt_of_a_processor_is_shortened(engine: Engine) -> None:
    """A processor writes the full number of placeholders, since it knows nothing of the tiles."""
    tiles = torch.from_numpy(np.stack([small(seed) for seed in range(5)]))
    text = f"Read <img>{CONTEXT * 12}</img> and <img>{CONTEXT * 8}</img>, please"
    prepared = engine.prepare(RawPrompt(text, tiles))
    assert [picture.num_tiles for picture in prepared.pictures] == [3, 2]
    assert bits(prepared) == decide(odds_of(engine, prepared), 0.4, 0.05).tolist()
    sizes = [4 * one.num_tiles - 3 * sum(one.compressed or ()) for one in prepared.pictures]
    short = f"Read <img>{CONTEXT * sizes[0]}</img> and <img>{CONTEXT * sizes[1]}</img>, please"
    assert prepared.prompt.text == short
    assert list(prepared.prompt.token_ids) == engine.tokenizer.encode(short, specials=True)
    by_ids = engine.prepare(RawPrompt(engine.tokenizer.encode(text, specials=True), tiles))
    assert by_ids.prompt.token_ids == prepared.prompt.token_ids
    assert [picture.span for picture in by_ids.pictures] == list(prepared.prompt.spans)
    reply = engine.chat(RawPrompt(text, tiles), PARAMS)
    assert reply.usage.prompt_tokens == len(prepared.prompt.token_ids)
    with pytest.raises(RequestError, match=r"5 tiles need 20 <IMG_CONTEXT>"):
        engine.prepare(RawPrompt(short, tiles))


def test_a_raw_prompt_may_be_longer_than_the_window_before_it_is_shortened(folder: Path) -> None:
    tiles = torch.from_numpy(np.stack([small(seed) for seed in range(8)]))
    text = f"<img>{CONTEXT * 32}</img>"
    with load(folder, max_model_len=32) as engine:
        prepared = engine.prepare(RawPrompt(text, tiles))
        assert len(prepared.prompt.token_ids) < 32
        fixed = engine.preparer.fixed(RawPrompt(engine.tokenizer.encode(text, specials=True), tiles))
        assert len(fixed.content) == 34
        with pytest.raises(RequestError, match="from 1 to 56 token ids, got 60"):
            engine.prepare(RawPrompt([1] * 60, tiles))


def test_visual_tokens_that_are_given_stay_as_they_are_and_decide_nothing(engine: Engine) -> None:
    (kept,) = engine.encode_images([picture(0)])
    assert kept.shape == (7 * 4, 128)
    embeds = {"type": "image_embeds", "image_embeds": kept}
    prepared = engine.prepare(ask(embeds, small(0), small(1), "?"))
    assert [one.compressed is None for one in prepared.pictures] == [True, False, False]
    assert prepared.pictures[0].span.num_tokens == 28
    assert bits(prepared) == bits(engine.prepare(ask(small(0), small(1), "?")))
    alone = engine.chat(ask(embeds, "?"), PARAMS)
    assert (alone.usage.image_tokens, alone.usage.saved_image_tokens) == (28, 0)
    few = {"type": "image_embeds", "image_embeds": kept[:3]}  # of tiles that somebody else has compressed
    assert engine.chat(ask(few, "?"), PARAMS).usage.image_tokens == 3
    assert engine.prepare(ask(few, "?")).pictures[0].num_tiles == 1


def test_a_description_says_what_the_prompt_will_be(engine: Engine) -> None:
    messages = ask(picture(0), small(1), "?")
    described = engine.describe(messages)
    assert described.prompt == engine.prepare(messages).prompt
    assert [layout.num_tiles for layout in described.layouts if layout] == [7, 1]


def test_several_answers_scores_and_critics_see_the_shortened_prompt(engine: Engine) -> None:
    messages = ask(picture(0), small(1), "Read.")
    greedy = engine.chat(messages, PARAMS)
    drawn = engine.chat(messages, replace(PARAMS, n=4, temperature=1.0, seed=3, prompt_logprobs=0))
    assert len(drawn.choices) == 4
    assert drawn.usage.saved_image_tokens == greedy.usage.saved_image_tokens > 0
    assert len(drawn.prompt_logprobs or ()) == greedy.usage.prompt_tokens
    scores = engine.score(messages, ["12", "4719 and more"])
    for score in scores:
        assert score.usage.saved_image_tokens == greedy.usage.saved_image_tokens
        assert score.usage.prompt_tokens == greedy.usage.prompt_tokens + len(score.tokens)
    (place,) = engine.score_tokens(messages, ["1", "2"])
    assert place.is_finite
    verdicts = Judge(engine).score_responses(messages, ["1", "2"])
    assert [verdict.usage.saved_image_tokens for verdict in verdicts] == [greedy.usage.saved_image_tokens] * 2
    assert engine.chat(messages, replace(PARAMS, max_tokens=4), v2pe_delta=1 / 16).usage == replace(
        greedy.usage, completion_tokens=4, cached_tokens=0
    )


@torch.inference_mode()
def test_graphs_of_tiles_have_the_same_rows(folder: Path) -> None:
    messages = ask(picture(0), small(1), "Read.")
    options = {"max_model_len": 256, "max_num_seqs": 2, "max_tokens_per_step": 64}
    with load(folder, **options) as engine:
        expected = engine.chat(messages, PARAMS)
    with load(folder, **options) as engine:
        recorder = Recorder()
        engine.runner.capture(**options, everything=False, capture=recorder)
        reply = engine.chat(messages, PARAMS)
    assert reply.token_ids == expected.token_ids
    assert reply.usage == expected.usage
    assert recorder.replayed


@pytest.mark.slow
def test_ranks_and_vision_processes_give_the_same_answers(folder: Path) -> None:
    video = {"type": "video", "video": build_video(0), "num_frames": 4}
    calls = [ask(picture(0), small(1), "Read."), ask(video, "?"), ask(str(SAMPLES[0]), "Read the digits.")]
    with load(folder) as engine:
        expected = [engine.chat(each, PARAMS) for each in calls]
        (kept,) = engine.encode_images([picture(0)])
    for options in ({"tensor_parallel_size": 2}, {"vision_processes": 1}):
        with load(folder, **options) as engine:
            for messages, reply in zip(calls, expected, strict=True):
                ours = engine.chat(messages, PARAMS)
                assert ours.token_ids == reply.token_ids
                assert ours.usage == reply.usage
            torch.testing.assert_close(engine.encode_images([picture(0)])[0], kept, rtol=1e-4, atol=1e-4)
            assert engine.stats()["encoded_tiles"] == 8 + 4 + expected_tiles(engine, calls[2])


def expected_tiles(engine: Engine, messages: list[dict[str, Any]]) -> int:
    return sum(layout.num_tiles for layout in engine.describe(messages).layouts if layout)


def test_asyncio_callers_get_the_same_answers(folder: Path) -> None:
    calls = [ask(picture(seed), small(seed), "Read.") for seed in range(3)]
    raw = RawPrompt(f"<img>{CONTEXT * 8}</img>", torch.from_numpy(np.stack([small(0), small(1)])))
    with load(folder) as engine:
        expected = [engine.chat(each, PARAMS).token_ids for each in (*calls, raw)]

    async def together() -> list[list[int]]:
        async with AsyncEngine(load(folder)) as engine:
            replies = await asyncio.gather(*(engine.chat(each, PARAMS) for each in (*calls, raw)))
            pieces = await collect(engine.stream(calls[0], PARAMS))
            assert pieces[-1].reply is not None
            assert pieces[-1].reply.token_ids == replies[0].token_ids
            described = await engine.describe(calls[0])
            assert len(described.prompt.token_ids) == replies[0].usage.prompt_tokens
            return [reply.token_ids for reply in replies]

    assert run(together()) == expected
