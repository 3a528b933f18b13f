"""A parser whose errors are one printable line, and the types of arguments that several commands take."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from internvl_rt.errors import InternVLError, quoted

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


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    devices = "cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    parser.add_argument("--device", type=_device, default="auto", help=devices)
    dtypes = "float32, bfloat16 or float16 (default: by device)"
    parser.add_argument("--dtype", type=_dtype, default="auto", help=dtypes)


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


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"device must be auto, cpu, cuda or cuda:N, got {quoted(text)}")
    return text


def _dtype(text: str) -> str:
    if text not in ("auto", *DTYPES):
        raise argparse.ArgumentTypeError(f"dtype must be auto, {', '.join(DTYPES)}, got {quoted(text)}")
    return text
