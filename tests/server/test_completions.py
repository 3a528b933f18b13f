"""`/v1/completions`: prompts without a template, scored prompts, several at a time."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.inputs.sampling_params import SamplingParams
from support.serving import Running, running

TEXT = "Read the digits. Read the digits."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def test_a_text_is_continued_as_the_engine_does(server: Running) -> None:
    reply = asyncio.run(server.service.engine.chat(RawPrompt(TEXT), SamplingParams(max_tokens=8)))
    answer = server.client().completions.create(model="tiny", prompt=TEXT, max_tokens=8)
    assert (answer.object, answer.choices[0].text) == ("text_completion", reply.text)
    assert answer.choices[0].finish_reason == reply.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens


def test_sixteen_tokens_are_the_default(server: Running) -> None:
    answer = server.client().completions.create(model="tiny", prompt=TEXT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_ids_are_a_prompt_as_their_text_is(server: Running) -> None:
    ids = server.post("/tokenize", {"prompt": TEXT}).json()["tokens"]
    create = server.client().completions.create
    texts = [create(model="tiny", prompt=prompt, max_tokens=6).choices[0].text for prompt in (TEXT, ids, [TEXT], [ids])]
    assert texts == [texts[0]] * 4


def test_several_prompts_have_their_answers_in_order(server: Running) -> None:
    prompts = [TEXT, "Hello.", "One two"]
    create = server.client().completions.create
    alone = [create(model="tiny", prompt=prompt, max_tokens=5, n=1).choices[0].text for prompt in prompts]
    answer = create(model="tiny", prompt=prompts, max_tokens=5, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    assert answer.usage is not None
    streamed = ["", "", ""]
    ends: list[str | None] = [None] * 3
    for chunk in create(model="tiny", prompt=prompts, max_tokens=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert streamed == alone
    assert None not in ends


def scored(server: Running, **more: Any) -> Any:
    asked = {"model": "tiny", "prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0, **more}
    return server.client().completions.create(**asked).choices[0]


def test_echo_with_logprobs_scores_the_prompt(server: Running) -> None:
    choice = scored(server)
    assert choice.text == TEXT
    lists = choice.logprobs
    assert "".join(lists.tokens) == TEXT
    assert lists.token_logprobs[0] is None
    assert all(value <= 0 for value in lists.token_logprobs[1:])
    assert lists.top_logprobs[0] is None
    assert all(len(top) == 1 for top in lists.top_logprobs[1:])
    starts = [0]
    for token in lists.tokens[:-1]:
        starts.append(starts[-1] + len(token))
    assert lists.text_offset == starts
    tokenizer = server.service.core.tokenizer
    ids = tokenizer.encode(TEXT)
    (expected,) = asyncio.run(server.service.engine.score(RawPrompt(ids[:1]), [tokenizer.decode(ids[1:])]))
    assert lists.token_logprobs[1:] == pytest.approx(expected.logprobs, abs=1e-4)


def test_echo_shows_prompt_and_answer(server: Running) -> None:
    plain = server.client().completions.create(model="tiny", prompt=TEXT, max_tokens=4).choices[0]
    both = scored(server, max_tokens=4, logprobs=0)
    assert both.text == TEXT + plain.text
    assert "".join(both.logprobs.tokens).startswith(TEXT)
    without = server.client().completions.create(model="tiny", prompt=TEXT, max_tokens=4, echo=True).choices[0]
    assert (without.text, without.logprobs) == (both.text, None)
    chunks = server.client().completions.create(model="tiny", prompt=TEXT, max_tokens=4, echo=True, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == both.text


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_type"),
        ({"prompt": ""}, "prompt", "invalid_request"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [10**6]}, "prompt", "invalid_request"),
        ({"prompt": ["a"] * 65}, "prompt", "limit_exceeded"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "best_of": 3}, "best_of", "unsupported_parameter"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "limit_exceeded"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "limit_exceeded"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "echo", "unsupported_parameter"),
    ],
)
def test_a_wrong_request_is_refused(server: Running, body: dict[str, Any], param: str, code: str) -> None:
    answer = server.post("/v1/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_one_bad_prompt_fails_its_request_and_no_other(server: Running) -> None:
    assert server.post("/v1/completions", {"prompt": ["fine", ""]}).status_code == 400
    server.wait_until_idle()


def test_a_stream_of_no_tokens_has_the_prompt_alone(server: Running) -> None:
    body = {"prompt": "4719 4719", "echo": True, "max_tokens": 0}
    whole = server.post("/v1/completions", body).json()["choices"]
    lines = server.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    pieces = [choice for line in lines if line.startswith("data: {") for choice in json.loads(line[6:])["choices"]]
    assert "".join(piece["text"] for piece in pieces) == whole[0]["text"] == "4719 4719"
    assert pieces[-1]["finish_reason"] == whole[0]["finish_reason"] == "length"
