"""Reads the body of a request: its size, its JSON, and the data of its pictures, which are never made a string."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import pybase64

from internvl_rt.errors import InternVLError
from internvl_rt.server.fault import ApiError, refusal
from internvl_rt.server.protocol import Part

T = TypeVar("T")
MAX_VALUES = 1 << 18  # texts, numbers, lists and objects of a body: each takes time and memory as a Python object
_LONG = 16 << 10  # bytes of a body whose data URLs are looked for
_MAX_DATA_URLS = 1024
_DATA_URL = re.compile(rb'"(?:image_url|video_url|url)"\s*:\s*"(data:[^",\\]{0,200};base64,)', re.IGNORECASE)
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
MARK = re.compile(r"data:#(\d+)")  # stands for a data URL that was cut out


class Body(NamedTuple):
    """A body as it came, and without its long data URLs: a mark with its number stands for each."""

    whole: bytes
    text: bytes
    data: tuple[memoryview, ...]  # base64


def cut(whole: bytes, max_text_bytes: int) -> Body:
    """Cuts the data URLs out of a body. Raises ApiError if the rest is too large.

    While JSON is read no other request goes on: half a millisecond for each megabyte of data, a quarter of a second for
    4 MB of empty lists. Values are counted by the character before each.
    """
    text, data = whole, list[memoryview]()
    if len(whole) > min(_LONG, max_text_bytes):
        pieces, end = list[bytes](), 0
        while len(data) < _MAX_DATA_URLS and (found := _DATA_URL.search(whole, end)):
            stop = whole.find(b'"', found.end())
            if stop < 0:
                break
            pieces += [whole[end : found.start(1)], b"data:#%d" % len(data)]
            data.append(memoryview(whole)[found.end() : stop])
            end = stop
        text = b"".join([*pieces, whole[end:]]) if data else whole
    if len(text) > max_text_bytes:
        what = f"the body has more than {max_text_bytes:,} bytes besides its data: URLs; send less"
        raise ApiError(413, what, "body_too_large")
    if len(text) > MAX_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        what = f"the body has more than {MAX_VALUES:,} values, counted by their commas and brackets; send less"
        raise ApiError(413, what, "body_too_large")
    return Body(whole, text, tuple(data))


def parse(body: Body, kind: type[T]) -> T:
    """Reads JSON of a kind, and gives each picture its file. Raises ApiError, which names the field that is wrong."""
    if body.data:
        request = _decode(body.text, kind)
        if _give_files(request, body.data):
            return request
    return _decode(body.whole, kind)


def _give_files(request: object, data: Sequence[memoryview]) -> bool:
    """Decodes what was cut out, for the parts that have the marks. Says whether all of it was for pictures.

    It is not if something else has a field named url, or if the data are no plain base64.
    """
    marked = list(_marked_parts(request))
    if [number for number, _ in marked] != list(range(len(data))):
        return False
    try:
        for number, part in marked:
            part.__dict__["file"] = pybase64.b64decode(data[number], validate=True)
    except ValueError:
        return False
    return True


def _marked_parts(request: object) -> Iterator[tuple[int, Part]]:
    messages: Any = getattr(request, "messages", None) or getattr(request, "input", None)
    for message in messages if isinstance(messages, list) else ():
        for content in (message.content, getattr(message, "output", None)):
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Part):
                    urls = bytes(part.image_url) + bytes(part.video_url)
                    yield from ((int(found[1]), part) for found in MARK.finditer(urls.decode("utf-8", "replace")))


def _decode(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        said = str(error)
        found = _PATH.search(said)
        param = found[1] if found else None
        reason = str(InternVLError(said[: found.start()] if found else said))
        raise refusal(f"{param or 'the body'}: {reason}", param, "invalid_type") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(InternVLError(error))
        raise refusal(f"the body is not valid JSON: {reason}; send a JSON object", None, "invalid_json") from error
