"""The process that executes a page's blocks of Python: one namespace, one event loop.

    python tests/support/doc_executor.py

Reads blocks as lines of JSON from stdin, and answers each on stdout with what it raised, or null.
"""

import ast
import asyncio
import inspect
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any

SHOWN = 3000  # characters of a traceback


def _execute_requests() -> None:
    """Executes one block after the other until stdin ends."""
    sys.path[0] = os.getcwd()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what blocks print goes to the log
    module = sys.modules["__main__"] = ModuleType("__main__")
    with asyncio.Runner() as runner:
        for request in map(json.loads, requests):
            print(json.dumps(_execute(request, vars(module), runner)), file=answers, flush=True)


def _execute(request: dict[str, Any], names: dict[str, Any], runner: asyncio.Runner) -> dict[str, Any] | None:
    """Executes a block, with the page's name and its line numbers in tracebacks; returns what it raised."""
    page, line = request["page"], request["line"]
    source = "\n" * (line - 1) + request["text"]
    try:
        code = compile(source, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(code, names))
        else:
            exec(code, names)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == page]
        if isinstance(error, SyntaxError) and error.filename == page:
            lines.append(error.lineno)
        summary, shown = traceback.format_exception_only(error)[-1], "".join(traceback.format_exception(error))
        return {"line": lines[-1] if lines else line, "what": summary + shown[-SHOWN:]}
    return None


if __name__ == "__main__":
    _execute_requests()
