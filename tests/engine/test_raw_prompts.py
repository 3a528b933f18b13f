"""Prompts without a template: every call that takes messages takes one, and the answer is the text after it."""

from dataclasses import replace
from pathlib import Path

import pytest

from internvl_rt import AsyncEngine, RawPrompt, RequestError, SamplingParams
from internvl_rt.inputs.tokenizer import Tokenizer
from support.calls import ask, check_idle, collect, load, run

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
NO_PICTURE = "Read <img><IMG_CONTEXT><IMG_CONTEXT></img> aloud"


@pytest.fixture(scope="module")
def engine():
    with load(block_size=16) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def test_a_raw_prompt_that_spells_the_template_gives_the_chats_answer_by_text_and_by_ids(engine):
    chat, prompt = engine.chat(ask("Hello"), GREEDY), engine.describe(ask("Hello")).prompt
    for content in (prompt.text, list(prompt.token_ids)):
        reply = engine.chat(RawPrompt(content), GREEDY)
        assert reply.token_ids == chat.token_ids
        assert reply.usage.prompt_tokens == chat.usage.prompt_tokens
        assert reply.text.strip() == chat.text


def test_every_call_takes_a_raw_prompt(engine):
    raw = RawPrompt("one two three")
    reply = engine.chat(raw, GREEDY)
    assert reply.usage.prompt_tokens == len(engine.tokenizer.encode("one two three"))
    pieces = list(engine.stream(raw, GREEDY))
    assert "".join(piece.text for piece in pieces) == reply.text == pieces[-1].reply.text
    batch = engine.generate([raw, ask("Hello"), RawPrompt([1, 2])], GREEDY)
    assert [each.choices for each in batch[:2]] == [reply.choices, engine.chat(ask("Hello"), GREEDY).choices]
    described = engine.describe(raw)
    assert (described.prompt.text, described.layouts) == ("one two three", ())
    (score,) = engine.score(raw, [" four"])
    scored = engine.chat(RawPrompt("one two three four"), replace(GREEDY, prompt_logprobs=0)).prompt_logprobs
    assert [token.token_id for token in score.tokens] == engine.tokenizer.encode(" four")
    assert score.total == pytest.approx(sum(token.logprob for token in scored[-len(score.tokens) :]), rel=1e-4)


def test_an_asynchronous_engine_takes_raw_prompts_and_copies_their_ids_at_once(engine):
    ids = engine.tokenizer.encode("one two three")
    expected, score = engine.chat(RawPrompt(ids), GREEDY), engine.score(RawPrompt(ids), ["four"])

    async def main():
        async with AsyncEngine(load(block_size=16)) as e:
            given = list(ids)
            raw = RawPrompt(given)
            calls = [e.chat(raw, GREEDY), collect(e.stream(raw, GREEDY)), e.describe(raw), e.score(raw, ["four"])]
            given.clear()
            reply, pieces, described, scores = [await call for call in calls]
            assert reply.choices == pieces[-1].reply.choices == expected.choices
            assert described.prompt.token_ids == tuple(ids)
            assert scores[0].total == pytest.approx(score[0].total, rel=1e-4)
            for wrong in (RawPrompt([]), RawPrompt(range(10**12)), RawPrompt("")):
                with pytest.raises(RequestError, match="the prompt"):
                    await e.chat(wrong, GREEDY)

    run(main())


def test_a_fixed_raw_prompt_does_not_change_with_what_its_caller_gave(engine):
    ids = [1, 2, 3]
    fixed = engine.preparer.fixed(RawPrompt(ids))
    ids.append(4)
    assert fixed.content == (1, 2, 3)
    assert engine.preparer.fixed(RawPrompt("Hi")).content == "Hi"
    for content, message in (
        (range(40_000), "from 1 to 32,768 token ids, got 40,000"),
        (b"Hi", "got bytes"),
        (7, "int"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.preparer.fixed(RawPrompt(content))


def test_the_answer_to_a_raw_prompt_keeps_its_whitespace_at_both_ends(engine):
    space, letter = (engine.tokenizer.encode(text)[0] for text in (" ", "7"))
    params = SamplingParams(max_tokens=4, logit_bias={space: 100}, ignore_eos=True)
    assert engine.chat(RawPrompt("one"), params).text == "    "
    assert engine.chat(ask("one"), params).text == ""
    around = SamplingParams(max_tokens=3, logit_bias={space: 99, letter: 60}, presence_penalty=60, ignore_eos=True)
    assert engine.chat(RawPrompt("one"), around).text == " 7 "
    assert "".join(piece.text for piece in engine.stream(RawPrompt("one"), around)) == " 7 "


def test_the_text_after_a_raw_prompt_is_decoded_as_its_continuation(engine, monkeypatch):
    """A tokenizer of sentencepiece drops the first space of a text, but not of what continues one."""
    begun, stream = [], Tokenizer.stream

    def watched(self, **options):
        begun.append(options["begun"])
        return stream(self, **options)

    monkeypatch.setattr(Tokenizer, "stream", watched)
    engine.chat(RawPrompt("one"), GREEDY)
    engine.chat(ask("one"), GREEDY)
    assert begun == [True, False]


def test_placeholders_of_pictures_are_plain_tokens_of_a_raw_prompt(engine):
    """So their keys and values are not those of a picture's tokens, though the ids are the same."""
    messages = ask("What is it?", SAMPLE)
    ids = list(engine.describe(messages).prompt.token_ids)
    params = replace(GREEDY, logprobs=0)
    chat, encoded = engine.chat(messages, params), engine.stats()["encoded_tiles"]
    raw = engine.chat(RawPrompt(ids), params)
    assert engine.stats()["encoded_tiles"] == encoded
    assert (raw.usage.image_tokens, raw.usage.prompt_tokens) == (0, chat.usage.prompt_tokens)
    assert raw.logprobs[0].logprob != pytest.approx(chat.logprobs[0].logprob, abs=1e-3)
    with load(block_size=16) as fresh:
        assert fresh.chat(RawPrompt(ids), params).token_ids == raw.token_ids
    assert engine.chat(messages, params).token_ids == chat.token_ids
    assert engine.chat(RawPrompt(NO_PICTURE), GREEDY).usage.image_tokens == 0


def test_log_probabilities_of_a_raw_prompt_are_one_for_each_token(engine):
    reply = engine.chat(RawPrompt("one two"), replace(GREEDY, prompt_logprobs=2))
    ids = engine.tokenizer.encode("one two")
    assert reply.prompt_logprobs[0] is None
    assert [token.token_id for token in reply.prompt_logprobs[1:]] == ids[1:]
    assert {len(token.top) for token in reply.prompt_logprobs[1:]} == {2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the prompt is an empty text"),
        ((), "the prompt must have from 1 to "),
        ([1 << 20], "token 0 of the prompt must be an integer from 0 to "),
        ("\u4f60" * 700_000, "the prompt has 700,000 characters, which cannot fit 32,768 tokens"),
        ("one two " * 100_000, "tokens, but only 32,768 fit; shorten it"),
        ([1] * 32_768, "the prompt has 32,768 tokens .*, but prompt and answer together may have 32,768; shorten it"),
        ([1] * 32_769, "the prompt must have from 1 to 32,768 token ids, got 32,769; shorten it"),
    ],
)
def test_raw_prompts_that_do_not_fit_are_refused(engine, content, message):
    for call in (engine.chat, engine.stream, engine.describe, lambda raw: engine.score(raw, ["a"])):
        with pytest.raises(RequestError, match=message):
            call(RawPrompt(content))
