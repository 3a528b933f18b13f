"""Renders a conversation as token ids: the turns of a template, with runs of placeholder ids for pictures.

Source: `internvl_chat/internvl/conversation.py` and `InternVLChatModel.chat` of OpenGVLab/InternVL. Text between two
special tokens of the template is encoded as one piece, which gives the ids of the whole rendered prompt; special tokens
are inserted by id, so that nothing a user writes can end a turn or take a picture's place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Final

from internvl_rt.checkpoint.template import CHATML, Special, Template, spelt
from internvl_rt.errors import ContextLengthError, RequestError, check_list, quoted
from internvl_rt.inputs.messages import ROLE, Media, Message, Role
from internvl_rt.inputs.tokenizer import SHORTEN, Tokenizer
from internvl_rt.values import read

MARKER = "<image>"  # a picture's place in the text of the official interface; not a token


class ImageMarker(Enum):
    """The type of `IMAGE`, the place of one picture among the parts of a turn."""

    IMAGE = MARKER


IMAGE: Final = ImageMarker.IMAGE


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the template: text and pictures in order."""

    role: Role
    parts: tuple[str | ImageMarker, ...]  # an assistant's may begin with the template's header, spelt
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


def check_turns(turns: object) -> None:
    """Raises RequestError unless these are turns that `build_prompt` can render."""
    check_list("turns", turns, "turns")
    assert isinstance(turns, Sequence)
    if not turns:
        raise RequestError("turns: expected at least one turn, got none; give the question")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Turn) or not isinstance(turn.parts, list | tuple):
            raise RequestError(f"turns[{index}]: expected a Turn with a tuple of parts, got {quoted(turn)}; make one")
        read(f"turns[{index}].role", turn.role, ROLE)
        wrong = [part for part in turn.parts if part is not IMAGE and not isinstance(part, str)]
        if wrong:
            raise RequestError(f"turns[{index}].parts: expected texts and IMAGE, got {quoted(wrong[0])}; remove it")


def build_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    *,
    template: Template = CHATML,
    ends_empty: bool = False,
    user_specials: bool = False,
    limit: int | None = None,
    remedy: str = SHORTEN,
) -> Prompt:
    """Renders `turns` and, after a last user turn, the beginning of the answer.

    image_token_counts: visual tokens of each picture, in the order of the `IMAGE` parts.
    ends_empty: whether a user or assistant turn with neither text nor picture is ended like any other, as in the
        template of -hf folders; in the official code's it is its role alone.
    user_specials: whether the tokens that the tokenizer hides from texts are read in them, as in the official code.
        They give no picture a place, which only `IMAGE` parts do.
    limit: most tokens that are worth rendering.
    remedy: what helps if there are more, for the error.

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
    for is_text, group in groupby(_render(turns, template, ends_empty), key=lambda item: isinstance(item, str)):
        if is_text:
            piece = "".join(map(str, group))
            if limit is not None and len(ids) > limit:
                raise ContextLengthError(
                    f"the prompt has more than {len(ids):,} tokens, but prompt and answer together may have {limit:,}; "
                    f"{remedy}"
                )
            left = None if limit is None else limit - len(ids)
            ids += tokenizer.encode(piece, specials=user_specials, limit=left, remedy=remedy)
            text.append(piece)
            continue
        for mark in group:
            if isinstance(mark, Special):
                ids.append(tokenizer.token_id(mark.token))
                text.append(mark.token)
            else:
                count = next(counts)
                spans.append(VisualSpan(len(ids) + 1, count))
                ids += [image_start, *[image_context] * count, image_end]
                text.append(f"<img>{'<IMG_CONTEXT>' * count}</img>")
    return Prompt(tuple(ids), tuple(spans), "".join(text))


def _render(turns: Sequence[Turn], template: Template, ends_empty: bool) -> Iterator[str | ImageMarker | Special]:
    for index, turn in enumerate(turns):
        yield from template.begins[turn.role]
        is_answer, header = turn.role == "assistant", spelt(template.header)
        match turn.parts:
            case (str(first), *others) if is_answer and header and first.startswith(header):
                yield from (*template.header, first.removeprefix(header), *others)
            case parts:
                yield from parts
        if not turn.open and (ends_empty or turn.role == "system" or any(turn.parts)):
            yield from template.ends_last if is_answer and index == len(turns) - 1 else template.ends
    if turns[-1].role == "user":
        yield from template.begins["assistant"]


def turns_from_messages(
    messages: Sequence[Message],
    num_frames: Sequence[int],
    *,
    system: str | None,
    number_images: bool = True,
    template: Template = CHATML,
) -> tuple[Turn, ...]:
    """Builds the turns of a checked conversation.

    num_frames: pictures that each video was decoded to, in order. system: the system message unless the conversation
    has its own; None for no system turn. A picture is a line "<image>"; with several in one message each is "Image-k:
    <image>", k counting over the conversation (not with `number_images` false, as in the templates of -hf
    repositories). Frames of a video are "Framek: <image>". Text is left as it is, but for the template's header, which
    an assistant's text gets unless it is empty or has it. A last message of the assistant is left open, to be
    continued.
    """
    frames, header = iter(num_frames), spelt(template.header)
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
        if message.role == "assistant" and header and any(parts):
            text = "".join(map(str, parts))
            parts = [text if text.startswith(header) else header + text]
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
