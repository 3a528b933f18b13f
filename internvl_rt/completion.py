"""`internvl-rt completion SHELL` prints what makes a shell complete the commands, options and files."""

import argparse
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from internvl_rt.arguments import Parser
from internvl_rt.errors import RequestError

SHELLS = ("bash", "fish", "zsh")
_FILES = ("FILE", "PATH", "MODEL")  # metavars
_FOLDERS = ("FOLDER",)


def script(shell: str, build_parser: Callable[[list[Parser]], argparse.ArgumentParser]) -> str:
    """Returns a script for one of SHELLS. Raises RequestError where the library that writes it is not installed.

    build_parser: makes the parser of all commands, from the parser that `serve` has of its own.
    """
    if find_spec("shtab") is None:
        raise RequestError("completion needs shtab, which is not installed; pip install 'internvl-rt[completion]'")
    import shtab

    from internvl_rt.server.arguments import build_parser as build_serve_parser

    parser = build_parser([build_serve_parser("a folder or a hub id")])
    for action in _actions(parser):
        kind = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY if action.metavar in _FOLDERS else None
        if kind is not None:
            action.complete = kind  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell=shell)
    return text


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices: dict[str, Any] = action.choices
            for command in choices.values():
                yield from _actions(command)
        else:
            yield action
