"""Renders a conversation as token ids: the `internvl2_5` template, with runs of placeholder ids for pictures.

Source: `internvl_chat/internvl/conversation.py` and `InternVLChatModel.chat` of OpenGVLab/InternVL. Text between two
special tokens of the template is encoded as one piece, which gives the ids of the whole rendered prompt; special tokens
are inserted by id, so that nothing a user writes can end a turn or take a picture's place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Any, Final, Literal

from internvl_rt.errors import RequestError
from internvl_rt.inputs.tokenizer import Tokenizer

MARKER = "<image>"  # a picture's place in the text of the official interface; not a token

Role = Literal["system", "user", "assistant"]


class ImageMarker(Enum):
    """The type of `IMAGE`, the place of one picture among the parts of a turn."""

    IMAGE = MARKER


IMAGE: Final = ImageMarker.IMAGE


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the template: text and pictures in order."""

    role: Role
    parts: tuple[str | ImageMarker, ...]


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
    turns: Sequence[Turn], tokenizer: Tokenizer, image_token_counts: Sequence[int], *, user_specials: bool = False
) -> Prompt:
    """Renders `turns` and, after a last user turn, the beginning of the answer.

    image_token_counts: visual tokens of each picture, in the order of the `IMAGE` parts. A user or assistant turn with
    neither text nor picture renders its role alone, as in the official template. `user_specials`: the tokens that the
    tokenizer hides from texts are read in them, as in the official code; they give no picture a place, which only
    `IMAGE` parts do. Raises RequestError if the counts do not match the parts.
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
    for is_text, group in groupby(_render(turns), key=lambda item: isinstance(item, str)):
        if is_text:
            piece = "".join(map(str, group))
            ids += tokenizer.encode(piece, specials=user_specials)
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


def _render(turns: Sequence[Turn]) -> Iterator[str | ImageMarker | _Token]:
    for turn in turns:
        yield _Token.TURN_START
        yield f"{turn.role}\n"
        if turn.role == "system" or any(turn.parts):
            yield from turn.parts
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


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[str | Media, ...]


def parse_messages(messages: object) -> tuple[Message, ...]:
    """Checks a conversation in OpenAI's form, and loads nothing.

    Each message is {"role", "content"}; content is a string or a list of {"type": "text", "text": str}, {"type":
    "image", "image": ...}, {"type": "video", "video": ...}, {"type": "image_embeds", "image_embeds": ...} and {"type":
    "image_url", "image_url": {"url": str}}. Only the first message may be a system message, only user messages hold
    media, and the last one is a user's. Raises RequestError that names the place, such as messages[1].content[0].
    """
    items = _list_of(messages, "messages", "message")
    parsed = tuple(_parse_message(item, f"messages[{index}]") for index, item in enumerate(items))
    for index, message in enumerate(parsed[1:], start=1):
        if message.role == "system":
            raise RequestError(f"messages[{index}]: expected the system message to be the first; move it there")
    if parsed[-1].role != "user":
        raise RequestError(
            f"messages[{len(parsed) - 1}]: expected the last message to be a user's, got role {parsed[-1].role!r}; "
            "end with the question to be answered"
        )
    return parsed


def _parse_message(value: object, where: str) -> Message:
    message = _object_with(value, {"role", "content"}, where)
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"{where}.role: expected system, user or assistant, got {role!r}; use one of these")
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
    if kind not in ("text", "image", "video", "image_url", "image_embeds"):
        raise RequestError(
            f"{where}: expected an object whose type is text, image, video, image_url or image_embeds, got "
            f"{_shown(value)}; send the content as one of these"
        )
    content = _object_with(value, {"type", kind}, where)[kind]
    if kind == "text":
        return _string(content, f"{where}.text")
    if kind == "image_url":
        return Media(
            "image", _string(_object_with(content, {"url"}, f"{where}.image_url")["url"], f"{where}.image_url.url")
        )
    return Media(kind, content)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected a string, got {_shown(value)}; send a string")
    return value


def _list_of(value: object, where: str, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(f"{where}: expected a list with at least one {what}, got {_shown(value)}; send one")
    return value


def _object_with(value: object, keys: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or set(value) != keys:
        raise RequestError(
            f"{where}: expected an object with exactly the keys {', '.join(sorted(keys))}, got {_shown(value)}; "
            "add what is missing and remove the others"
        )
    return value


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        kind = f" and type {value['type']!r}" if "type" in value else ""
        return f"an object with the keys {', '.join(map(str, value)) or '(none)'}{kind}"
    return "an empty list" if isinstance(value, list | tuple) and not value else type(value).__name__


def turns_from_messages(
    messages: Sequence[Message], num_frames: Sequence[int], *, system: str | None, number_images: bool = True
) -> tuple[Turn, ...]:
    """Builds the turns of a checked conversation.

    num_frames: pictures that each video was decoded to, in order. system: the system message unless the conversation
    has its own; None for no system turn. A picture is a line "<image>"; with several in one message each is "Image-k:
    <image>", k counting over the conversation (not with `number_images` false, as in the templates of -hf
    repositories). Frames of a video are "Framek: <image>". Text is left as it is.
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
            f"{list(num_patches_list)}; give the number of tiles of each picture"
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
