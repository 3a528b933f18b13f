"""Tool calls in the form that the language models were trained on: JSON in <tool_call>, tools in the system message.

No official template of InternVL3 defines tools. The form is that of Qwen2.5 and Qwen3 ("Hermes"), whose language models
the family has.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_rt.inputs.grammar_source import Tagged, TaggedValue
from internvl_rt.server.fault import refusal
from internvl_rt.server.protocol import Function, Tool, ToolCall, ToolFunction, not_served

BEGIN, END = "<tool_call>", "</tool_call>"

_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call."""

    functions: tuple[ToolFunction, ...]  # all that the request lists, which the model is shown
    allowed: frozenset[str]  # names that may be called
    required: bool  # the answer must be a call
    parallel: bool  # it may have several calls

    def system_text(self) -> str:
        """Returns what is said of the tools at the end of the system message, as in the templates of Qwen2.5."""
        lines = [_line({"type": "function", "function": _described(each)}) for each in self.functions]
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(lines)
            + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            f"{BEGIN}{END} XML tags:\n{BEGIN}\n"
            '{"name": <function-name>, "arguments": <args-json-object>}'
            f"\n{END}"
        )

    def grammar(self, form: Any = None) -> Tagged | None:
        """Returns the grammar of the answer; None where it may be any text.

        There is one if there must be a call, if a function is strict or not allowed, or if there is a form: a JSON
        schema of the answer where it is no call. With a form there is at most one call.
        """
        strict = any(each.strict for each in self.functions if each.name in self.allowed)
        if form is None and not (self.required or strict or len(self.allowed) < len(self.functions)):
            return None
        values = [
            TaggedValue(f'{BEGIN}\n{{"name": {_line(each.name)}, "arguments": ', _schema(each), f"}}\n{END}")
            for each in self.functions
            if each.name in self.allowed
        ]
        if form is not None:
            return Tagged((*values, TaggedValue("", form, "")), most=1)
        return Tagged(tuple(values), trigger=None if self.required else BEGIN, most=None if self.parallel else 1)


def read_tools(
    tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None, max_tools: int
) -> Tools | None:
    """Reads `tools` and `tool_choice` of either interface. Returns None if nothing may be called. Raises ApiError."""
    if tools and len(tools) > max_tools:
        raise refusal(f"tools: at most {max_tools} are taken, got {len(tools):,}", "tools", "limit_exceeded")
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    names = [each.name for each in functions]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise refusal(f"tools: the function {repeated!r} is there twice; rename one", "tools", "invalid_value")
    required, allowed = choice == "required", frozenset(names)
    if isinstance(choice, dict):
        required, allowed = _chosen(choice, allowed)
    elif choice not in (None, "none", "auto", "required"):
        raise refusal(
            "tool_choice: expected none, auto, required or an object that names a function",
            "tool_choice",
            "invalid_value",
        )
    if required and not allowed:
        raise refusal(
            "tool_choice: a call is required, but there are no tools; send some", "tool_choice", "invalid_value"
        )
    if choice == "none" or not functions:
        return None
    return Tools(tuple(functions), allowed, required, parallel is not False)


def text_of_calls(calls: Sequence[ToolCall], where: str) -> str:
    """Writes calls of an earlier answer as the model wrote them."""
    return "\n".join(_call(each.function, f"{where}[{index}]") for index, each in enumerate(calls))


def text_of_result(content: str) -> str:
    """Writes what a tool returned, for a user message."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _call(function: Function, where: str) -> str:
    arguments = function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            place = f"{where}.function.arguments"
            raise refusal(
                f"{place}: expected JSON as a string; send what the answer had", place, "invalid_value"
            ) from error
    return f"{BEGIN}\n{_line({'name': function.name, 'arguments': arguments})}\n{END}"


def _function(tool: Tool, where: str) -> ToolFunction:
    if tool.type != "function":
        raise not_served("only tools of type function are served; remove it", f"{where}.type")
    function = tool.function or ToolFunction(tool.name or "", tool.description, tool.parameters, tool.strict)
    if not _NAME.fullmatch(function.name):
        place = f"{where}.function.name"
        raise refusal(f"{place}: expected 1 to 128 letters, digits, _, -, . or :", place, "invalid_value")
    return function


def _chosen(choice: dict[str, Any], names: frozenset[str]) -> tuple[bool, frozenset[str]]:
    """Reads a choice that names functions: whether a call is required, and of which."""
    kind, given = choice.get("type"), choice.get("allowed_tools", choice)
    if kind == "allowed_tools" and isinstance(given, dict):
        listed, required = given.get("tools"), given.get("mode") == "required"
    elif kind == "function":
        listed, required = [choice], True
    else:
        raise not_served("only functions and allowed_tools can be chosen", "tool_choice.type")
    chosen = {_name_in(each) for each in listed} if isinstance(listed, list) else {None}
    if not chosen <= names:
        raise refusal(
            "tool_choice: it names a function that is not in tools; send its name", "tool_choice", "invalid_value"
        )
    return required, frozenset(name for name in chosen if name)


def _name_in(choice: object) -> str | None:
    if not isinstance(choice, dict):
        return None
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _described(function: ToolFunction) -> dict[str, Any]:
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    return described | {"parameters": function.parameters or {"type": "object", "properties": {}}}


def _schema(function: ToolFunction) -> dict[str, Any]:
    """Returns the schema that arguments keep to: any object, unless the function is strict."""
    return (function.parameters or _ANY_OBJECT) if function.strict else _ANY_OBJECT


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
