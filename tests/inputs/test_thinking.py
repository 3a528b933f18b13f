"""A prompt asks for reasoning as the model cards do, and the reasoning is split off however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.errors import RequestError
from internvl_rt.inputs.messages import Message, parse_messages
from internvl_rt.inputs.thinking import BEGIN, SYSTEM_MESSAGE, ThoughtReader, can_think, with_thinking
from support.configs import ORIGINAL, changed, parse

QWEN2 = parse(ORIGINAL)
QWEN3 = parse(changed(ORIGINAL, {"llm_config.architectures": ["Qwen3ForCausalLM"]}))
GPT_OSS = load_config(KNOWN_MODELS["InternVL3_5-GPT-OSS-20B-A4B-Preview"])
QUESTION = {"role": "user", "content": "How many?"}


def asked(*messages):
    return with_thinking(parse_messages(list(messages)), QWEN3)


def test_a_model_with_the_language_model_of_3_5_can_think():
    assert [can_think(config) for config in (QWEN2, QWEN3, GPT_OSS)] == [False, True, False]


def test_the_official_system_message_takes_the_place_of_the_default_and_the_answer_begins_with_its_mark():
    question = Message("user", ("How many?",))
    system, begun = Message("system", (SYSTEM_MESSAGE,)), Message("assistant", ("<think>\n",))
    assert asked(QUESTION) == (system, question, begun)
    lines = SYSTEM_MESSAGE.splitlines()
    assert (len(lines), lines[1], lines[-1][-21:]) == (7, "", "the thinking section.")


def test_a_system_message_of_the_conversation_stands_behind_the_official_one():
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    system, *others = asked({"role": "system", "content": parts}, QUESTION)
    assert system == Message("system", (f"{SYSTEM_MESSAGE}\n\nBe brief.",))
    assert [message.role for message in others] == ["user", "assistant"]


def test_what_cannot_be_thought_about_is_refused():
    with pytest.raises(RequestError, match="think: this model was not trained to reason"):
        with_thinking(parse_messages([QUESTION]), QWEN2)
    with pytest.raises(RequestError, match=r"messages\[1\]: an answer that is begun cannot be thought about"):
        asked(QUESTION, {"role": "assistant", "content": "I count"})


def split(text, cuts=(), **how):
    reader = ThoughtReader(**how)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    parts = [reader.push(text[start:stop]) for start, stop in pairwise(places)] + [reader.push("", final=True)]
    assert reader.push("", final=True) == ("", "")
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


CASES = [
    ("so.\n</think>\n\n42", ("so.\n", "42")),
    ("\n<think>\nso.</think>42", ("so.", "42")),
    ("<think>\n\n<think>\nso.</think> \n 42\n", ("so.", "42\n")),
    ("<thinking>so.</think>42", ("<thinking>so.", "42")),
    ("</think>42", ("", "42")),
    ("so.</think></think>", ("so.", "</think>")),
    ("so.</think>\n", ("so.", "")),
    ("never </thin ends", ("never </thin ends", "")),
    ("cut </thi", ("cut </thi", "")),
    ("<thi", ("<thi", "")),
    ("", ("", "")),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
@given(cuts=st.lists(st.integers(0, 40), max_size=12))
def test_the_parts_do_not_depend_on_how_the_text_is_cut(text, expected, cuts):
    assert split(text, cuts) == expected


@given(st.lists(st.sampled_from([*"\n a<>", "<think>", "</think>", "</", "think>"]), max_size=12), st.booleans())
def test_a_text_in_pieces_gives_what_the_whole_text_gives(pieces, strips):
    reader, text = ThoughtReader(strips=strips), "".join(pieces)
    parts = [*map(reader.push, pieces), reader.push("", final=True)]
    whole = ThoughtReader(strips=strips).push(text, final=True)
    assert tuple(map("".join, zip(*parts, strict=True))) == whole


def test_the_whitespace_behind_the_reasoning_may_be_kept():
    assert split("so.</think>\n 42", strips=False) == ("so.", "\n 42")


def test_only_what_may_become_a_mark_is_held_back():
    reader = ThoughtReader()
    assert reader.push("a </thin b </thi") == ("a </thin b ", "")
    assert reader.push("nx") == ("</thinx", "")
    assert reader.push("</think>4") == ("", "4")
    assert reader.push(BEGIN) == ("", BEGIN)
