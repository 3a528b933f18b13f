"""Reads the input of /v1/responses and /v1/decisions as the messages of a chat."""

from collections.abc import Sequence

from internvl_rt.server.fault import refusal
from internvl_rt.server.media import is_media
from internvl_rt.server.protocol import Function, Input, Item, Message, Part, ToolCall

_RESULTS, _CALLS = ("function_call_output", "custom_tool_call_output"), ("function_call",)


def messages_of(given: Input) -> tuple[list[Message], list[str]]:
    """Returns messages, and the place of each in the request. Raises ApiError.

    Calls in a row are one message. What a tool has returned is a message of its own, and its pictures are a user's.
    """
    if given is None or isinstance(given, str):
        return [Message("user", given or "")], ["input"]
    made: list[tuple[Message, str]] = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if item.type in _CALLS:
            call = ToolCall(Function(item.name or "", item.arguments or ""), item.call_id)
            last = made[-1][0] if made else None
            if last is not None and last.role == "assistant":
                last.tool_calls = last.tool_calls or []
                last.tool_calls.append(call)
            else:
                made.append((Message("assistant", None, [call]), where))
        elif item.type in _RESULTS:
            made += [(message, f"{where}.output") for message in _result(item)]
        elif item.type in (None, "message") and item.role is not None:
            made.append((Message(item.role, item.content), where))
        elif item.type != "reasoning":  # which no template shows
            what = f"{where}: items of type {item.type!r:.60} are not served; send messages, calls and their outputs"
            raise refusal(what, where, "unsupported_item")
    return [message for message, _ in made], [where for _, where in made]


def _result(item: Item) -> Sequence[Message]:
    parts = item.output if isinstance(item.output, list) else []
    pictures: list[Part | str] = [part for part in parts if _is_picture(part)]
    texts = [part for part in parts if not _is_picture(part)] if pictures else item.output
    result = Message("tool", texts, tool_call_id=item.call_id)
    return [result, Message("user", pictures)] if pictures else [result]


def _is_picture(part: Part | str) -> bool:
    return isinstance(part, Part) and is_media(part)
