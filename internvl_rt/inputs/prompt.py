"""Renders a conversation as token ids: the `internvl2_5` template, with runs of placeholder ids for pictures.

Source: `internvl_chat/internvl/conversation.py` and `InternVLChatModel.chat` of OpenGVLab/InternVL. Text between two
special tokens of the template is encoded as one piece, which gives the ids of the whole rendered prompt; special tokens
are inserted by id, so that nothing a user writes can end a turn or take a picture's place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby, islice
from typing import Any, Final, Literal, TypeVar

from internvl_rt.errors import RequestError, quoted
from internvl_rt.inputs.tokenizer import Tokenizer

MARKER = "<image>"  # a picture's place in the text of the official interface; not a token

Role = Literal["system", "user", "assistant"]
_T = TypeVar("_T", bound=str)
_DETAILS = ("auto", "low", "high")  # of OpenAI's image_url
_MAX_SECONDS = 1e5  # of a video's bound, as in the official code


class ImageMarker(Enum):
    """The type of `IMAGE`, the place of one picture among the parts of a turn."""

    IMAGE = MARKER


IMAGE: Final = ImageMarker.IMAGE


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the template: text and pictures in order."""

    role: Role
    parts: tuple[str | ImageMarker, ...]
    open: bool = False  # nothing ends it: the answer goes on here


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """The run of <IMG_CONTEXT> ids of one picture: all its tiles, thumbnail included."""

    start: int  # index into the prompt's token ids
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    spans: tuple[VisualSpan, ...]  # one per picture, in order
    text: str  # as the official code renders it, every <IMG_CONTEXT> written out; without <s>


class _Token(Enum):
    """Special tokens of the template."""

    TURN_START = "<|im_start|>"
    TURN_END = "<|im_end|>"


def build_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    *,
    ends_empty: bool = False,
    user_specials: bool = False,
    limit: int | None = None,
) -> Prompt:
    """Renders `turns` and, after a last user turn, the beginning of the answer.

    image_token_counts: visual tokens of each picture, in the order of the `IMAGE` parts.
    ends_empty: whether a user or assistant turn with neither text nor picture is ended like any other, as in the
        template of -hf folders; in the official code's it is its role alone.
    user_specials: whether the tokens that the tokenizer hides from texts are read in them, as in the official code.
        They give no picture a place, which only `IMAGE` parts do.
    limit: most tokens that are worth rendering.

    Raises RequestError if the counts do not match the parts, or if a long text is seen to have more than `limit` tokens
    before all of it is read.
    """
    num_images = sum(part is IMAGE for turn in turns for part in turn.parts)
    if num_images != len(image_token_counts):
        raise RequestError(
            f"the conversation has places for {num_images} pictures, but {len(image_token_counts)} were given; "
            "give one picture for each place"
        )
    counts = iter(image_token_counts)
    image_start, image_context, image_end = (tokenizer.token_id(t) for t in ("<img>", "<IMG_CONTEXT>", "</img>"))
    ids, spans, text = list(tokenizer.prefix_ids), list[VisualSpan](), list[str]()
    for is_text, group in groupby(_render(turns, ends_empty), key=lambda item: isinstance(item, str)):
        if is_text:
            piece = "".join(map(str, group))
            if limit is not None and len(ids) > limit:
                raise RequestError(
                    f"the prompt has more than {len(ids):,} tokens, but prompt and answer together may have {limit:,}; "
                    "shorten it, or raise max_model_len"
                )
            left = None if limit is None else limit - len(ids)
            ids += tokenizer.encode(piece, specials=user_specials, limit=left)
            text.append(piece)
            continue
        for mark in group:
            if isinstance(mark, _Token):
                ids.append(tokenizer.token_id(mark.value))
                text.append(mark.value)
            else:
                count = next(counts)
                spans.append(VisualSpan(len(ids) + 1, count))
                ids += [image_start, *[image_context] * count, image_end]
                text.append(f"<img>{'<IMG_CONTEXT>' * count}</img>")
    return Prompt(tuple(ids), tuple(spans), "".join(text))


def _render(turns: Sequence[Turn], ends_empty: bool) -> Iterator[str | ImageMarker | _Token]:
    for turn in turns:
        yield _Token.TURN_START
        yield f"{turn.role}\n"
        yield from turn.parts
        if not turn.open and (ends_empty or turn.role == "system" or any(turn.parts)):
            yield _Token.TURN_END
            yield "\n"
    if turns[-1].role == "user":
        yield _Token.TURN_START
        yield "assistant\n"


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


def parse_messages(messages: object) -> tuple[Message, ...]:
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
    the beginning of the answer. Raises RequestError that names the place, such as messages[1].content[0].
    """
    items = _list_of(messages, "messages", "message")
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


def _parse_message(value: object, where: str) -> Message:
    message = _object_with(value, ("content", "role"), ("name",), where)
    role: Role = _choice(message["role"], ("system", "user", "assistant"), f"{where}.role")
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
        return Media("video", content, num_frames=_count(part, "num_frames", where), bound=_bound(part, where))
    max_tiles, details = _count(part, "max_tiles", where), [(part, where)]
    if kind == "image_url":
        where = f"{where}.image_url"
        if not isinstance(content, str):
            inner = _object_with(content, ("url",), ("detail",), where)
            content, details = _string(inner["url"], f"{where}.url"), [*details, (inner, where)]
    for holder, place in details:
        if holder.get("detail") is not None and _choice(holder["detail"], _DETAILS, f"{place}.detail") == "low":
            max_tiles = max_tiles or 1
    return Media("image", content, max_tiles)


def _count(part: Mapping[str, Any], key: str, where: str) -> int | None:
    value = part.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise RequestError(f"{where}.{key}: expected an integer of at least 1, got {quoted(value)}; correct it")
    return value


def _bound(part: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    value = part.get("bound")
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(second) in (int, float) for second in value):
        start, end = value
        if -_MAX_SECONDS <= start <= end <= _MAX_SECONDS:
            return float(start), float(end)
    raise RequestError(f"{where}.bound: expected [start, end] in seconds, start first, got {quoted(value)}; correct it")


def _choice(value: object, choices: tuple[_T, ...], where: str) -> _T:
    for choice in choices:
        if isinstance(value, str) and value == choice:
            return choice
    raise RequestError(f"{where}: expected one of {', '.join(choices)}, got {quoted(value)}; use one of these")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected a string, got {_shown(value)}; send a string")
    return value


def _list_of(value: object, where: str, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(f"{where}: expected a list with at least one {what}, got {_shown(value)}; send one")
    return value


def _object_with(value: object, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not {*required} <= set(value) <= {*required, *optional}:
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


def turns_from_messages(
    messages: Sequence[Message], num_frames: Sequence[int], *, system: str | None, number_images: bool = True
) -> tuple[Turn, ...]:
    """Builds the turns of a checked conversation.

    num_frames: pictures that each video was decoded to, in order. system: the system message unless the conversation
    has its own; None for no system turn. A picture is a line "<image>"; with several in one message each is "Image-k:
    <image>", k counting over the conversation (not with `number_images` false, as in the templates of -hf
    repositories). Frames of a video are "Framek: <image>". Text is left as it is. A last message of the assistant is
    left open, to be continued.
    """
    frames = iter(num_frames)
    image_number = 0
    turns = [] if system is None or messages[0].role == "system" else [Turn("system", (system,))]
    for message in messages:
        several = sum(isinstance(part, Media) and part.kind != "video" for part in message.parts) > 1
        parts: list[str | ImageMarker] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append(part)
            elif part.kind != "video":
                image_number += 1
                parts += [f"Image-{image_number}: " if several and number_images else "", IMAGE, "\n"]
            else:
                for frame in range(1, next(frames) + 1):
                    parts += [f"Frame{frame}: ", IMAGE, "\n"]
        turns.append(Turn(message.role, tuple(parts)))
    if turns[-1].role == "assistant":
        turns[-1] = replace(turns[-1], open=True)
    return tuple(turns)


def tiles_per_image(num_tiles: int, num_patches_list: Sequence[int] | None) -> list[int]:
    """Counts each picture's tiles as the official `chat` does: without a list, all tiles are of one picture.

    Raises RequestError if the list does not account for every tile.
    """
    if num_patches_list is None:
        return [num_tiles] if num_tiles else []
    if sum(num_patches_list) != num_tiles:
        raise RequestError(
            f"num_patches_list: expected numbers that sum to the {num_tiles} tiles in pixel_values, got "
            f"{quoted(num_patches_list)}; give the number of tiles of each picture"
        )
    return list(num_patches_list)


def turns_from_question(
    question: str, history: Sequence[tuple[str, str]] | None, *, num_images: int, system: str | None
) -> tuple[tuple[Turn, ...], str]:
    """Builds the turns of the official `chat`; returns them and the question as it goes into the history.

    A question without history, with pictures and without "<image>" gets "<image>\\n" in front. Pictures take the place
    of the first `num_images` "<image>" of the whole prompt, system message and old answers included; further ones stay
    text. A row of the official `batch_chat` is the same with `num_images` 1. Raises RequestError if places are missing.
    """
    if history is None and num_images and MARKER not in question:
        question = f"{MARKER}\n{question}"
    texts: list[tuple[Role, str]] = [] if system is None else [("system", system)]
    for old_question, answer in history or ():
        texts += [("user", old_question), ("assistant", answer)]
    left = num_images
    turns = []
    for role, text in [*texts, ("user", question)]:
        first, *others = text.split(MARKER, left)
        turns.append(Turn(role, (first, *(part for other in others for part in (IMAGE, other)))))
        left -= len(others)
    if left:
        raise RequestError(
            f"{num_images} pictures were given, but the conversation has only {num_images - left} {MARKER!r}; "
            f"write {MARKER} where each picture belongs"
        )
    return tuple(turns), question
