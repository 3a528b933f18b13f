"""Opens and reads files of a checkpoint: only regular ones, whose size is checked before a byte is taken.

A folder may come from anybody: a link to /dev/zero has no end, and the opening of a named pipe waits for ever.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from internvl_rt.errors import InternVLError

MAX_FILE_BYTES = 1 << 24  # of JSON and other small files; the largest real ones are a few MB
MAX_TOKENIZER_BYTES = 1 << 26  # of tokenizer.json, of which real ones have 11 MB


def open_file(file: Path, refusal: type[InternVLError]) -> BufferedReader:
    """Opens a regular file for reading. Raises `refusal`."""
    try:
        # without O_NONBLOCK the opening of a named pipe waits for a writer
        stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except IsADirectoryError:
        raise refusal(f"{file} is a folder, expected a file; download it again") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        link = " (it is a link to what is not there)" if file.is_symlink() else ""
        raise refusal(f"{file}: no such file{link}; download it again") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise refusal(f"{file} cannot be opened: {reason}; make it readable, or download it again") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise refusal(f"{file} is no regular file but a device, a pipe or a socket; download it again")
    return stream


def read_file(file: Path, refusal: type[InternVLError], *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`. Raises `refusal`."""
    with open_file(file, refusal) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes <= max_bytes:  # else it is not read at all
            try:
                content = stream.read(num_bytes + 1)
                if len(content) > num_bytes:  # the file grows, or the system does not know its size
                    content += stream.read(max_bytes + 1 - len(content))
            except OSError as error:
                raise refusal(f"{file} cannot be read: {error.strerror}; download it again") from error
            num_bytes = len(content)
    if num_bytes > max_bytes:
        raise refusal(f"{file} has {num_bytes:,} bytes or more, expected at most {max_bytes:,}; download it again")
    return content
