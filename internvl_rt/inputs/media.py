"""Gets the bytes of pictures and videos: from paths, `data:` URLs, bytes and file objects, sizes before bytes."""

import base64
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeGuard

from internvl_rt.checkpoint.files import open_file
from internvl_rt.errors import MediaError, quoted

MediaSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryIO"
MediaKind: TypeAlias = Literal["image", "video"]

# The option of the engine that limits the encoded bytes of each kind.
_LIMIT_OPTIONS = {"image": "max_image_bytes", "video": "max_video_bytes"}

_BASE64_WINDOW = 1 << 20  # characters, a multiple of 4
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/_-]")
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")


class Borrowed:
    """Lets one thread at a time use an object that belongs to a caller, who may have given it to several requests.

    Objects are told apart by their identity, because Pillow's pictures cannot be hashed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_use: set[int] = set()

    @contextmanager
    def use(self, *objects: object) -> Iterator[None]:
        """Waits until no other thread uses any of the objects. They are taken together, so there is no deadlock."""
        ids = set(map(id, objects))
        with self._changed:
            self._changed.wait_for(lambda: not ids & self._in_use)
            self._in_use |= ids
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= ids
                self._changed.notify_all()


# One for the process: the same object may be given to two engines. A child that was forked in the middle starts anew.
BORROWED = Borrowed()
os.register_at_fork(after_in_child=BORROWED.__init__)  # type: ignore[misc]


def is_media_source(source: object) -> TypeGuard[MediaSource]:
    """Returns whether `open_media` takes an object of this type."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")


def open_media(source: MediaSource, kind: MediaKind, max_bytes: int) -> tuple[BinaryIO, str]:
    """Opens encoded bytes, or what holds them, for reading.

    source: path, `data:` URL, bytes-like object, or binary file object. A file object is read whole, from its start if
        it can seek, and its position is put back.
    max_bytes: most encoded bytes; sizes are compared with it before anything is read or decoded.

    Returns a stream of its own, at its start, and the name of the source for messages, which begins with `kind`. Raises
    MediaError if the source is another kind of URL, not a readable file, not base64, empty or too large; reading the
    stream raises it where the system cannot.
    """
    stream: BinaryIO
    if isinstance(source, bytes | bytearray | memoryview):
        num_bytes = _count_bytes(source, kind)
        name = f"{kind} bytes ({num_bytes} bytes)"
        _check_bytes(num_bytes, name, kind, max_bytes)
        stream = io.BytesIO(source if isinstance(source, bytes) else bytes(source))
    elif isinstance(source, str) and source[:5].lower() == "data:":
        name = f"{kind} data URL ({len(source)} characters)"
        stream = io.BytesIO(_decode_url(source, name, kind, max_bytes))
    elif isinstance(source, str | os.PathLike):
        path = _path_of(source, kind)
        name = f"{kind} {quoted(path)}"
        stream = _open_file(path, name)
    else:
        name = f"{kind} file object ({type(source).__name__})"
        with BORROWED.use(source):
            stream = io.BytesIO(read_borrowed(source, name, kind, max_bytes))
    try:
        _check_bytes(stream.seek(0, os.SEEK_END), name, kind, max_bytes)
        stream.seek(0)
    except MediaError:
        stream.close()
        raise
    return stream, name


def read_borrowed(file: Any, name: str, kind: MediaKind, max_bytes: int) -> bytes:
    """Reads a caller's file object and puts its position back; the caller of this function holds it by `BORROWED`."""
    try:
        seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
        if not seekable:
            return _read(file, name, kind, max_bytes)
        position = file.tell()
        try:
            file.seek(0, os.SEEK_END)
            _check_bytes(file.tell(), name, kind, max_bytes)
            file.seek(0)
            return _read(file, name, kind, max_bytes)
        finally:
            file.seek(position)
    except MediaError:
        raise
    except Exception as error:  # a file object of any library raises what it likes
        closed = getattr(file, "closed", False) is True
        problem = "is closed" if closed else f"cannot be read ({type(error).__name__})"
        raise MediaError(f"{name} {problem}: pass an open file, its path or its bytes") from error


def _read(file: Any, name: str, kind: MediaKind, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while part := file.read(max_bytes + 1 - num_bytes):  # a read may return less than it was asked for
        if not isinstance(part, bytes | bytearray | memoryview):
            raise MediaError(f"{name} gives {type(part).__name__} instead of bytes: open it in binary mode ('rb')")
        parts.append(bytes(part))
        num_bytes += len(part)
        _check_bytes(num_bytes, name, kind, max_bytes)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _count_bytes(source: bytes | bytearray | memoryview, kind: MediaKind) -> int:
    try:
        return memoryview(source).nbytes
    except ValueError as error:
        raise MediaError(f"{kind} bytes: the memoryview was released; keep it until the call returns") from error


def _path_of(source: "str | os.PathLike[Any]", kind: MediaKind) -> str:
    try:
        return os.fsdecode(source)
    except Exception as error:  # a caller's own class of paths raises what it likes
        raise MediaError(
            f"{kind} path: {type(source).__name__} gives no path ({type(error).__name__}); pass a string or a Path"
        ) from error


def _check_bytes(num_bytes: int, name: str, kind: MediaKind, max_bytes: int) -> None:
    if not num_bytes:
        raise MediaError(f"{name} is empty")
    if num_bytes > max_bytes:
        raise MediaError(f"{name} has more than {max_bytes} bytes: make it smaller, or raise {_LIMIT_OPTIONS[kind]}")


def _decode_url(url: str, name: str, kind: MediaKind, max_bytes: int) -> bytes:
    """Decodes base64 of either alphabet, with or without its padding, after its length has been checked."""
    start = url.find(",") + 1
    header = url[: start - 1] if start else url
    if not header[-7:].lower() == ";base64":
        raise MediaError(f"{name} must have the form data:<type>;base64,<data>, got {quoted(header[:60])}")
    end = len(url) if start else 0
    for _ in range(2):  # the most that a whole number of bytes needs
        end -= end > start and url[end - 1] == "="
    num_characters = max(0, end - start)
    _check_bytes(num_characters * 3 // 4, name, kind, max_bytes)
    return b"".join(_decode_base64(url, start, end, name))


def _decode_base64(url: str, start: int, end: int, name: str) -> Iterator[bytes]:
    """Decodes a part of a URL in windows: each holds the interpreter lock, and no copy of the whole part is made."""
    for first in range(start, end, _BASE64_WINDOW):
        last = min(end, first + _BASE64_WINDOW)
        if bad := _NO_BASE64.search(url, first, last):
            raise MediaError(
                f"{name} is not valid base64: found {bad[0]!r} at character {bad.start() - start} of the data; pass "
                "the encoded file without spaces or line ends"
            )
        if (last - first) % 4 == 1:
            raise MediaError(f"{name} is not valid base64: {end - start} characters cannot be whole bytes; it was cut")
        data = url[first:last].encode("ascii") + b"=" * (-(last - first) % 4)
        yield base64.b64decode(data.translate(_ONE_ALPHABET))


def _open_file(path: str, name: str) -> BinaryIO:
    if re.match(r"[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE):
        raise MediaError(f"{name} is a URL, which is not fetched: download it and pass the path or the bytes")
    return open_file(path, MediaError, name=name, remedy="check its path, or pass its bytes")
