"""Engines of an InternVL3.5-Flash: each request decides by itself, and everything that takes pictures follows."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from internvl_rt import Engine, MediaError, RequestError
from internvl_rt.engine import flash
from internvl_rt.errors import ContextLengthError
from internvl_rt.inputs.picture import Picture
from support.calls import check_idle
from support.flash_requests import PARAMS, ask, bits, odds_of, picture, small
from support.flash_requests import load_flash as load
from support.load import SAMPLES
from support.official_flash import CONTEXT, decide, write_flash

Parts = tuple[object, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "v2")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine
        check_idle(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "parts", [(small(0), "?"), (small(0), small(1), "?"), (small(0), small(0), "?"), (picture(0), small(1), "?")]
)
def test_all_tiles_of_a_request_decide_together_in_the_models_dtype(folder: Path, dtype: str, parts: Parts) -> None:
    with load(folder, dtype=dtype) as engine:
        prepared = engine.prepare(ask(*parts))
        odds = odds_of(engine, prepared)
        assert odds.dtype == engine.model.dtype
        assert bits(prepared) == decide(odds, 0.4, 0.05).tolist()
        assert any(bits(prepared)) == (len(set(odds.tolist())) > 1)
        counts = [sum(1 if each else 4 for each in one.compressed or ()) for one in prepared.pictures]
        assert [one.span.num_tokens for one in prepared.pictures] == counts
        ids, context_id = prepared.prompt.token_ids, engine.tokenizer.token_id(CONTEXT)
        for one in prepared.pictures:
            start, stop = one.span.start, one.span.start + one.span.num_tokens
            assert set(ids[start:stop]) == {context_id}
            assert context_id not in (ids[start - 1], ids[stop])
        reply = engine.chat(ask(*parts), PARAMS)
        assert reply.usage.image_tokens == sum(counts)
        assert reply.usage.saved_image_tokens == 3 * sum(bits(prepared))
        assert reply.usage.prompt_tokens == len(ids)
        assert engine.stats()["saved_image_tokens"] == reply.usage.saved_image_tokens


def test_one_tile_is_never_compressed(engine: Engine) -> None:
    reply = engine.chat(ask(small(3), "What?"), PARAMS)
    assert (reply.usage.image_tokens, reply.usage.saved_image_tokens) == (4, 0)
    assert engine.chat(ask("What?"), PARAMS).usage.image_tokens == 0


def test_a_picture_is_decided_anew_in_other_company_and_encoded_once(folder: Path) -> None:
    """The decisions are part of what the KV cache knows a picture by, so no prefix is taken for another."""
    shared, others = picture(0), [picture(seed, 170, 110) for seed in range(1, 9)]
    with load(folder) as engine, load(folder, prefix_cache=False, visual_cache_bytes=0) as fresh:
        decisions = set()
        for other in others:
            messages = ask(shared, "and", other, "?")
            decisions.add(engine.prepare(messages).pictures[0].compressed)
            ours, theirs = engine.chat(messages, PARAMS), fresh.chat(messages, PARAMS)
            assert ours.token_ids == theirs.token_ids
            assert ours.usage.image_tokens == theirs.usage.image_tokens
        assert len(decisions) > 1
        assert engine.stats()["encoded_tiles"] == 7 * 9


def test_tiles_of_equal_number_but_other_places_share_no_prefix(engine: Engine) -> None:
    """Two decisions over one picture that leave as many tokens give prompts of equal ids, and other visual tokens."""
    prepared = engine.prepare(ask(picture(0), "Read it, please."))
    given = prepared.pictures[0]
    compressed = given.compressed or ()
    other = replace(given, compressed=compressed[1:] + compressed[:1])
    assert other.compressed != given.compressed
    assert len({given.span_digest, other.span_digest, given.digest}) == 3
    replies = [
        engine.generate_prepared(iter([replace(prepared, pictures=(each,))]), [PARAMS])[0]
        for each in (given, other, given)
    ]
    assert replies[0].usage.cached_tokens == 0
    assert replies[1].usage.cached_tokens <= given.span.start
    assert replies[2].usage.cached_tokens > given.span.start
    assert replies[2].token_ids == replies[0].token_ids


def test_prompts_of_other_decisions_have_no_beginning_in_common(engine: Engine) -> None:
    prepared = engine.prepare(ask(picture(0), "Read it."))
    given = prepared.pictures[0]
    compressed = given.compressed or ()
    other = replace(prepared, pictures=(replace(given, compressed=compressed[1:] + compressed[:1]),))
    for second, is_common in ((prepared, True), (other, False)):
        prompts = [
            engine.preparer.prepare_score(prompt, text, include_end=False)
            for prompt, text in ((prepared, "12"), (second, "47"))
        ]
        assert (engine.new_scoring(prompts).beginning is not None) == is_common


def test_a_batch_answers_each_request_as_alone(folder: Path) -> None:
    batch = [ask(picture(seed), "Read.") for seed in range(3)]
    batch += [ask(small(seed), small(seed + 1), "?") for seed in range(3)]
    batch += [ask("Hello"), ask(small(9), "?")]
    with load(folder) as engine, load(folder, prefix_cache=False, visual_cache_bytes=0) as fresh:
        alone = [fresh.chat(each, PARAMS) for each in batch]
        together = engine.generate(batch, PARAMS)
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    saved = [reply.usage.saved_image_tokens for reply in alone]
    assert [reply.usage.saved_image_tokens for reply in together] == saved
    assert engine.stats()["saved_image_tokens"] == sum(saved)


def test_pictures_of_later_turns_may_change_what_is_decided_of_earlier_ones(folder: Path) -> None:
    with load(folder) as engine, load(folder, prefix_cache=False, visual_cache_bytes=0) as fresh:
        conversation = ask(picture(2), "Read it.")
        changed = 0
        for seed in range(10, 16):
            before = engine.prepare(conversation).pictures[0].compressed
            reply = engine.chat(conversation, PARAMS)
            conversation += [{"role": "assistant", "content": reply.text}, *ask(picture(seed, 60, 110), "And this?")]
            changed += engine.prepare(conversation).pictures[0].compressed != before
            assert engine.chat(conversation, PARAMS).token_ids == fresh.chat(conversation, PARAMS).token_ids
        assert changed
        text_only = [*conversation, {"role": "assistant", "content": "1"}, *ask("Why?")]
        assert engine.chat(text_only, PARAMS).usage.cached_tokens > 0


def test_a_picture_whose_keys_are_cached_is_neither_decoded_nor_encoded(folder: Path, monkeypatch) -> None:
    with load(folder, visual_cache_bytes=0) as engine:
        messages = ask(picture(0), "Read it, please, to the end.")
        first = engine.chat(messages, PARAMS)
        before = engine.stats()["encoded_tiles"]
        loads = []
        load_once = engine._uploads.load
        monkeypatch.setattr(engine._uploads, "load", lambda picture: loads.append(picture) or load_once(picture))
        again = engine.chat(messages, PARAMS)
        assert again.token_ids == first.token_ids
        assert (engine.stats()["encoded_tiles"], loads) == (before, [])


def test_decisions_stay_when_visual_tokens_are_lost_before_the_request_runs(engine: Engine, monkeypatch) -> None:
    messages = ask(picture(0), "Read.")
    expected = engine.chat(messages, PARAMS)
    engine.cache.blocks.reset()
    prepared = engine.prepare(messages)
    engine.visual_cache._entries.clear()
    engine.visual_cache._held.clear()
    monkeypatch.setattr(engine.preparer, "_decide", None)
    before = engine.stats()["encoded_tiles"]
    (reply,) = engine.generate_prepared(iter([prepared]), [PARAMS])
    assert reply.token_ids == expected.token_ids
    assert engine.stats()["encoded_tiles"] == before + 7


def test_only_so_many_odds_stay_known(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(flash, "MAX_KNOWN_TILES", 10)
    decider = engine.preparer._decide.__self__
    for seed in range(6):
        engine.prepare(ask(picture(seed), small(seed), "?"))
        assert sum(map(len, decider._known.values())) == decider._num_known <= 10
    assert [len(each) for each in decider._known.values()] == [1, 7, 1]


def test_tenants_share_no_odds(folder: Path) -> None:
    with load(folder) as engine:
        for salt in (None, "a"):
            engine.prepare(ask(small(0), small(1), "?"), cache_salt=salt)
        before = engine.stats()["encoded_tiles"]
        assert before == 4
        engine.prepare(ask(small(0), small(1), "?"), cache_salt="b")
        assert engine.stats()["encoded_tiles"] == before + 2
        engine.describe(ask(small(0), small(1), "?"), cache_salt="b")
        assert engine.stats()["encoded_tiles"] == before + 2


def test_chunks_preemptions_and_drafts_change_no_answer(folder: Path, monkeypatch) -> None:
    batch = [ask(picture(seed), "Read it.") for seed in range(4)]
    params = replace(PARAMS, max_tokens=24)
    with load(folder, prefix_cache=False) as engine:
        expected = [engine.chat(each, params).token_ids for each in batch]
    with load(folder, max_tokens_per_step=17, num_draft_tokens=3, prefix_cache=False) as engine:
        assert [reply.token_ids for reply in engine.generate(batch, params)] == expected
    block_bytes = engine.memory.block_bytes
    with load(folder, kv_cache_bytes=12 * block_bytes, max_model_len=96, prefix_cache=False) as engine:
        assert [reply.token_ids for reply in engine.generate(batch, params)] == expected
        assert engine.stats()["preemptions"] > 0


def test_a_broken_picture_is_named_and_leaves_nothing(engine: Engine) -> None:
    data = SAMPLES[0].read_bytes()
    with pytest.raises(MediaError) as caught:
        engine.chat(ask(small(0), data[: len(data) // 2], "?"), PARAMS)
    assert caught.value.media_id == 1
    assert engine.chat(ask(small(0), data, "?"), PARAMS).usage.image_tokens > 0


def test_pictures_that_cannot_fit_are_refused_before_one_is_encoded(folder: Path) -> None:
    with load(folder, max_model_len=64) as engine:
        with pytest.raises(ContextLengthError, match="at least 70 tokens, if all tiles are compressed"):
            engine.chat(ask(*(picture(seed) for seed in range(10)), "?"), PARAMS)
        frames = {"type": "video", "video": "no such file", "num_frames": 65}
        with pytest.raises(ContextLengthError, match="has 65 pictures and frames of videos, but only 64 tiles of 1 to"):
            engine.chat(ask(frames, "?"), PARAMS)
        assert engine.stats()["encoded_tiles"] == 0
        with pytest.raises(ContextLengthError, match="prompt and answer together may have 64"):
            engine.chat(ask(*(picture(seed) for seed in range(5)), "?"), PARAMS)
        assert engine.stats()["encoded_tiles"] == 35


def test_a_prompt_whose_tiles_nobody_has_decided_is_refused(engine: Engine) -> None:
    prepared = engine.prepare(ask(small(0), small(1), "?"))
    assert engine.generate_prepared(iter([pickle.loads(pickle.dumps(prepared))]), [PARAMS])[0].token_ids
    pictures = tuple(Picture(one.digest, one.num_tiles, one.image, span=one.span) for one in prepared.pictures)
    with pytest.raises(RequestError, match="of which is not decided whether they are compressed; prepare it with this"):
        engine.generate_prepared(iter([replace(prepared, pictures=pictures)]), [PARAMS])


def test_waiting_for_a_picture_that_nobody_wants_any_more_ends(folder: Path) -> None:
    with load(folder) as engine:
        reply = engine.chat(ask(picture(0), "?"), PARAMS, timeout_s=1e-9)
        assert (reply.finish_reason, reply.usage.prompt_tokens) == ("timeout", 0)
        assert engine.stats()["encoded_tiles"] == 0


def test_the_ordinary_model_has_no_such_numbers() -> None:
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        prepared = engine.prepare(ask(picture(0), "?"))
        assert prepared.pictures[0].compressed is None
        assert prepared.pictures[0].span_digest == prepared.pictures[0].digest
        assert prepared.tile_s > 0
        assert engine.stats()["encoded_tiles"] == 0
        assert engine.chat(ask(picture(0), "?"), PARAMS).usage.saved_image_tokens == 0
        assert engine.stats()["saved_image_tokens"] == 0


def test_random_weights_of_a_flash_config_answer(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["llm_config"]["vocab_size"] = 400
    (tmp_path / "config.json").write_text(json.dumps(values))
    with Engine.from_pretrained(f"random:{tmp_path / 'config.json'}", device="cpu") as engine:
        assert engine.chat(ask(picture(0), "?"), PARAMS).usage.saved_image_tokens > 0
