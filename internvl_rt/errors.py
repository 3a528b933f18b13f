"""The errors that a user can cause; everything else that escapes the package is a bug.

Each message says what was wrong, what was expected, what was given and what to do, in one line. All errors that a
request can cause are `ValueError`s, so a caller may catch them as one; those of the machine are `RuntimeError`s.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

_MAX_MESSAGE, _MAX_TEXT, _MAX_VALUE = 2000, 200, 300  # characters
_MAX_ITEMS, _MAX_DEPTH, _MAX_BITS = 6, 3, 512


class InternVLError(Exception):
    """Base of every error that internvl_rt raises on purpose.

    Whatever a message quotes, it is one printable line: other characters are escaped, and the middle of a message of
    more than 2000 characters is left out.

    media_id: index, among the pictures and videos of a request, of the one that is to blame; None: no such one is.
    """

    media_id: int | None = None

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message), _MAX_MESSAGE))


class ConfigError(InternVLError, ValueError):
    """A config.json holds a missing, unknown or unsupported value."""


class CheckpointError(InternVLError, ValueError):
    """A checkpoint's files are missing, truncated, inconsistent or incomplete."""


class MediaError(InternVLError, ValueError):
    """A picture or a video cannot be read, or is larger than the limits allow."""


class RequestError(InternVLError, ValueError):
    """A request's messages or parameters are invalid, or do not fit the engine."""


class ContextLengthError(RequestError):
    """A prompt, or prompt and answer together, have more tokens than the engine or the trained window holds."""


class NotFiniteError(RequestError):
    """What the model computes for a request is NaN or infinite: its weights or its dtype do not bear the input."""


class QueueFullError(RequestError):
    """The engine has as many requests in flight as it takes; a later try may succeed."""


class StepError(InternVLError, RuntimeError):
    """A step that computed tokens of this request failed by `__cause__`: a lack of memory, a fault, an interrupt.

    It is no mistake in the request, so it is no ValueError. The engine works on, and a later try may succeed.
    """


class EngineDeadError(InternVLError, RuntimeError):
    """The thread that ran the engine's steps died of `__cause__`, or stayed behind when this process was forked.

    Or another process of the engine, such as a rank, has ended.
    """


class TranslateErrors:
    """A `with` block that raises, in place of another library's error, what `translate` makes of it.

    translate: returns the new error, whose `__cause__` will be the other one, or None to let that through. The
    package's own errors are let through anyway.
    """

    # As a generator, in Python 3.13, it would leave a cycle from the error through its frames back to the error, which
    # keeps all their variables, such as the engine, until the garbage collector runs.

    def __init__(self, translate: Callable[[BaseException], InternVLError | None]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, InternVLError):
            return
        translated = self._translate(error)
        try:
            if translated is not None:
                raise translated from error
        finally:
            del translated  # or its own frames would hold it


def forked(process_id: int) -> EngineDeadError:
    """Makes the error of a process that was forked from one that loads or has loaded a model."""
    return EngineDeadError(
        f"process {process_id} had loaded a model, or begun to, when this process was forked from it: torch's threads "
        "and the engine's own stayed behind, for a new engine too; start processes by the method 'spawn' "
        "(multiprocessing.get_context('spawn')) and load the model there"
    )


def check_list(name: str, value: object, of: str) -> None:
    """Raises RequestError unless `value` is a list or another sequence of several things.

    A text, bytes and an array are one thing each, although Python can walk through them. of: what the things are.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        given = quoted(value) if isinstance(value, str) else type(value).__name__
        raise RequestError(f"{name}: expected a list of {of}, got {given}; wrap one in a list: [...]")


def utf8(name: str, text: str) -> bytes:
    """Returns a text in UTF-8. Raises RequestError for half a surrogate pair, which no text has."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode: half a surrogate pair at character {error.start}; send the whole one"
        ) from error


def not_finite(dtype: object, remedy: str) -> str:
    """Ends a message about numbers that are NaN or infinite in a torch dtype.

    remedy: what to do where the dtype is not to blame. Only float16 has a range that models and inputs exceed.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        remedy += ", or load the model with dtype='bfloat16' or 'float32', whose range is larger"
    return f"not finite in {name} (NaN or infinity); {remedy}"


def quoted(value: object) -> str:
    """Returns any value, or its beginning, as one printable line of at most 300 characters, for a message.

    Text stands in quotes and escaped, as `repr` writes it. Of a long text or a large container no more than the
    beginning is looked at. An object is named by its type where its own `repr` fails, is long, or holds an address.
    """
    return _one_line(_shown(value, _MAX_DEPTH), _MAX_VALUE)


def _shown(value: object, depth: int) -> str:
    shown = ""
    try:
        if isinstance(value, str):
            return repr(value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}...")
        if isinstance(value, bytes | bytearray):
            return repr(value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + b"...")
        if isinstance(value, Mapping):
            pairs = (f"{_shown(key, depth - 1)}: {_shown(one, depth - 1)}" for key, one in value.items())
            return f"{{{_joined(pairs, depth)}}}"
        if isinstance(value, list | tuple | set | frozenset):
            left, right = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
            right = ",)" if left == "(" and len(value) == 1 else right
            return f"{left}{_joined((_shown(item, depth - 1) for item in value), depth)}{right}"
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # Python refuses to print very long integers
            return f"an integer of {value.bit_length():,} bits"
        shown = repr(value)
    except Exception:
        pass  # the methods of a caller's own classes may raise anything
    is_fit = shown.isprintable() and 0 < len(shown) <= _MAX_TEXT and " at 0x" not in shown
    return shown if is_fit else f"a value of type {type(value).__name__}"


def _joined(items: Iterator[str], depth: int) -> str:
    """Joins the first items of a container, which is left unread at depth 0."""
    some = list(islice(items, _MAX_ITEMS)) if depth else []
    return ", ".join([*some, "..."] if depth == 0 or next(items, None) is not None else some)


def _one_line(text: str, most: int) -> str:
    """Escapes what is not printable, and leaves out the middle of what is longer than `most` characters."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-(most // 3 - 5) :]}"
    if text.isprintable():
        return text
    return _one_line("".join(char if char.isprintable() else repr(char)[1:-1] for char in text), most)
