"""Reads the text of an answer as it grows: reasoning, content, and calls of tools."""

import json
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from internvl_rt.inputs.marks import take
from internvl_rt.inputs.thinking import ThoughtReader
from internvl_rt.server import tools

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class Delta(NamedTuple):
    """New text of one part of an answer; with "call", the name of a function, whose arguments follow."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = 0  # index of the call


class AnswerReader:
    """Splits the text of one answer into its parts. What may still become a mark is held back, and nothing else."""

    def __init__(self, *, thinks: bool, calls: bool, parallel: bool = True) -> None:
        """thinks: the answer begins inside <think>. calls: it may call tools. parallel: more than one."""
        self._thought = ThoughtReader() if thinks else None
        self._state: Literal["content", "head", "arguments", "tail"] = "content"
        self._calls, self._parallel = calls, parallel
        self._is_plain = not (thinks or calls)  # all text is content
        self._held = ""
        self._skips_breaks = False  # whether line breaks that come next are between two parts
        self._json = _JsonEnd()
        self.num_calls = 0

    def push(self, text: str, reasoning: str = "") -> list[Delta]:
        """Returns what new text adds to the parts of the answer.

        reasoning: what is new of the reasoning that the engine tells from the text.
        """
        before = [Delta("reasoning", reasoning)] if reasoning else []
        if self._is_plain:
            return [*before, Delta("content", text)] if text else before
        return before + self._push(text, final=False)

    def finish(self) -> list[Delta]:
        """Returns what was held back and now belongs to a part. A call that was cut is left as far as it came."""
        deltas = self._push("", final=True)
        held, self._held = self._held, ""
        if self._state == "head":
            return [*deltas, Delta("content", tools.BEGIN + held)]
        if self._state in ("arguments", "tail") or not held:
            return deltas
        return [*deltas, Delta("content", held)]

    def _push(self, text: str, *, final: bool) -> list[Delta]:
        deltas: list[Delta] = []
        if self._thought is not None:
            reasoning, text = self._thought.push(text, final=final)
            deltas.append(Delta("reasoning", reasoning))
        self._held += text
        return [delta for delta in (*deltas, *self._read()) if delta.text]

    def _read(self) -> Iterator[Delta]:
        while self._held:
            before = self._state, len(self._held)
            yield from getattr(self, f"_read_{self._state}")()
            if before == (self._state, len(self._held)):
                return

    def _read_content(self) -> Iterator[Delta]:
        if self._skips_breaks:
            self._held = self._held.lstrip("\n")
            self._skips_breaks = not self._held
        if not self._calls:  # behind reasoning
            yield Delta("content", self._held)
            self._held = ""
            return
        text, found, self._held = take(self._held, tools.BEGIN)
        if found:
            yield Delta("content", text.rstrip())
            self._state = "head"
        else:
            visible = text.rstrip()  # white space before a call is no content
            yield Delta("content", visible)
            self._held = text[len(visible) :] + self._held

    def _read_head(self) -> Iterator[Delta]:
        head = _HEAD.match(self._held)
        if head:
            yield from self._call(_string(head[1]))
            self._held = self._held[head.end() :]
            self._state, self._json = "arguments", _JsonEnd()
            return
        body, mark, rest = self._held.partition(tools.END)
        if not mark:
            return
        self._held, self._state = rest, "content"
        try:  # the keys in another order, or arguments as a string
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield Delta("content", f"{tools.BEGIN}{body}{tools.END}")
            return
        yield from self._call(str(name))
        yield Delta("arguments", arguments, self.num_calls - 1)
        self._end_call()

    def _read_arguments(self) -> Iterator[Delta]:
        length = self._json.find(self._held)
        yield Delta("arguments", self._held[:length], self.num_calls - 1)
        self._held = self._held[length:]
        if self._json.is_complete:
            self._state = "tail"

    def _read_tail(self) -> Iterator[Delta]:
        _, mark, rest = self._held.partition(tools.END)
        if mark:
            self._held = rest
            self._end_call()
        return iter(())

    def _call(self, name: str) -> Iterator[Delta]:
        yield Delta("call", name, self.num_calls)
        self.num_calls += 1

    def _end_call(self) -> None:
        self._state, self._skips_breaks = ("content" if self._parallel else "tail"), True


def _string(text: str) -> str:
    """Reads a JSON string; one with a wrong escape is taken as it stands."""
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return text[1:-1]


class _JsonEnd:
    """Finds where a JSON object ends in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self.is_complete = False

    def find(self, text: str) -> int:
        """Returns how many of the characters belong to the object."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_complete = True
                    return index + 1
        return len(text)
