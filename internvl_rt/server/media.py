"""Pictures and videos of a request, as bytes for the engine. Nothing in a request names a file of this machine."""

from typing import Any

import msgspec
import pybase64
from msgspec import Struct

from internvl_rt.server.body import MARK
from internvl_rt.server.fault import refusal
from internvl_rt.server.protocol import MediaLimits, Part
from internvl_rt.server.remote import Fetcher

_URL_KEYS = {"image_url": "image_url", "input_image": "image_url", "video_url": "video_url", "input_video": "video_url"}
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")


class _Url(Struct):
    url: str = ""
    detail: str | None = None
    max_tiles: int | None = None
    max_dynamic_patch: int | None = None  # the name of max_tiles in other servers
    num_frames: int | None = None
    bound: list[float] | None = None  # start and end in seconds


_URLS = msgspec.json.Decoder(_Url | str)


def is_media(part: Part) -> bool:
    return part.type in _URL_KEYS


def media_place(part: Part, where: str) -> str:
    """Returns where a picture's URL stands, for errors. where: the place of its part."""
    return f"{where}.{_URL_KEYS[part.type]}"


async def read_media(part: Part, where: str, fetcher: Fetcher, limits: MediaLimits, max_frames: int) -> dict[str, Any]:
    """Returns a picture or video as a part of a message for the engine. Raises ApiError.

    detail: "low" is one tile, all others are what the model takes by default. limits: of the request, where the part
    says nothing.
    """
    key, where = _URL_KEYS[part.type], media_place(part, where)
    try:
        read = _URLS.decode(getattr(part, key))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = "expected a URL, or an object with one as url"
        raise refusal(f"{where}: {reason}; send image data as a data: URL", where, "invalid_type") from error
    found = _Url(url=read) if isinstance(read, str) else read
    if part.file is not None and MARK.fullmatch(found.url):
        content = part.file
    else:
        is_data = found.url[:5].lower() == "data:"
        content = _decode(found.url, where) if is_data else await fetcher.fetch(found.url, where)
    if not content:
        raise refusal(f"{where}: the file is empty; send its bytes", where, "invalid_media")
    if key == "video_url":
        num_frames = found.num_frames or part.num_frames or limits.num_frames
        if num_frames is not None and not 1 <= num_frames <= max_frames:
            raise refusal(f"{where}: expected 1 to {max_frames} frames, got {num_frames}", where, "limit_exceeded")
        return {"type": "video", "video": content, "num_frames": num_frames, "bound": found.bound or part.bound}
    detail = found.detail or part.detail
    max_tiles = found.max_tiles or found.max_dynamic_patch or part.max_tiles or limits.max_dynamic_patch
    return {"type": "image", "image": content, "detail": "low" if detail == "low" else "auto", "max_tiles": max_tiles}


def _decode(url: str, where: str) -> bytes:
    """Decodes a data URL: base64 of either alphabet, with or without its padding."""
    head, _, text = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise refusal(f"{where}: expected a URL of the form data:<type>;base64,<data>", where, "invalid_media")
    data = text.rstrip("=").encode("ascii", "replace").translate(_ONE_ALPHABET)
    try:
        return pybase64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        reason = "the data URL is not valid base64; send the encoded file without spaces and line ends"
        raise refusal(f"{where}: {reason}", where, "invalid_media") from error
