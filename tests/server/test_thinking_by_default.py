"""A server of a model that reasons by default switches it off for requests that say so, and for answers begun."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from internvl_rt.checkpoint.template import Thinking
from internvl_rt.server.options import ServerOptions
from support.serving import Running, question, running, scripted

OFF = ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}})
ON = ({}, {"reasoning_effort": "low"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=20)) as made:
        asking = made.service.asking
        thinking = Thinking("Think.", ("Think. ", "!"), "<think>", "", by_default=True)
        asking.config = replace(asking.config, can_think=True, thinking=thinking)
        yield made


def create(server: Running, messages: Any = None, **more: Any) -> Any:
    return server.client().chat.completions.create(model="tiny", messages=messages or question(), **more)


@pytest.mark.parametrize("more", ON)
def test_answers_reason_by_default(server: Running, more: Any) -> None:
    with scripted(server, "\nso.</think>\n\n42") as asked:
        message = create(server, **more).choices[0].message
    assert (message.content, message.reasoning) == ("42", "so.")
    (messages, _), *_ = asked
    assert messages[0] == {"role": "system", "content": "Think."}
    assert messages[-1] == {"role": "assistant", "content": "<think>"}


@pytest.mark.parametrize("more", OFF)
def test_reasoning_is_switched_off(server: Running, more: Any) -> None:
    with scripted(server, "42") as asked:
        message = create(server, **more).choices[0].message
    assert (message.content, getattr(message, "reasoning", None)) == ("42", None)
    assert [each["role"] for each in asked[0][0]] == ["user"]


def test_an_answer_that_is_begun_goes_on_without(server: Running) -> None:
    begun = [*question(), {"role": "assistant", "content": "It is"}]
    with scripted(server, " 42") as asked:
        assert create(server, begun).choices[0].message.content == " 42"
    assert asked[0][0][-1]["content"] == "It is"


def test_a_system_message_of_the_request_and_tools_stand_where_the_template_has_them(server: Running) -> None:
    own = [{"role": "system", "content": "Be brief."}, *question()]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with scripted(server, "so.</think>42") as asked:
        create(server, own)
        create(server, tools=[tool])
    assert asked[0][0][0]["content"] == "Think. Be brief.!"
    assert asked[1][0][0]["content"].startswith("Think.\n\n# Tools")


def test_tokens_are_counted_as_the_request_would_have_them(server: Running) -> None:
    tokens = server.post("/tokenize", {"messages": question()}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"].endswith("<|im_start|>assistant\n<think>")
