"""A later request runs neither decoder nor vision tower, and decodes no picture, for a prefix that the cache holds."""

import io

import numpy as np
import pytest
from PIL import Image

from internvl_rt import Engine, MediaError, RequestError, SamplingParams, StepError
from internvl_rt.inputs import image as image_module
from internvl_rt.inputs.identity import build_identity
from support.calls import ask

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
BLOCK = 16


def png(seed, width=150, height=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def count_calls(monkeypatch, owner, name):
    """Returns a list to which every call of `owner.name` appends its arguments."""
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args: calls.append(args) or original(*args))
    return calls


def open_engine(**options):
    options = {"block_size": BLOCK, "visual_cache_bytes": 0, **options}  # only prefixes are reused
    return Engine.from_pretrained("tiny", device="cpu", **options)


@pytest.fixture
def engine():
    with open_engine() as engine:
        yield engine
        engine.cache.blocks.check_invariants()
        stats = engine.cache.blocks.stats()
        assert stats["num_used"] == stats["num_deferred"] == 0


@pytest.fixture(scope="module")
def forgetful():
    with open_engine(prefix_cache=False) as engine:
        yield engine


def test_second_question_about_a_picture_computes_only_what_is_new(engine, forgetful, monkeypatch):
    encoded = count_calls(monkeypatch, engine.model, "encode_tiles")
    tiled = count_calls(monkeypatch, image_module, "tile_image")
    task = "Look at the picture and answer with digits only, nothing else. "  # it fills up the picture's last block
    first = engine.chat(ask(f"{task}Read them.", png(0)), PARAMS)
    assert (first.usage.cached_tokens, len(encoded), len(tiled)) == (0, 1, 1)

    second = engine.chat(ask(f"{task}How many are there?", png(0)), PARAMS)
    assert (len(encoded), len(tiled)) == (1, 1), "the picture was decoded or encoded again"
    assert second.usage.cached_tokens >= second.usage.image_tokens
    assert second.usage.cached_tokens % BLOCK == 0
    assert second.token_ids == forgetful.chat(ask(f"{task}How many are there?", png(0)), PARAMS).token_ids


def test_the_same_prompt_again_leaves_a_token_to_compute(engine):
    replies = [engine.chat(ask("Read the digits.", png(0)), PARAMS) for _ in range(3)]
    assert replies[0].token_ids == replies[1].token_ids == replies[2].token_ids
    assert replies[2].usage.cached_tokens == (replies[2].usage.prompt_tokens - 1) // BLOCK * BLOCK


def test_a_conversation_sent_again_pays_only_for_its_new_turn(engine, forgetful):
    history = ask("Read the digits.", png(1))
    reply = engine.chat(history, PARAMS)
    history += [{"role": "assistant", "content": reply.text}]
    again = engine.chat([*history, *ask("And now?")], PARAMS)
    assert again.usage.cached_tokens >= reply.usage.prompt_tokens // BLOCK * BLOCK
    assert again.token_ids == forgetful.chat([*history, *ask("And now?")], PARAMS).token_ids


def test_another_picture_of_the_same_size_shares_only_what_lies_before_it(engine, forgetful):
    engine.chat(ask("Read the digits.", png(2)), PARAMS)
    other = engine.chat(ask("Read the digits.", png(3)), PARAMS)
    assert other.usage.cached_tokens <= other.usage.prompt_tokens - other.usage.image_tokens
    assert other.token_ids == forgetful.chat(ask("Read the digits.", png(3)), PARAMS).token_ids


def test_pictures_in_another_order_are_another_prompt(engine, forgetful):
    engine.chat(ask("Compare.", png(4), png(5)), PARAMS)
    swapped = engine.chat(ask("Compare.", png(5), png(4)), PARAMS)
    assert swapped.usage.cached_tokens <= swapped.usage.prompt_tokens - swapped.usage.image_tokens
    assert swapped.token_ids == forgetful.chat(ask("Compare.", png(5), png(4)), PARAMS).token_ids


def test_another_delta_is_another_prompt(engine, forgetful):
    engine.chat(ask("Read the digits.", png(6)), PARAMS)
    finer = engine.chat(ask("Read the digits.", png(6)), PARAMS, v2pe_delta=0.25)
    assert finer.usage.cached_tokens == 0
    expected = forgetful.chat(ask("Read the digits.", png(6)), PARAMS, v2pe_delta=0.25)
    assert finer.token_ids == expected.token_ids


def test_only_requests_of_equal_salt_share_prefixes(engine):
    for salt in (None, "a", "b", ""):
        assert engine.chat(ask("Read the digits.", png(16)), PARAMS, cache_salt=salt).usage.cached_tokens == 0
        assert engine.chat(ask("Read the digits.", png(16)), PARAMS, cache_salt=salt).usage.cached_tokens > 0
    with pytest.raises(RequestError, match="cache_salt must be a string of 0 to 4,096 characters, or None, got 7"):
        engine.chat(ask("Hello"), PARAMS, cache_salt=7)


def test_identities_differ_in_every_part_and_in_how_the_parts_are_cut():
    parts = [
        {"a": "1", "b": "2"},
        {"a": "12", "b": ""},
        {"a": 1, "b": "2"},
        {"a": "1"},
        {"a": None, "b": "2"},
        {"ab": "12"},
    ]
    identities = {build_identity(**each) for each in parts}
    assert len(identities) == len(parts)
    assert build_identity(a="1", b="2") == build_identity(b="2", a="1")


def test_without_a_prefix_cache_nothing_is_shared(forgetful):
    for _ in range(2):
        assert forgetful.chat(ask("Read the digits.", png(7)), PARAMS).usage.cached_tokens == 0
    assert forgetful.cache.blocks.stats()["num_cached"] == 0


def test_evicted_prefixes_are_computed_again(forgetful):
    with open_engine(max_model_len=256, max_num_seqs=1, kv_cache_bytes=None) as engine:
        for seed in (8, 9, 10, 11, 12, 8):
            reply = engine.chat(ask("Read the digits.", png(seed)), PARAMS)
            assert reply.token_ids == forgetful.chat(ask("Read the digits.", png(seed)), PARAMS).token_ids
            engine.cache.blocks.check_invariants()
        assert engine.cache.blocks.stats()["num_evictions"] > 0


def test_a_picture_whose_blocks_went_between_look_and_admission_is_decoded_then(engine, monkeypatch):
    engine.chat(ask("Read the digits.", png(13)), PARAMS)
    expected = engine.chat(ask("How many?", png(13)), PARAMS)
    tiled = count_calls(monkeypatch, image_module, "tile_image")
    stream = engine.stream(ask("How many?", png(13)), PARAMS)
    engine.cache.blocks.reset()
    assert list(stream)[-1].reply.token_ids == expected.token_ids
    assert len(tiled) == 1


def test_the_failed_step_leaves_no_prefix_behind(engine, monkeypatch):
    original = engine.model.run_step

    def fail(step, caches):
        original(step, caches)
        raise RuntimeError("device fault")

    monkeypatch.setattr(engine.model, "run_step", fail)
    with pytest.raises(StepError, match="device fault"):
        engine.chat(ask("Read the digits.", png(14)), PARAMS)
    monkeypatch.undo()
    assert engine.chat(ask("Read the digits.", png(14)), PARAMS).usage.cached_tokens == 0


def test_a_step_that_does_not_end_leaves_no_prefix_behind_though_the_one_after_it_ends(monkeypatch):
    text = "Which digits do you see? " * 8
    with open_engine(max_tokens_per_step=2 * BLOCK) as engine:
        monkeypatch.setattr(engine.loop, "run_ahead", True)
        original = engine.runner.launch

        def fail():
            raise RuntimeError("device fault")

        def launch(step):
            launched = original(step)
            if launched.number == 2:
                monkeypatch.setattr(launched.done, "wait", fail)
            return launched

        monkeypatch.setattr(engine.runner, "launch", launch)
        with pytest.raises(StepError, match="device fault"):
            engine.chat(ask(text), PARAMS)
        assert engine.cache.blocks.num_steps > 3, "another step was under way"
        assert engine.chat(ask(text), PARAMS).usage.cached_tokens == 2 * BLOCK, "the first step's tokens, and no others"
        engine.cache.blocks.check_invariants()


def test_a_broken_picture_fails_before_anything_runs(engine):
    broken = png(15)[:-200]
    with pytest.raises(MediaError, match="broken or truncated"):
        engine.chat(ask("Read the digits.", broken), PARAMS)


def test_answers_do_not_depend_on_what_was_asked_before(engine, forgetful):
    rng = np.random.default_rng(0)
    for _ in range(12):
        images = [png(int(seed)) for seed in rng.integers(0, 3, rng.integers(0, 3))]
        messages = ask(["Read the digits.", "How many?"][rng.integers(2)], *images)
        batch = [messages, ask("Hello", png(1))]
        expected = [forgetful.chat(each, PARAMS).token_ids for each in batch]
        assert [reply.token_ids for reply in engine.generate(batch, PARAMS)] == expected
