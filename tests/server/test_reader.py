"""The parts of an answer are the same however its text is cut into pieces."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_rt.server.reader import AnswerReader, Delta

ARGUMENTS = '{"a": 1, "b": "}\\"{"}'
ADD = {("call", 0): "add", ("arguments", 0): ARGUMENTS}
TWICE = ADD | {("call", 1): "add", ("arguments", 1): ARGUMENTS}
F = {("call", 0): "f", ("arguments", 0): '{"a": 1}'}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\"{"}}\n</tool_call>'


def read(text: str, cuts: list[int], **how: bool) -> list[Delta]:
    reader = AnswerReader(**{"thinks": False, "calls": False, **how})
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    deltas: list[Delta] = []
    for start, stop in pairwise(places):
        deltas += reader.push(text[start:stop])
    return deltas + reader.finish()


def joined(deltas: list[Delta]) -> dict[tuple[str, int], str]:
    parts: dict[tuple[str, int], str] = {}
    for delta in deltas:
        parts[delta.kind, delta.call] = parts.get((delta.kind, delta.call), "") + delta.text
    return parts


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("plain <tool_call> text", {}, {("content", 0): "plain <tool_call> text"}),
        ("I add.\n" + CALL, {"calls": True}, {("content", 0): "I add."} | ADD),
        (f"{CALL}\n{CALL}", {"calls": True}, TWICE),
        (f"{CALL}\n{CALL} more", {"calls": True, "parallel": False}, ADD),
        ("a < b <tool", {"calls": True}, {("content", 0): "a < b <tool"}),
        ("<tool_call>\nno JSON\n</tool_call>", {"calls": True}, {("content", 0): "<tool_call>\nno JSON\n</tool_call>"}),
        ('<tool_call>\n{"na', {"calls": True}, {("content", 0): '<tool_call>\n{"na'}),
        ('<tool_call>{"name": "f", "arguments": {"a"', {"calls": True}, F | {("arguments", 0): '{"a"'}),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', {"calls": True}, F),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"calls": True}, F),
        ("so.\n</think>\n\n42", {"thinks": True}, {("reasoning", 0): "so.\n", ("content", 0): "42"}),
        ("<think>\nso.</think>42", {"thinks": True}, {("reasoning", 0): "so.", ("content", 0): "42"}),
        ("never </thin ends", {"thinks": True}, {("reasoning", 0): "never </thin ends"}),
        (f"hm</think>\n{CALL}", {"thinks": True, "calls": True}, {("reasoning", 0): "hm"} | ADD),
        ("keeps <think> marks </think>", {}, {("content", 0): "keeps <think> marks </think>"}),
    ],
)
@given(cuts=st.lists(st.integers(0, 160), max_size=12))
def test_parts_do_not_depend_on_how_the_text_is_cut(
    text: str, how: dict[str, bool], expected: dict[tuple[str, int], str], cuts: list[int]
) -> None:
    assert joined(read(text, cuts, **how)) == expected


@pytest.mark.parametrize("step", [1, 2, 7])
def test_arguments_of_a_call_come_while_they_are_written(step: int) -> None:
    reader, at_name, at_end = AnswerReader(thinks=False, calls=True), None, None
    text = '<tool_call>\n{"name": "f", "arguments": {"text": "' + "x" * 100 + '"}}\n</tool_call>'
    arguments = ""
    for start in range(0, len(text), step):
        for delta in reader.push(text[start : start + step]):
            at_name = at_name or (start if delta.kind == "call" else None)
            arguments += delta.text if delta.kind == "arguments" else ""
            at_end = start
        if 60 < start < 120:
            assert arguments.count("x") >= start - 60, "arguments are not held back"
    assert json.loads(arguments) == {"text": "x" * 100}
    assert at_name is not None
    assert at_end is not None
    assert at_name < 60 < at_end


def test_plain_text_is_never_held_back() -> None:
    reader = AnswerReader(thinks=False, calls=False)
    assert [reader.push(char) for char in "a <t"] == [[Delta("content", char)] for char in "a <t"]


def test_only_what_may_become_a_mark_is_held_back() -> None:
    reader = AnswerReader(thinks=False, calls=True)
    assert joined(reader.push("a <tool b <tool_ca")) == {("content", 0): "a <tool b"}
    assert joined(reader.push("t!")) == {("content", 0): " <tool_cat!"}
