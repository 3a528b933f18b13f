"""What is given wrongly is refused at the call, in one line, and no step and no other request feels it."""

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import AsyncEngine, MediaError, RequestError, SamplingParams
from internvl_rt.inputs.prompt import turns_from_question
from support.calls import check_idle, load

SAMPLES = sorted((Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples").glob("*.png"))[:4]
SAMPLE = SAMPLES[0]
ANSWER = SamplingParams(max_tokens=12)


def ask(*parts):
    text = {"type": "text", "text": "Read the digits."}
    return [{"role": "user", "content": [*({"type": kind, kind: content} for kind, content in parts), text]}]


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


# One thing where a list of things is expected.
CALLS = {
    "score of a text": (lambda e: e.score(ask(), "4719"), "responses: expected a list of texts, got '4719'"),
    "score of bytes": (lambda e: e.score(ask(), b"4719"), "responses: expected a list of texts, got bytes"),
    "score of a set": (lambda e: e.score(ask(), {"47", "19"}), "responses: expected a list of texts, got set"),
    "score of nothing": (lambda e: e.score(ask(), None), "responses: expected a list of texts, got NoneType"),
    "score of numbers": (lambda e: e.score(ask(), [4719]), "responses: expected texts that are not empty, got 4719"),
    "a path": (lambda e: e.encode_images(str(SAMPLE)), "images: expected a list of pictures, got '.*png'"),
    "an encoded picture": (lambda e: e.encode_images(SAMPLE.read_bytes()), "images: .*, got bytes; wrap one in a list"),
    "an array": (lambda e: e.encode_images(np.zeros((56, 56, 3), np.uint8)), "images: .*, got ndarray"),
    "a tensor": (lambda e: e.encode_images(torch.zeros(2, 56, 56, 3, dtype=torch.uint8)), "images: .*, got Tensor"),
    "a picture": (lambda e: e.encode_images(Image.new("RGB", (56, 56))), "images: .*, got Image;"),
}
SYNCHRONOUS_CALLS = {
    "a prompt": (lambda e: e.generate("Hello"), "batch: expected a list of conversations, .*, got 'Hello'"),
    "one conversation": (lambda e: e.generate(ask()), r"batch: .*, got a message; wrap a conversation: \[messages\]"),
    "one message": (lambda e: e.generate(ask()[0]), "batch: expected a list of conversations, .*, got dict"),
    "a generator": (lambda e: e.generate(ask() for _ in range(2)), "batch: .*, got generator"),
    "texts": (lambda e: e.generate(["Hello", "Bye"]), "request 0: messages: expected a list"),
    "params as text": (lambda e: e.generate([ask()], "greedy"), "params"),
    "params as dict": (
        lambda e: e.generate([ask()], {"max_tokens": 3}),
        "params must be SamplingParams, .* got {",
    ),
    "params of the wrong kind": (lambda e: e.generate([ask()], [7]), "params must be SamplingParams, .*, got 7"),
    "params in a list": (lambda e: e.chat(ask(), [SamplingParams()]), r"params must be SamplingParams, .*, got \["),
    "a message": (lambda e: e.chat(ask()[0]), "^messages: expected a list with at least one message, got an object"),
    "an empty dict": (lambda e: e.chat(ask(), {}), r"params must be SamplingParams, .*, got {}"),
    "stop tokens as text": (lambda e: e.chat(ask(), SamplingParams(stop_token_ids="12")), "stop_token_ids .* got '12'"),
}


@pytest.mark.parametrize(("call", "message"), (CALLS | SYNCHRONOUS_CALLS).values(), ids=CALLS | SYNCHRONOUS_CALLS)
def test_one_thing_where_several_are_expected_is_refused(engine, call, message):
    with pytest.raises(RequestError, match=message):
        call(engine)


def test_one_thing_where_several_are_expected_is_refused_in_an_event_loop():
    async def refused():
        async with AsyncEngine(load()) as engine:
            for call, message in CALLS.values():
                with pytest.raises(RequestError, match=message):
                    await call(engine)
            with pytest.raises(RequestError, match=r"params must be SamplingParams, .*, got {}"):
                await engine.chat(ask(), {})

    asyncio.run(refused())


VISUAL = torch.zeros(4, 128)
TILES = torch.zeros(1, 3, 56, 56)
BAD_EMBEDDINGS = {
    "double": VISUAL.double() + 1e300,
    "object": np.full((4, 128), None),
    "NaN": np.full((4, 128), np.nan),
    "meta": VISUAL.to("meta"),
    "wide": torch.zeros(4, 129),
    "few": torch.zeros(3, 128),
    "list": VISUAL.tolist(),
}
BAD_PIXELS = {
    "meta": torch.zeros(56, 56, 3, dtype=torch.uint8, device="meta"),
    "float": np.zeros((56, 56, 3)),
    "channels first": np.zeros((3, 56, 56), np.uint8),
    "alpha": torch.zeros(56, 56, 4, dtype=torch.uint8),
    "object": np.full((56, 56, 3), None),
}
BAD_TILES = {
    "large": torch.zeros(1, 3, 224, 224),
    "NaN": TILES * torch.nan,
    "double": TILES.double() + 1e300,
    "integers": TILES.long(),
    "meta": TILES.to("meta"),
    "complex": TILES.to(torch.complex64),
    "none": TILES[:0],
    "None": None,
}


def bad_calls(engine):
    """Returns one call for each bad input, by every public way in."""
    turns, _ = turns_from_question("Read the digits.", None, num_images=1, system=None)
    width = engine.config.decoder.hidden_size
    assert width == VISUAL.shape[1]
    embeds = [
        lambda given=given: engine.chat(ask(("image_embeds", given)), ANSWER) for given in BAD_EMBEDDINGS.values()
    ]
    pixels = [lambda given=given: engine.chat(ask(("image", given)), ANSWER) for given in BAD_PIXELS.values()]
    encoded = [lambda given=given: engine.encode_images([given]) for given in BAD_PIXELS.values()]
    tiles = [lambda given=given: engine.prepare_turns(turns, [given]) for given in BAD_TILES.values()]
    scores = [lambda given=given: engine.score(ask(("image", given)), ["4719"]) for given in BAD_PIXELS.values()]
    return [*embeds, *pixels, *encoded, *tiles, *scores]


def test_bad_inputs_fail_alone_beside_threads_that_get_their_answers(engine):
    calls = bad_calls(engine)
    with ThreadPoolExecutor(6) as pool:
        neighbours = [pool.submit(engine.chat, ask(("image", sample)), ANSWER) for sample in SAMPLES * 3]
        errors = [pool.submit(call) for call in calls]
        for error in errors:
            assert isinstance(error.exception(60), RequestError | MediaError)
        assert [call.result(60).text for call in neighbours] == [sample.stem for sample in SAMPLES * 3]
    assert "requests_error" not in engine.stats()


def test_bad_inputs_fail_alone_beside_tasks_that_get_their_answers():
    bad = [ask(("image_embeds", given)) for given in BAD_EMBEDDINGS.values()]
    bad += [ask(("image", given)) for given in BAD_PIXELS.values()]

    async def together():
        async with AsyncEngine(load()) as engine:
            calls = [engine.chat(ask(("image", sample)), ANSWER) for sample in SAMPLES]
            calls += [engine.chat(messages, ANSWER) for messages in bad]
            return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(together())
    assert [reply.text for reply in found[: len(SAMPLES)]] == [sample.stem for sample in SAMPLES]
    assert all(isinstance(error, RequestError | MediaError) for error in found[len(SAMPLES) :])


def test_a_prompt_of_another_engine_is_refused_unless_that_has_the_same_model(engine):
    messages = ask(("image", SAMPLE))
    with load(dtype="bfloat16", kv_cache_bytes=1 << 24) as other:
        prepared = other.prepare(messages)
    with pytest.raises(RequestError, match="the prompt is for another model, dtype, kv_cache_dtype, block_size or pre"):
        engine.generate_prepared(iter([prepared]), [ANSWER])
    with pytest.raises(RequestError, match="the prompt is for another"):
        engine.generate_prepared(iter([messages]), [ANSWER])
    with load(kv_cache_bytes=1 << 24) as other:
        prepared = pickle.loads(pickle.dumps(other.preparer.prepare(messages)))
    assert engine.generate_prepared(iter([prepared]), [ANSWER])[0].text == SAMPLE.stem
    long = engine.prepare(ask(*[("image", SAMPLE)] * 20))
    with (
        load(max_model_len=64, kv_cache_bytes=1 << 24) as other,
        pytest.raises(RequestError, match=r"the prompt needs room for \d+ tokens, but this engine has 64"),
    ):
        other.generate_prepared(iter([long]), [ANSWER])


def test_a_broken_picture_of_a_prompt_from_elsewhere_fails_before_it_reaches_a_step(engine):
    cut = SAMPLE.read_bytes()[:-40]
    prepared = engine.preparer.prepare(ask(("image", cut)))
    neighbour = engine.stream(ask(("image", SAMPLE)), replace(ANSWER, max_tokens=40, ignore_eos=True))
    next(neighbour)
    with pytest.raises(MediaError, match="broken or truncated"):
        engine.new_request(prepared, ANSWER)
    assert len(list(neighbour)[-1].reply.token_ids) == 40
