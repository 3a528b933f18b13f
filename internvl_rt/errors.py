"""The errors that a user can cause; everything else that escapes the package is a bug.

Each message says what was wrong, what was expected, what was given and what to do, in one line. All errors that a
request can cause are `ValueError`s, so a caller may catch them as one.
"""

from collections.abc import Sequence


class InternVLError(Exception):
    """Base of every error that internvl_rt raises on purpose."""


class ConfigError(InternVLError, ValueError):
    """A config.json holds a missing, unknown or unsupported value."""


class CheckpointError(InternVLError, ValueError):
    """A checkpoint's files are missing, truncated, inconsistent or incomplete."""


class MediaError(InternVLError, ValueError):
    """A picture or a video cannot be read, or is larger than the limits allow."""


class RequestError(InternVLError, ValueError):
    """A request's messages or parameters are invalid, or do not fit the engine."""


class QueueFullError(RequestError):
    """The engine has as many requests in flight as it takes; a later try may succeed."""


class EngineDeadError(InternVLError, RuntimeError):
    """The thread that ran the engine's steps has died; `__cause__` is the error that ended it."""


def quoted(text: str) -> str:
    """Returns `text`, or its beginning, as one printable line of about 200 characters, for a message."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def check_list(name: str, value: object, of: str) -> None:
    """Raises RequestError unless `value` is a list or another sequence of several things.

    A text, bytes and an array are one thing each, although Python can walk through them. of: what the things are.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        given = quoted(value) if isinstance(value, str) else type(value).__name__
        raise RequestError(f"{name}: expected a list of {of}, got {given}; wrap one in a list: [...]")


def not_finite(dtype: object, remedy: str) -> str:
    """Ends a message about numbers that are NaN or infinite in a torch dtype.

    remedy: what to do where the dtype is not to blame. Only float16 has a range that models and inputs exceed.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        remedy += ", or load the model with dtype='bfloat16' or 'float32', whose range is larger"
    return f"not finite in {name} (NaN or infinity); {remedy}"
