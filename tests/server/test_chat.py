"""`/v1/chat/completions` as OpenAI's own client uses it."""

import asyncio
import base64
import json
import math
from collections.abc import Iterator

import openai
import pydantic
import pytest

from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.server.options import ServerOptions
from support.serving import SAMPLES, Running, picture_url, question, running, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=64)) as made:
        yield made


class Digits(pydantic.BaseModel):
    digits: list[int]


def test_an_answer_is_that_of_the_engine(server: Running) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=question())
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "4719", "stop")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    body = server.post("/v1/chat/completions", {"model": "tiny", "messages": question()}).json()
    assert {"refusal": None}.items() <= body["choices"][0]["message"].items()
    assert body["choices"][0]["logprobs"] is None


def test_usage_counts_visual_tokens_and_cached_ones(server: Running) -> None:
    text = "Read the digits. " * 20
    first, second = (
        server.client().chat.completions.create(model="tiny", messages=question(text)).usage for _ in range(2)
    )
    core = server.service.core
    num_tiles = server.post("/tokenize", {"messages": question(text)}).json()["pictures"][0]["tokens"]
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.image_tokens == num_tiles
    assert num_tiles % core.config.tokens_per_tile == 0
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens >= core.options.block_size


def test_a_stream_has_a_role_texts_an_end_and_usage(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model="tiny", messages=question(), stream=True, stream_options={"include_usage": True}
    )
    first, *middle, end, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == "4719"
    assert {chunk.choices[0].finish_reason for chunk in (first, *middle)} == {None}
    assert all(chunk.choices[0].delta.content for chunk in middle)
    assert end.choices[0].finish_reason == "stop"
    assert not end.choices[0].delta.model_dump(exclude_none=True)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in (first, *middle, end))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in (first, *middle, end, usage)}) == 1


def test_every_chunk_has_all_keys_that_clients_read(server: Running) -> None:
    answer = server.post("/v1/chat/completions", {"messages": question(), "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}


def test_the_stream_helper_adds_up_several_answers(server: Running) -> None:
    asked = {"model": "tiny", "messages": question(), "n": 3, "temperature": 0.7, "seed": 5}
    with server.client().chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = [choice.message.content for choice in stream.get_final_completion().choices]
    whole = server.client().chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert streamed == [choice.message.content for choice in whole.choices]


def test_logprobs_of_an_answer_spell_it_and_are_those_of_the_engine(server: Running) -> None:
    asked = {"model": "tiny", "messages": question(), "logprobs": True, "top_logprobs": 2}
    whole = server.client().chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert b"".join(bytes(each.bytes or ()) for each in whole.content) == b"4719"
    for each in whole.content:
        assert len(each.top_logprobs) == 2
        assert each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob >= -9999
        assert math.isclose(each.logprob, each.top_logprobs[0].logprob)
    chunks = list(server.client().chat.completions.create(**asked, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [each for part in parts if part and part.content for each in part.content]
    assert streamed == whole.content


def test_logprobs_without_top_ones(server: Running) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=question(), logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [each.top_logprobs for each in logprobs.content or ()] == [[]] * 4


def test_a_bias_can_forbid_a_token(server: Running) -> None:
    four = server.service.core.tokenizer.encode("4")[0]
    answer = server.client().chat.completions.create(model="tiny", messages=question(), logit_bias={str(four): -100})
    assert "4" not in (answer.choices[0].message.content or "")


def test_a_schema_is_kept_and_parsed(server: Running) -> None:
    parsed = server.client().chat.completions.parse(
        model="tiny", messages=question(), response_format=Digits, logit_bias={}, max_completion_tokens=64
    )
    assert isinstance(parsed.choices[0].message.parsed, Digits)


def test_vllms_form_of_structured_outputs_is_served(server: Running) -> None:
    def create(**given: object) -> str:
        body = {"extra_body": {"structured_outputs": given}, "max_tokens": 16}
        answer = server.client().chat.completions.create(model="tiny", messages=question(), **body)
        return answer.choices[0].message.content or ""

    assert create(choice=["4.2", "4719?"]) in ("4.2", "4719?")
    assert create(regex="[a-c]{3}").strip("abc") == ""
    assert create(json={"type": "boolean"}) in ("true", "false")
    older = server.post("/v1/chat/completions", {"messages": question(), "guided_regex": "[a-c]{3}"}).json()
    assert older["choices"][0]["message"]["content"].strip("abc") == ""


def test_json_mode_gives_an_object(server: Running) -> None:
    bias = {str(server.service.core.tokenizer.encode("}")[0]): 100.0}
    answer = server.client().chat.completions.create(
        model="tiny", messages=question(), response_format={"type": "json_object"}, logit_bias=bias
    )
    assert json.loads(answer.choices[0].message.content or "") == {}


def test_stop_strings_and_limits_end_an_answer(server: Running) -> None:
    create = server.client().chat.completions.create
    stopped = create(model="tiny", messages=question(), stop="71").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("4", "stop")
    kept = create(model="tiny", messages=question(), stop=["71"], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "471"
    cut = create(model="tiny", messages=question(), max_completion_tokens=2, max_tokens=9).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("47", "length")


def test_a_begun_answer_is_continued(server: Running) -> None:
    messages = [*question(), {"role": "assistant", "content": "47"}]
    answer = server.client().chat.completions.create(model="tiny", messages=messages)
    assert answer.choices[0].message.content == "19"


def test_what_clients_vary_in_is_taken(server: Running) -> None:
    """The same question in every form that clients send it in has the same prompt."""
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]
    forms = [
        plain,
        [{"role": "developer", "content": "Be brief.", "name": "ops"}, plain[1]],
        [{"role": "system", "content": parts}, {"role": "user", "content": [{"type": "text", "text": "Hello."}]}],
        [plain[0], {"role": "user", "content": ["Hello."], "extra": 1}],
        [{"role": "user", "content": "Hello."}, plain[0]],
    ]
    counts = [server.post("/tokenize", {"messages": form}).json()["tokens"] for form in forms]
    assert counts == [counts[0]] * len(forms)
    for extra in (
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "reasoning_effort": "high"},
        {"parallel_tool_calls": False, "tools": [], "tool_choice": "none", "modalities": ["text"], "unknown": [1]},
        {"max_tokens": None, "temperature": None, "stop": None, "n": None, "stream": None, "seed": None},
    ):
        answer = server.post("/v1/chat/completions", {"messages": question(), **extra})
        assert answer.json()["choices"][0]["message"]["content"] == "4719", extra
    assert server.post("/v1/chat/completions", {"messages": question(), "metadata": {"a": "b"}}).json()["metadata"]


def test_a_long_url_in_another_field_is_not_taken_for_the_picture(server: Running) -> None:
    """A picture that is sent beside its own preview is read, and not the preview."""
    content = b"a small picture"
    small = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for url in ({"preview": picture_url(), "url": small}, {"url": small, "preview": picture_url()}):
        messages = question()
        messages[0]["content"][0]["image_url"] = url
        with scripted(server, "x") as asked:
            assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
        assert asked[0][0][0]["content"][0]["image"] == content


def test_a_null_content_beside_tool_calls_is_taken(server: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "3"}]},
    ]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{written}\n{written}<|im_end|>" in text
    results = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text


@pytest.mark.parametrize(
    ("options", "expected"), [({"detail": "low"}, 1), ({"detail": "high"}, 5), ({"max_dynamic_patch": 2}, 3), ({}, 5)]
)
def test_tiles_of_a_picture_are_limited_by_the_request(
    server: Running, options: dict[str, object], expected: int
) -> None:
    part = {"type": "image_url", "image_url": {"url": picture_url(), **options}}
    messages = [{"role": "user", "content": [part]}]
    found = server.post("/tokenize", {"messages": messages}).json()["pictures"][0]
    assert found["columns"] * found["rows"] + found["thumbnail"] == expected


def test_tiles_of_all_pictures_are_limited_by_the_request(server: Running) -> None:
    usage = {}
    for most in (1, 2, None):
        limits = {"mm_processor_kwargs": {"max_dynamic_patch": most}}
        body = {"messages": question(), "max_tokens": 1, **limits}
        usage[most] = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens_details"]["image_tokens"]
    assert usage[1] * 5 == usage[None]
    assert usage[2] * 5 == usage[None] * 3


def test_the_default_temperature_is_the_servers(server: Running) -> None:
    with running(ServerOptions(port=0, default_temperature=1.5), seed=3) as warm:
        texts = {
            warm.client()
            .chat.completions.create(model="tiny", messages=question(), max_tokens=16)
            .choices[0]
            .message.content
            for _ in range(6)
        }
        assert len(texts) > 1
        entry = warm.client().models.retrieve("tiny").model_dump()
        assert entry["sampling_defaults"] == {"temperature": 1.5, "top_p": 1.0, "max_tokens": None}


def test_a_seed_makes_draws_repeatable(server: Running) -> None:
    def draw(seed: int) -> str | None:
        answer = server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello."}], temperature=2, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_answers_are_the_same_over_http_and_in_the_program(server: Running) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": (SAMPLES / "4719.png").read_bytes()},
                {"type": "text", "text": "Read the digits."},
            ],
        }
    ]
    reply = asyncio.run(server.service.engine.chat(messages, SamplingParams(max_tokens=8)))
    answer = server.client().chat.completions.create(model="tiny", messages=question(), max_tokens=8)
    assert answer.choices[0].message.content == reply.text


def test_an_error_in_the_request_has_the_clients_type(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=question(), n=1000)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "limit_exceeded",
        "n",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError):
        server.client().chat.completions.create(model="other", messages=question())
