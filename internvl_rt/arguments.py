"""A parser whose errors are one printable line, and the types of arguments that several commands take."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from internvl_rt.errors import InternVLError, quoted
from internvl_rt.values import Flag, Integer, Kind, Number, OrNone, Several, UnfitError

DTYPES = ("float32", "bfloat16", "float16")
MAX_NUMBERS = 1000  # of one argument


class Parser(argparse.ArgumentParser):
    """An argument may have any length and hold line breaks or escape codes; the message that quotes it has neither."""

    def error(self, message: str) -> NoReturn:
        super().error(str(InternVLError(message)))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes the help as argparse does, which however would drop it without a word where the disk is full."""
        if message:
            print(message, end="", file=file or sys.stderr)


def add_device(parser: argparse.ArgumentParser) -> None:
    devices = "cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    parser.add_argument("--device", type=device_name, default="auto", help=devices)


def add_device_and_numbers(parser: argparse.ArgumentParser) -> None:
    """Adds where a model is computed, and in which numbers. `device_and_numbers` returns the engine's options."""
    add_device(parser)
    parser.add_argument(
        "--tensor-parallel-size",
        type=above_zero(int, MAX_NUMBERS),
        default=1,
        metavar="N",
        help="split the language model among N GPUs, from --device on (default: 1)",
    )
    dtypes = "float32, bfloat16 or float16 (default: by device)"
    parser.add_argument("--dtype", type=_dtype, default="auto", help=dtypes)
    parser.add_argument(
        "--quantization", choices=("fp8", "int8"), help="round the language model's weights while they are loaded"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "model", "fp8", "int8"),
        default="auto",
        help="fp8 and int8: keep keys and values in 8 bits",
    )


def device_and_numbers(args: argparse.Namespace) -> dict[str, Any]:
    names = "device", "tensor_parallel_size", "dtype", "quantization", "kv_cache_dtype"
    return {name: getattr(args, name) for name in names}


def above_zero(kind: type[int] | type[float], most: int) -> Callable[[str], Any]:
    """Returns a type of arguments: a number above 0 of that kind."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {quoted(text)}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most:,}, got {quoted(text)}")
        return value

    return number


def list_of(kind: type[int] | type[float], most: int) -> Callable[[str], list[Any]]:
    """Returns a type of arguments: numbers above 0, separated by commas."""
    one = above_zero(kind, most)

    def numbers(text: str) -> list[Any]:
        parts = text.split(",", MAX_NUMBERS)
        if len(parts) > MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"expected at most {MAX_NUMBERS} numbers, got {quoted(text)}")
        return [one(part) for part in parts]

    return numbers


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {quoted(text)}")
    return value


def add_options(group: "argparse._ArgumentGroup", options: type, kinds: Mapping[str, Kind]) -> None:
    """Adds an argument for each field of a dataclass of options, described as in its docstring.

    kinds: of its fields. An argument that is not given is left out of the result, so that the default is the class's.
    """
    about = _described(options)
    for field in fields(options):
        kind, default = kinds[field.name], field.default
        kind = kind.kind if isinstance(kind, OrNone) else kind
        more: dict[str, Any] = {"type": _text_of_kind(kind), "metavar": _metavar(field.name, kind)}
        if isinstance(kind, Flag):
            more = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, Several):
            more |= {"type": _text_of_kind(kind.kind), "action": "append"}
        shown = "" if default in (None, ()) else f" (default: {default})"
        text = f"{about[field.name].rstrip('.')}{'; may be repeated' if isinstance(kind, Several) else ''}{shown}"
        name = field.name.replace("_", "-")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **more)


def _metavar(name: str, kind: Kind) -> str:
    if isinstance(kind, Integer | Number):
        return "N" if isinstance(kind, Integer) else "X"
    return name.rpartition("_")[2].upper()


def options_of(args: argparse.Namespace, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Returns the options among the arguments that were given."""
    return {name: getattr(args, name) for name in kinds if name in args}


def _described(options: type) -> dict[str, str]:
    """Reads what a docstring says of each option: lines `name: text`, and lines further in that continue one."""
    about: dict[str, str] = {}
    for line in inspect.cleandoc(options.__doc__ or "").splitlines():
        name, colon, text = line.partition(": ")
        if colon and name.isidentifier():
            about[name] = text
        elif about and line.startswith(" "):
            about[next(reversed(about))] += f" {line.strip()}"
    return about


def _text_of_kind(kind: Kind) -> Callable[[str], Any]:
    """Returns a type of arguments: text that is a value of a kind, or a number that is, which may be a fraction."""

    def value(text: str) -> Any:
        for read in (str, int, float, _fraction):
            try:
                return kind.read(read(text))
            except (UnfitError, ValueError, ZeroDivisionError, OverflowError):
                continue
        raise argparse.ArgumentTypeError(f"expected {kind.expected}, got {quoted(text)}")

    return value


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below)


def device_name(text: str) -> str:
    """The type of an argument that names a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"device must be auto, cpu, cuda or cuda:N, got {quoted(text)}")
    return text


def _dtype(text: str) -> str:
    if text not in ("auto", *DTYPES):
        raise argparse.ArgumentTypeError(f"dtype must be auto, {', '.join(DTYPES)}, got {quoted(text)}")
    return text
