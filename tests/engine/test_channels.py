"""Answers of GPT-OSS are written in channels: their text is that of the final one, and an analysis is the reasoning."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from internvl_rt import AsyncEngine, Engine, RawPrompt, RequestError, SamplingParams
from support.calls import ask, check_idle, collect, run
from support.harmony import ANALYSIS, FINAL, NEXT, write_small
from support.scripted_tokens import script_tokens

PARAMS = SamplingParams(max_tokens=200)
THOUGHT = f"{ANALYSIS}So.\n{NEXT}{FINAL}42<|return|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("harmony") / "model")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.from_pretrained(folder, device="cpu") as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def parts(pieces, choice=0):
    """Joins the reasoning and the text of the pieces of an answer."""
    own = [piece for piece in pieces if piece.choice == choice]
    return "".join(piece.reasoning for piece in own) or None, "".join(piece.text for piece in own)


@pytest.mark.parametrize(
    ("written", "params", "expected", "reason"),
    [
        (f"{FINAL} Hello, 你好! <|return|>", PARAMS, (None, "Hello, 你好!"), "stop"),
        (f"{FINAL}Hello<|end|>", PARAMS, (None, "Hello"), "stop"),
        (f"{FINAL}final<ref>answer</ref><|return|>", PARAMS, (None, "finalanswer"), "stop"),
        ("Hello<|return|>", PARAMS, (None, "Hello"), "stop"),
        ("Hello<|end|>", PARAMS, (None, "Hello"), "stop"),
        ("<|message|>Hello<|return|>", PARAMS, (None, "Hello"), "stop"),
        (f"{FINAL}<|return|>", PARAMS, (None, ""), "stop"),
        (THOUGHT, PARAMS, ("So.", "42"), "stop"),
        (f"{ANALYSIS}So{NEXT}{ANALYSIS}?{NEXT}{FINAL}42<|end|>", PARAMS, ("So?", "42"), "stop"),
        (f"{ANALYSIS}So.<|return|>", PARAMS, ("So.", ""), "stop"),
        (f"<|channel|>commentary to=a <|constrain|>json<|message|>{{}}{NEXT}{FINAL}x<|return|>",
         PARAMS, (None, "x"), "stop"),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", PARAMS, (None, "{}"), "stop"),
        (f"<|start|>assistant{FINAL}x<|return|>", PARAMS, (None, "x"), "stop"),
        (f"{FINAL}a{FINAL}b<|return|>", PARAMS, (None, "ab"), "stop"),
        (FINAL + "x" * 9, replace(PARAMS, max_tokens=3), (None, ""), "length"),
        (FINAL + "x" * 9, replace(PARAMS, max_tokens=7), (None, ""), "length"),
        (FINAL + "x" * 9, replace(PARAMS, max_tokens=9), (None, "xx"), "length"),
        (f"{FINAL}one, two<|return|>", replace(PARAMS, stop=", "), (None, "one"), "stop"),
        (f"{FINAL}one, two<|return|>", replace(PARAMS, stop=", ", include_stop=True), (None, "one, "), "stop"),
        (f"{FINAL}one<|return|>", replace(PARAMS, stop=["final", "analysis"]), (None, "one"), "stop"),
        (f"{FINAL}one, t, o<|return|>", replace(PARAMS, stop=", ", min_tokens=13), (None, "one, t"), "stop"),
        (THOUGHT, replace(PARAMS, stop="."), ("So", ""), "stop"),
        (THOUGHT, replace(PARAMS, stop=".42"), ("So.", "42"), "stop"),
        (f"{ANALYSIS}So\n{NEXT}{FINAL}4<|return|>", replace(PARAMS, stop="\n4"), ("So", "4"), "stop"),
        (f"{FINAL}a<|end|>b<|return|>", replace(PARAMS, max_tokens=13, ignore_eos=True), (None, "ab!!"), "length"),
        (THOUGHT, replace(PARAMS, skip_special_tokens=False), (None, THOUGHT.removesuffix("<|return|>")), "stop"),
    ],
    ids=repr,
)  # fmt: skip
def test_the_text_is_that_of_the_final_channel_from_every_call(engine, monkeypatch, written, params, expected, reason):
    script_tokens(monkeypatch, engine.tokenizer, written)
    reply = engine.chat(ask("Hi"), params)
    assert ((reply.reasoning, reply.text), reply.finish_reason) == (expected, reason)
    ids = engine.tokenizer.encode(written, specials=True) + [0] * 9
    assert reply.token_ids == ids[: reply.usage.completion_tokens], "headers and end tokens included"
    pieces = list(engine.stream(ask("Hi"), params))
    assert parts(pieces) == expected
    assert all(piece.text or piece.reasoning for piece in pieces[:-1])
    replies = engine.generate([ask("Hi")] * 2, params)
    assert [each.choices for each in [pieces[-1].reply, *replies]] == [reply.choices] * 3


def test_reasoning_comes_before_the_text_and_as_soon_as_it_is_certain(engine, monkeypatch):
    script_tokens(monkeypatch, engine.tokenizer, f"{ANALYSIS}So I\n{NEXT}{FINAL}It is<|return|>")
    pieces = [(piece.reasoning, piece.text) for piece in engine.stream(ask("Hi"), PARAMS)]
    assert pieces == [("S", ""), ("o", ""), (" I", ""), ("", "I"), ("", "t"), ("", " i"), ("", "s"), ("", "")]


def test_each_of_several_answers_has_its_own_channels(engine, monkeypatch):
    texts = THOUGHT, "plain<|return|>", f"{FINAL}x<|end|>"
    script_tokens(monkeypatch, engine.tokenizer, *texts)
    *_, last = pieces = list(engine.stream(ask("Hi"), replace(PARAMS, n=3, logprobs=0)))
    expected = [("So.", "42"), (None, "plain"), (None, "x")]
    assert [(choice.reasoning, choice.text) for choice in last.reply.choices] == expected
    assert [parts(pieces, index) for index in range(3)] == expected
    for index, choice in enumerate(last.reply.choices):
        assert tuple(token for piece in pieces if piece.choice == index for token in piece.tokens) == choice.logprobs
        assert [token.token_id for token in choice.logprobs] == choice.token_ids
        assert choice.token_ids == engine.tokenizer.encode(texts[index], specials=True)
    assert last.reply.usage.completion_tokens == sum(len(choice.token_ids) for choice in last.reply.choices)


def test_asyncio_gives_the_same_parts(folder, monkeypatch):
    async def main():
        core = Engine.from_pretrained(folder, device="cpu")
        async with AsyncEngine(core) as shared:
            script_tokens(monkeypatch, core.tokenizer, THOUGHT)
            pieces = await collect(shared.stream(ask("Hi"), PARAMS))
            return pieces, await asyncio.gather(*(shared.chat(ask("Hi"), PARAMS) for _ in range(3)))

    pieces, replies = run(main())
    assert [parts(pieces), *((reply.reasoning, reply.text) for reply in replies)] == [("So.", "42")] * 4


def test_a_begun_answer_goes_on_in_the_channel_that_it_was_begun_in(engine, monkeypatch):
    script_tokens(monkeypatch, engine.tokenizer, " on <|return|>")
    begun = [*ask("Hi"), {"role": "assistant", "content": "go"}]
    assert engine.chat(begun, PARAMS).text == " on"
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    for end, written, expected in (
        ("", f"{FINAL} x <|return|>", (None, " x ")),
        ("<|channel|>", "final<|message|>x<|return|>", (None, "x")),
        ("<|channel|>fi", "nal<|message|>x<|return|>", (None, "x")),
        (ANALYSIS, f"x{NEXT}{FINAL}y<|return|>", ("x", "y")),
        (FINAL, "x<|end|>", (None, "x")),
    ):
        script_tokens(monkeypatch, engine.tokenizer, written)
        reply = engine.chat(RawPrompt(prompt + end), PARAMS)
        assert (reply.reasoning, reply.text) == expected, end
    script_tokens(monkeypatch, engine.tokenizer, "x<|return|>")
    assert engine.chat(RawPrompt("No template"), PARAMS).text == "x"


def test_an_end_token_that_the_caller_names_ends_an_analysis_too(engine, monkeypatch):
    script_tokens(monkeypatch, engine.tokenizer, THOUGHT)
    reply = engine.chat(ask("Hi"), replace(PARAMS, stop_token_ids=[engine.tokenizer.token_id("<|end|>")]))
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("So.", "", "stop")


def test_a_grammar_holds_behind_the_header_which_the_prompt_then_has(engine):
    plain = engine.describe(ask("Hi")).prompt
    header = engine.tokenizer.encode(FINAL, specials=True)
    params = SamplingParams(max_tokens=20, regex="[a-c]{3}", n=2, temperature=1.0, seed=1, logprobs=0)
    reply = engine.chat(ask("Hi"), params)
    assert reply.usage.prompt_tokens == len(plain.token_ids) + len(header)
    for choice in reply.choices:
        assert choice.text == engine.tokenizer.decode(choice.token_ids[:-1])
        assert len(choice.text) == 3
        assert set(choice.text) <= set("abc")
        assert (choice.token_ids[-1], choice.finish_reason) == (engine.tokenizer.token_id("<|return|>"), "stop")
    assert parts(list(engine.stream(ask("Hi"), params)))[1] == reply.text
    begun = engine.chat([*ask("Hi"), {"role": "assistant", "content": FINAL}], params)
    assert [each.token_ids for each in begun.choices] == [each.token_ids for each in reply.choices]
    boolean = engine.chat(ask("Hi"), SamplingParams(json_schema={"type": "boolean"}))
    assert json.loads(boolean.text) in (True, False)


def test_a_response_is_scored_behind_the_header(engine):
    begun = [*ask("Hi"), {"role": "assistant", "content": FINAL}]
    ours, theirs = (engine.score(each, ["Yes", "No"], include_end=True) for each in (ask("Hi"), begun))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert [len(each.logprobs) for each in ours] == [4, 3]
    assert ours[0].tokens[-1].token_id == engine.tokenizer.token_id("<|return|>")


def test_what_does_not_fit_with_its_header_is_refused(folder, engine):
    num_tokens = len(engine.describe(ask("Hi")).prompt.token_ids)
    with Engine.from_pretrained(folder, device="cpu", max_model_len=num_tokens + 4) as narrow:
        assert len(narrow.chat(ask("Hi"), SamplingParams(max_tokens=9, ignore_eos=True)).token_ids) == 4
        for call in (lambda: narrow.chat(ask("Hi"), SamplingParams(regex="a")), lambda: narrow.score(ask("Hi"), ["a"])):
            with pytest.raises(RequestError, match="tokens together, but may have"):
                call()


def test_it_cannot_be_told_to_think(engine):
    with pytest.raises(RequestError, match="think: this model was not trained to reason before it answers"):
        engine.chat(ask("Hi"), think=True)


def test_a_random_checkpoint_answers_greedily_the_same_alone_and_together(folder, engine):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    questions = [ask("Hi"), ask("What is the first step, and the second?"), ask("你好")]
    alone = [engine.chat(each, params).token_ids for each in questions]
    assert [reply.token_ids for reply in engine.generate(questions, params)] == alone
    with Engine.from_pretrained(folder, device="cpu", max_tokens_per_step=64, block_size=16) as other:
        assert [reply.token_ids for reply in other.generate(questions, params)] == alone
