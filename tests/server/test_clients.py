"""Other real clients than OpenAI's: LangChain, curl, and whatever reads metrics."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator

import pydantic
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from internvl_rt.server.options import ServerOptions
from support.serving import SAMPLES, Running, picture_url, question, running, scripted

ASK = "Read the digits."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=64)) as made:
        yield made


class Add(pydantic.BaseModel):
    """Adds."""

    a: bool


def chat(server: Running, **more: object) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", max_retries=0, **{"temperature": 0, **more}
    )


def test_langchain_asks_about_a_picture_in_both_of_its_forms(server: Running) -> None:
    data = base64.b64encode((SAMPLES / "4719.png").read_bytes()).decode()
    blocks = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "image", "base64": data, "mime_type": "image/png"},
    ]
    for block in blocks:
        message = HumanMessage(content=[block, {"type": "text", "text": ASK}])
        answer = chat(server, max_tokens=8).invoke([message])
        assert answer.content == "4719"
        assert answer.usage_metadata["input_token_details"]["cache_read"] >= 0
        assert "".join(chunk.content for chunk in chat(server).stream([message])) == "4719"


def test_langchain_calls_tools_and_parses_forms(server: Running) -> None:
    forced = chat(server).bind_tools([Add], tool_choice="any", strict=True, parallel_tool_calls=False)
    (call,) = forced.invoke(ASK).tool_calls
    assert call["name"] == "Add"
    assert set(call["args"]) == {"a"}
    with scripted(server, '<tool_call>\n{"name": "Add", "arguments": {"a": true}}\n</tool_call>'):
        merged = None
        for chunk in chat(server).bind_tools([Add]).stream(ASK):
            merged = chunk if merged is None else merged + chunk
        assert merged.tool_calls[0]["args"] == {"a": True}
    assert isinstance(chat(server).with_structured_output(Add, method="json_schema").invoke(ASK), Add)


def test_langchain_completes_texts(server: Running) -> None:
    model = OpenAI(base_url=f"{server.url}/v1", api_key="none", model="tiny", max_tokens=4, temperature=0)
    assert model.generate(["One two", "Hello"]).generations[1]


def test_langchain_speaks_responses(server: Running) -> None:
    message = HumanMessage(
        content=[{"type": "image_url", "image_url": {"url": picture_url()}}, {"type": "text", "text": ASK}]
    )
    assert chat(server, use_responses_api=True).invoke([message]).text == "4719"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer_and_a_stream(server: Running) -> None:
    def curl(body: object) -> str:
        command = ["curl", "-sS", "-N", f"{server.url}/v1/chat/completions", "-d", "@-"]
        return subprocess.run(
            command, input=json.dumps(body), capture_output=True, text=True, check=True, timeout=30
        ).stdout

    assert json.loads(curl({"model": "tiny", "messages": question()}))["choices"][0]["message"]["content"] == "4719"
    assert curl({"model": "tiny", "messages": question(), "stream": True}).endswith("data: [DONE]\n\n")


def samples(server: Running) -> dict[tuple[str, str], float]:
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.name.startswith("internvl_rt:")
            assert sample.labels["model_name"] == "tiny"
            found[sample.name, ",".join(value for key, value in sample.labels.items() if key != "model_name")] = (
                sample.value
            )
    return found


def test_metrics_count_what_was_done(server: Running) -> None:
    before = samples(server)
    usage = server.client().chat.completions.create(model="tiny", messages=question(), n=2).usage
    list(server.client().chat.completions.create(model="tiny", messages=question(), stream=True))
    server.post("/v1/chat/completions", {"messages": []})
    after = samples(server)

    def grown(name: str, label: str = "") -> float:
        return after.get((f"internvl_rt:{name}", label), 0) - before.get((f"internvl_rt:{name}", label), 0)

    assert grown("request_success_total", "stop") == 3
    assert grown("request_failure_total", "limit_exceeded") == 1
    assert grown("prompt_tokens_total") == 2 * usage.prompt_tokens
    assert grown("generation_tokens_total") == usage.completion_tokens * 1.5
    assert grown("image_tokens_total") == 2 * usage.prompt_tokens_details.image_tokens
    stages = """time_to_first_token_seconds e2e_request_latency_seconds request_queue_time_seconds
        request_prefill_time_seconds request_decode_time_seconds image_decode_seconds preprocess_seconds
        vision_encode_seconds request_prompt_tokens request_generation_tokens request_params_n request_params_max_tokens
        request_time_per_output_token_seconds"""
    for name in stages.split():
        assert grown(f"{name}_count") == 2, name
    assert grown("inter_token_latency_seconds_count") > 0
    assert after["internvl_rt:num_requests_running", ""] == 0
    assert after["internvl_rt:num_requests_waiting", ""] == 0
    assert after["internvl_rt:kv_cache_usage_perc", ""] == 0
    assert grown("mm_cache_hits_total") > 0


def test_stages_are_in_the_header_the_stream_and_the_log_if_asked_for() -> None:
    with running(ServerOptions(port=0, access_log=True, default_max_tokens=8)) as server:
        plain = server.post("/v1/chat/completions", {"messages": question()})
        assert "x-internvl-rt-timings" not in plain.headers
        headers = {"x-internvl-rt-timings": "1", "x-request-id": "mine"}
        answer = server.post("/v1/chat/completions", {"messages": question()}, headers=headers)
        stages = json.loads(answer.headers["x-internvl-rt-timings"])
        assert {
            "media_s",
            "tile_s",
            "queued_s",
            "vision_s",
            "prefill_s",
            "decode_s",
            "first_token_s",
            "total_s",
        } <= set(stages)
        assert 0 < stages["first_token_s"] < stages["total_s"]
        body = {"messages": question(), "stream": True, "stream_options": {"include_usage": True}}
        events = server.post("/v1/chat/completions", body, headers=headers).text.split("\n\n")
        timings = json.loads(events[-3].removeprefix("data: "))["timings"]
        assert timings["floors"] is None
        assert 0 < timings["first_token_s"] < timings["total_s"]
        server.wait_until_idle()
        lines = server.lines("request")
        assert [line["request_id"] for line in lines[1:]] == ["mine", "mine"]
        assert all(line["status"] == 200 and line["prefill_s"] > 0 and line["prompt_tokens"] > 0 for line in lines)
        assert "4719" not in server.log.getvalue()


def test_no_request_is_logged_by_default(server: Running) -> None:
    server.client().chat.completions.create(model="tiny", messages=question())
    assert server.lines("request") == []


def test_models_are_listed_under_every_name(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    for name in ("tiny", "org/tiny"):
        assert client.chat.completions.create(model=name, messages=question()).model == "tiny"


def test_tokenize_counts_what_a_chat_costs(server: Running) -> None:
    for messages in (
        question(),
        question("x", picture_url(), picture_url("42.png")),
        [{"role": "user", "content": "Hello."}],
    ):
        usage = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage
        found = server.post("/tokenize", {"model": "tiny", "messages": messages, "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == usage.prompt_tokens
        assert sum(picture["tokens"] for picture in found["pictures"]) == usage.prompt_tokens_details.image_tokens
    tokens = server.post("/tokenize", {"prompt": "Hello."}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "Hello."}
    for body in ({}, {"prompt": "a", "messages": question()}):
        assert server.post("/tokenize", body).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**7]}).json()["error"]["param"] == "tokens"
