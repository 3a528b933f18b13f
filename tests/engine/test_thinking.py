"""A model that can think reasons before it answers, and every call gives the reasoning apart from the answer."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import internvl_rt
from internvl_rt import AsyncEngine, RawPrompt, RequestError, SamplingParams
from internvl_rt.inputs import thinking
from support.calls import ask, check_idle, collect, load, run
from support.scripted_text import script

TINY = Path(internvl_rt.__file__).parent / "tiny"
SO_42 = ["so", ".\n</thi", "nk>", "\n", "\n4", "2"]
OTHER = ["well</think>", "7", "", "", "", ""]
UNENDED = ["so", ". And", " then", " <", "/think", " "]
SIX = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


@pytest.fixture
def able(monkeypatch):
    """Makes every model count as one that was trained to reason."""
    monkeypatch.setattr(thinking, "can_think", lambda config: True)


def parts(pieces, choice=0):
    """Joins the reasoning and the text of the pieces of an answer."""
    own = [piece for piece in pieces if piece.choice == choice]
    return "".join(piece.reasoning for piece in own), "".join(piece.text for piece in own)


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        (SO_42, SIX, ("so.\n", "42")),
        (["<think>\n", *SO_42], replace(SIX, max_tokens=7), ("so.\n", "42")),
        (SO_42, replace(SIX, max_tokens=2), ("so.\n</thi", "")),
        (UNENDED, SIX, ("so. And then </think", "")),
        (["s", "o</think>", "\n", " ", "\n", " "], SIX, ("so", "")),
        (SO_42, replace(SIX, stop="."), ("so", "")),
        (SO_42, replace(SIX, stop=["2", "never"]), ("so.\n", "4")),
        (SO_42, replace(SIX, stop="4", include_stop=True), ("so.\n", "4")),
        (SO_42, replace(SIX, stop="</think>"), ("so.", "")),
        (SO_42, replace(SIX, stop="</think>", include_stop=True), ("so.\n", "")),
    ],
    ids=str,
)  # fmt: skip
def test_reasoning_and_answer_come_apart_from_every_call(engine, monkeypatch, text, params, expected):
    script(monkeypatch, text)
    reply = engine.chat(ask("Hello"), params, think=True)
    assert (reply.reasoning, reply.text) == expected
    assert len(reply.token_ids) == reply.usage.completion_tokens > 1, "the tokens of both parts"
    pieces = list(engine.stream(ask("Hello"), params, think=True))
    assert parts(pieces) == expected
    assert all(piece.text or piece.reasoning for piece in pieces[:-1])
    replies = engine.generate([ask("Hello")] * 2, params, think=True)
    replies += [each for _, each in engine.generate_as_completed([ask("Hello")], params, think=True)]
    assert [each.choices for each in [pieces[-1].reply, *replies]] == [reply.choices] * 4


def test_asyncio_gives_the_same_parts(monkeypatch):
    script(monkeypatch, SO_42)

    async def main():
        async with AsyncEngine(load()) as shared:
            pieces = await collect(shared.stream(ask("Hello"), SIX, think=True))
            reply, described = await asyncio.gather(
                shared.chat(ask("Hello"), SIX, think=True), shared.describe(ask("Hello"), think=True)
            )
            with pytest.raises(RequestError, match="think: a RawPrompt"):
                await shared.chat(RawPrompt("Hello"), SIX, think=True)
            return pieces, reply, described

    pieces, reply, described = run(main())
    assert parts(pieces) == (reply.reasoning, reply.text) == ("so.\n", "42")
    assert len(described.prompt.token_ids) == reply.usage.prompt_tokens


def test_each_of_several_answers_has_its_own_reasoning(engine, monkeypatch):
    script(monkeypatch, SO_42, OTHER, UNENDED)
    params = replace(SIX, n=3, logprobs=0)
    *_, last = pieces = list(engine.stream(ask("Hello"), params, think=True))
    expected = [("so.\n", "42"), ("well", "7"), ("so. And then </think", "")]
    assert [(choice.reasoning, choice.text) for choice in last.reply.choices] == expected
    assert [parts(pieces, index) for index in range(3)] == expected
    for index, choice in enumerate(last.reply.choices):
        assert tuple(token for piece in pieces if piece.choice == index for token in piece.tokens) == choice.logprobs


def test_without_the_switch_the_text_is_whole_and_there_is_no_reasoning(engine, monkeypatch):
    script(monkeypatch, SO_42)
    *pieces, last = engine.stream(ask("Hello"), SIX)
    assert (last.reply.text, last.reply.reasoning) == ("".join(SO_42), None)
    assert not any(piece.reasoning for piece in pieces)


def test_the_prompt_has_the_official_message_before_the_conversation_s_own(engine, able):
    system = {"role": "system", "content": "Be brief."}
    prepared = engine.prepare([system, *ask("Hello")], think=True)
    assert prepared.prompt.text == (
        f"<|im_start|>system\n{thinking.SYSTEM_MESSAGE}\n\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    begun = {"role": "assistant", "content": "<think>\n"}
    own = {"role": "system", "content": thinking.SYSTEM_MESSAGE}
    assert engine.describe(ask("Hello"), think=True).prompt == engine.describe([own, *ask("Hello"), begun]).prompt


def test_what_cannot_think_is_refused(engine, monkeypatch):
    untrained = "think: this model was not trained to reason before it answers; leave it out, or load an InternVL3.5"
    for call in (engine.chat, engine.stream, engine.describe, lambda *each, **how: engine.generate([each[0]], **how)):
        with pytest.raises(RequestError, match=untrained):
            call(ask("Hello"), think=True)
    monkeypatch.setattr(thinking, "can_think", lambda config: True)
    begun = [*ask("Hello"), {"role": "assistant", "content": "I"}]
    for messages, switch, message in (
        (begun, True, r"messages\[1\]: an answer that is begun"),
        (RawPrompt("Hello"), True, "think: a RawPrompt has no system message"),
        ([{"role": "user", "content": 3}], True, r"messages\[0\].content"),
        (ask("Hello"), "yes", "think must be True or False, or None, got 'yes'"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.chat(messages, think=switch)


def test_an_answer_whose_time_was_over_before_its_prompt_was_ready_has_no_reasoning_yet(engine, able):
    async def main():
        async with AsyncEngine(load()) as shared:
            return await shared.chat(ask("Hello", TINY / "samples" / "7.png"), think=True, timeout_s=1e-9)

    for reply in (engine.chat(ask("Hello", TINY / "samples" / "7.png"), think=True, timeout_s=1e-9), run(main())):
        assert (reply.finish_reason, reply.reasoning, reply.text) == ("timeout", "", "")


def test_a_grammar_holds_behind_the_reasoning_where_the_mark_is_several_tokens(engine, able):
    """The regex holds behind an "o", which the bias draws first, so that the reasoning ends."""
    assert engine.tokenizer.find_token_id(thinking.END) is None
    (first,) = engine.tokenizer.encode("o")
    params = SamplingParams(regex=r"n\.</think>\n4[0-9]", grammar_after="o", logit_bias={first: 100})
    reply = engine.chat(ask("Hello"), params, think=True)
    assert (reply.reasoning, reply.text[:-1], reply.finish_reason) == ("on.", "\n4", "stop")
    assert parts(list(engine.stream(ask("Hello"), params, think=True))) == (reply.reasoning, reply.text)


def test_a_grammar_holds_behind_the_reasoning_where_the_mark_is_a_token(tmp_path, able):
    folder = shutil.copytree(TINY, tmp_path / "checkpoint")
    for name in ("added_tokens.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|fim_prefix|>", "<think>").replace("<|fim_suffix|>", "</think>")
        (folder / name).write_text(text)
    with internvl_rt.Engine.from_pretrained(folder, device="cpu") as engine:
        begin, end = (engine.tokenizer.find_token_id(token) for token in ("<think>", "</think>"))
        assert engine.describe(ask("Hello"), think=True).prompt.token_ids[-2] == begin
        params = SamplingParams(json_schema={"type": "boolean"}, logit_bias={end: 100})
        reply = engine.chat(ask("Hello"), params, think=True)
        assert (reply.reasoning, reply.token_ids[0]) == ("", end)
        assert json.loads(reply.text) in (True, False)
        plain = engine.chat(ask("Hello"), replace(SIX, logit_bias={end: 100}), think=True)
        assert (plain.reasoning, plain.text) == ("", "</think>" * 5)
