"""Opens and reads files: only regular ones, whose size is checked before a byte is taken.

A folder or a path may come from anybody: a link to /dev/zero has no end, and opening a named pipe waits for ever.
"""

import io
import os
import stat
from pathlib import Path
from typing import Any

from internvl_rt.errors import InternVLError, TranslateErrors

MAX_FILE_BYTES = 1 << 24  # of JSON and other small files; the largest real ones are a few MB
MAX_TOKENIZER_BYTES = 1 << 26  # of tokenizer.json, of which real ones have 11 MB


class _RegularFile(io.FileIO):
    """A file that raises `refusal` where the system cannot read it, as on a damaged disk."""

    def __init__(self, file: str | Path, refusal: type[InternVLError], name: str, remedy: str) -> None:
        def translate(error: BaseException) -> InternVLError | None:
            reason = error.strerror if isinstance(error, OSError) else None
            return None if reason is None else refusal(f"{name} cannot be read: {reason}; {remedy}")

        self._errors = TranslateErrors(translate)
        # without O_NONBLOCK the opening of a named pipe waits for a writer
        super().__init__(file, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))

    def seekable(self) -> bool:
        return True  # `seek` tells where it cannot

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with self._errors:
            return super().seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int | None:
        with self._errors:
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._errors:
            return super().readall()


def open_file(
    file: str | Path, refusal: type[InternVLError], *, name: str | None = None, remedy: str = "download it again"
) -> io.BufferedReader:
    """Opens a regular file for reading. Raises `refusal`, as does the reading of the file later.

    name: what messages call the file; by default its path. remedy: what they ask the user to do.
    """
    name = name or str(file)
    try:
        raw = _RegularFile(file, refusal, name, remedy)
    except IsADirectoryError:
        raise refusal(f"{name} is not a regular file but a folder; {remedy}") from None
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # no name of a file has a zero byte
        link = " (it is a link to what is not there)" if os.path.islink(file) else ""
        raise refusal(f"{name} does not exist{link}; {remedy}") from error
    except OSError as error:
        raise refusal(f"{name} cannot be opened: {error.strerror}; make it readable, or {remedy}") from error
    if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        raw.close()
        raise refusal(f"{name} is not a regular file but a device, a pipe or a socket; {remedy}")
    return io.BufferedReader(raw)


def read_file(
    file: Path,
    refusal: type[InternVLError],
    *,
    max_bytes: int = MAX_FILE_BYTES,
    remedy: str = "download it again",
) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`. Raises `refusal`, which asks for the remedy."""
    with open_file(file, refusal, remedy=remedy) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes <= max_bytes:  # else it is not read at all
            content = stream.read(num_bytes + 1)
            if len(content) > num_bytes:  # the file grows, or the system does not know its size
                content += stream.read(max_bytes + 1 - len(content))
            num_bytes = len(content)
    if num_bytes > max_bytes:
        raise refusal(f"{file} has {num_bytes:,} bytes or more, expected at most {max_bytes:,}; {remedy}")
    return content
