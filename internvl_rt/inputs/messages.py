"""Checks a conversation in OpenAI's form: messages of texts, pictures and videos, none of which is read yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from internvl_rt.errors import ContextLengthError, RequestError, quoted
from internvl_rt.inputs.video import BOUND
from internvl_rt.values import Integer, Kind, OneOf, UnfitError

Role = Literal["system", "user", "assistant"]
ROLE = OneOf(("system", "user", "assistant"), "one of system, user, assistant")
_DETAIL = OneOf(("auto", "low", "high"), "one of auto, low, high")  # of OpenAI's image_url
_COUNT = Integer(1)
_TOKENS_PER_MESSAGE = 3  # <|im_start|>, a role and a line break, or such; all but an empty message take more


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, a video or a picture's visual tokens as the request gives them, not yet read."""

    kind: Literal["image", "video", "image_embeds"]
    source: Any
    max_tiles: int | None = None  # of a picture; None: the engine's limit
    num_frames: int | None = None  # of a video; None: as many as the official code takes
    bound: tuple[float, float] | None = None  # start and end of a video in seconds; None: all of it


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[str | Media, ...]


# The keys that a part may have besides "type" and the one of its type's name.
_PART_OPTIONS = {
    "text": (),
    "image": ("detail", "max_tiles"),
    "video": ("bound", "num_frames"),
    "image_url": ("detail", "max_tiles"),
    "image_embeds": (),
}


def parse_messages(messages: object, max_tokens: int | None = None) -> tuple[Message, ...]:
    """Checks a conversation in OpenAI's form, and loads nothing.

    Each message is {"role", "content"}, and a "name", which no template shows, is not read. The content is a string or
    a list of these parts; an assistant's may be None, which is no text. An option that is None counts as left out.

    * {"type": "text", "text": str}
    * {"type": "image", "image": ...}, with "max_tiles" (at most the engine's) and "detail" as options
    * {"type": "image_url", "image_url": {"url": str} or str}, with the same options; "detail" may stand beside "url"
    * {"type": "video", "video": ...}, with "num_frames" and "bound" ([start, end] in seconds) as options
    * {"type": "image_embeds", "image_embeds": ...}

    detail: "low" is one tile unless max_tiles says otherwise; "auto" and "high" change nothing. Only the first message
    may be a system message, and only user messages hold media. The last one is a user's, or an assistant's, which is
    the beginning of the answer.

    max_tokens: most tokens of the conversation; no more parts are looked at, and no more messages than fit.

    Raises RequestError that names the place, such as messages[1].content[0].
    """
    items = _list_of(messages, "messages", "message")
    if max_tokens is not None:
        _check_numbers(items, max_tokens)
    parsed = tuple(_parse_message(item, f"messages[{index}]") for index, item in enumerate(items))
    for index, message in enumerate(parsed[1:], start=1):
        if message.role == "system":
            raise RequestError(f"messages[{index}]: expected the system message to be the first; move it there")
    if parsed[-1].role == "system" or all(message.role != "user" for message in parsed):
        raise RequestError(
            f"messages[{len(parsed) - 1}]: expected the last message to be a user's, or the beginning of the "
            f"assistant's answer to one, got role {parsed[-1].role!r}; send the question to be answered"
        )
    return parsed


def _check_numbers(messages: Sequence[object], max_tokens: int) -> None:
    """Refuses more messages or parts than are worth looking at in a conversation of at most `max_tokens` tokens."""
    most = max_tokens // _TOKENS_PER_MESSAGE
    if len(messages) > most:
        raise ContextLengthError(
            f"messages: {len(messages):,} messages cannot fit {max_tokens:,} tokens, of which each takes at least "
            f"{_TOKENS_PER_MESSAGE}; send at most {most:,}"
        )
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    num_parts = sum(len(content) for content in contents if isinstance(content, list | tuple))
    if num_parts > max_tokens:
        raise ContextLengthError(
            f"messages: {num_parts:,} parts, but a conversation of at most {max_tokens:,} tokens may have one for each "
            "token; join the texts"
        )


def _parse_message(value: object, where: str) -> Message:
    message = _object_with(value, ("content", "role"), ("name",), where)
    role: Role = _read(message["role"], ROLE, f"{where}.role")
    content = message["content"]
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(role, (content,))
    items = _list_of(content, f"{where}.content", "part")
    parts = tuple(_parse_part(item, f"{where}.content[{index}]") for index, item in enumerate(items))
    for index, part in enumerate(parts):
        if isinstance(part, Media) and role != "user":
            raise RequestError(
                f"{where}.content[{index}]: expected text in a message of role {role!r}, got a {part.kind}; "
                "put pictures and videos into user messages"
            )
    return Message(role, parts)


def _parse_part(value: object, where: str) -> str | Media:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _PART_OPTIONS:
        raise RequestError(
            f"{where}: expected an object whose type is text, image, video, image_url or image_embeds, got "
            f"{_shown(value)}; send the content as one of these"
        )
    part = _object_with(value, (kind, "type"), _PART_OPTIONS[kind], where)
    content = part[kind]
    if kind == "text":
        return _string(content, f"{where}.text")
    if kind == "image_embeds":
        return Media("image_embeds", content)
    if kind == "video":
        return Media(
            "video",
            content,
            num_frames=_option(part, "num_frames", _COUNT, where),
            bound=_option(part, "bound", BOUND, where),
        )
    max_tiles, details = _option(part, "max_tiles", _COUNT, where), [(part, where)]
    if kind == "image_url":
        where = f"{where}.image_url"
        if not isinstance(content, str):
            inner = _object_with(content, ("url",), ("detail",), where)
            content, details = _string(inner["url"], f"{where}.url"), [*details, (inner, where)]
    for holder, place in details:
        if _option(holder, "detail", _DETAIL, place) == "low":
            max_tiles = max_tiles or 1
    return Media("image", content, max_tiles)


def _option(part: Mapping[str, Any], key: str, kind: Kind, where: str) -> Any:
    """Reads an option of a part; one that is None counts as left out."""
    return None if part.get(key) is None else _read(part[key], kind, f"{where}.{key}")


def _read(value: object, kind: Kind, where: str) -> Any:
    try:
        return kind.read(value)
    except UnfitError:
        raise RequestError(f"{where}: expected {kind.expected}, got {quoted(value)}; correct it") from None


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected a string, got {_shown(value)}; send a string")
    return value


def _list_of(value: object, where: str, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(f"{where}: expected a list with at least one {what}, got {_shown(value)}; send one")
    return value


def _object_with(value: object, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> Mapping[str, Any]:
    names = {*required, *optional}
    if not isinstance(value, Mapping) or len(value) > len(names) or not {*required} <= set(value) <= names:
        remedy = "add what is missing and remove the others"
        if optional:
            remedy += f"; {', '.join(optional)} may be there too"
        raise RequestError(
            f"{where}: expected an object with exactly the keys {', '.join(required)}, got {_shown(value)}; {remedy}"
        )
    return value


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        keys = [quoted(key).strip("'\"") for key in islice(value, 12)]
        kind = f" and type {quoted(value['type'])}" if "type" in value else ""
        return f"an object with the keys {', '.join(keys) or '(none)'}{kind}"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return quoted(type(value).__name__).strip("'")
