"""Reads the blocks of a page, and runs them as a reader would: Python in one process, commands in bash, and servers."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from support.doc_folder import make_folder

ROOT = Path(__file__).parents[2]
EXECUTOR = Path(__file__).parent / "doc_executor.py"
LIMIT_S = 300  # of one block or command
SHOWN = 3000  # characters of an output that failed
QUESTION = "What is the total?\n"  # is on the stdin of each command: a conversation reads it, and then ends
REPLACED = {  # in commands and in Python
    r"\brandom:InternVL3-\w+": "tiny",  # the real shapes take minutes on two cores
    r"(?<![\w.])/tmp/": "./",  # two runs on one machine must not meet there
}
_FENCE = re.compile(r"( *)(`{3,}|~{3,})([^`]*)")
_ENVIRONMENT = re.compile(r"^<!-- ([A-Z_]+)=(\S+) -->$", re.MULTILINE)  # a page says so where its blocks need it
_INCLUDED = re.compile(r" *<!-- ([\w./-]+\.\w+) -->")


class PageFault(Exception):
    """Says what is wrong with a page, and at which of its lines."""

    def __init__(self, page: Path, line: int, what: str) -> None:
        name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
        super().__init__(f"{name}:{line}: {what}")


@dataclass(frozen=True)
class Block:
    """A block of a page, or a command in one.

    line: the page's line at which the text begins.
    included: the file that a comment in front of the block names.
    """

    page: Path
    line: int
    tag: str
    text: str
    included: str | None = None

    def fault(self, what: str) -> PageFault:
        return PageFault(self.page, self.line, what)


def read_blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page in order. Raises PageFault if one has no end."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, first = list[Block](), 0
    while first < len(lines):
        opened = _FENCE.fullmatch(lines[first])
        first += 1
        if not opened:
            continue
        indent, ticks, tag = opened.groups()
        closing = re.compile(rf" *{ticks}{ticks[0]}* *")
        last = next((number for number in range(first, len(lines)) if closing.fullmatch(lines[number])), None)
        if last is None:
            raise PageFault(page, first, "the block that begins here has no end")
        text = "\n".join(line.removeprefix(indent) for line in lines[first:last])
        included = _INCLUDED.fullmatch(lines[first - 2]) if first > 1 else None
        blocks.append(Block(page, first + 1, tag.strip(), text, included[1] if included else None))
        first = last + 1
    return blocks


def split_commands(block: Block) -> list[Block]:
    """Returns the commands of a block, each with all of its lines. Raises PageFault if the last one is not complete."""
    commands, pending = list[Block](), list[str]()
    for number, line in enumerate(block.text.splitlines(), block.line):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending.append(line)
        if _is_complete("\n".join(pending)):
            first = number + 1 - len(pending)
            commands.append(Block(block.page, first, block.tag, "\n".join(pending)))
            pending.clear()
    if pending:
        raise PageFault(block.page, block.line, f"the last command of this block has no end: {pending[0]}")
    return commands


def _is_complete(text: str) -> bool:
    """Returns whether bash waits for no further line after a text. It does not run the text."""
    command = ["bash", "-n", "-c", text]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    return not text.endswith("\\") and not re.search("end.of.file|EOF", checked.stderr)


def run_command(command: Block, text: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Runs a text in place of a command; returns what it printed. Raises PageFault if it fails or takes too long."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text],
        stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(QUESTION, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise command.fault(f"took more than {LIMIT_S} s: {text}") from None
    if process.returncode:
        raise command.fault(f"exit code {process.returncode}: {text}\n{output[-SHOWN:]}")
    return output


class ServerProcess:
    """A server that a page starts, in a process of its own."""

    def __init__(self, command: Block, text: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._command, self._log, self._has_failed = command, folder / "server.log", False
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec env {text}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env=environment,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Waits until it is ready. Raises PageFault if it ends, or does not become ready in time."""
        until_s = time.monotonic() + LIMIT_S
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > until_s:
                self._has_failed = True
                raise self._command.fault(f"does not serve: {self._command.text}\n{self.log[-SHOWN:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """Ends it as a service manager does. Raises PageFault if the exit code is not 0, unless it never was ready."""
        self._process.terminate()
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self._process.kill()
            self._process.wait()
        if code != 0 and not self._has_failed:
            raise self._command.fault(f"exit code {code} after SIGTERM: {self._command.text}\n{self.log[-SHOWN:]}")


class Interpreter:
    """A process that executes blocks of Python, one after the other in one namespace."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._log, self._has_failed = folder / "python.log", False
        pipe = subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, EXECUTOR], stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=folder, env=environment
            )

    def run(self, block: Block) -> None:
        """Executes a block. Raises PageFault, with the line that raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise block.fault("an earlier block has ended the interpreter")
        request = {"page": str(block.page), "line": block.line, "text": block.text}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = ""
        if select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            answer = self._process.stdout.readline()
        if not answer:
            self._has_failed = True
            self._process.kill()
            code, output = self._process.wait(), self._log.read_text(encoding="utf-8")
            raise block.fault(f"no end within {LIMIT_S} s, or of the interpreter ({code})\n{output[-SHOWN:]}")
        if fault := json.loads(answer):
            raise PageFault(block.page, fault["line"], fault["what"])

    def end(self) -> int:
        """Ends the interpreter as the end of a script does; returns its exit code, or 0 if a fault has told it."""
        assert self._process.stdout is not None
        try:
            self._process.communicate(timeout=60)
        finally:
            self._process.kill()
            code = self._process.wait()
        return 0 if self._has_failed else code


@dataclass(frozen=True)
class Rule:
    """What is done with a command that begins with a pattern, and why, if it does not run as it stands."""

    pattern: str
    run: Callable[["PageRun", Block], None]
    reason: str = ""
    is_slow: bool = False


class PageRun:
    """A reader who goes through a page, in a folder with files to ask about and with what was downloaded before."""

    def __init__(self, page: Path, folder: Path, rules: tuple[Rule, ...]) -> None:
        """rules: of commands, of which the first that fits is taken; the last one must fit all."""
        self.replaced = dict(REPLACED)
        self._page, self._folder, self._rules = page, folder, rules
        self._interpreter: Interpreter | None = None
        self._server: ServerProcess | None = None
        text = page.read_text(encoding="utf-8")
        make_folder(folder, set(re.findall(r"OpenGVLab/(\w[\w.-]*\w)", text)))
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        hub = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        asked = dict(_ENVIRONMENT.findall(text))
        self._environment = {**inherited, **hub, **asked, "PATH": path, "CURL_HOME": str(folder), "no_proxy": "*"}

    def go_through(self, *, with_slow: bool = False) -> list[str]:
        """Runs the blocks in order, with or without the commands that take long. Returns what is wrong."""
        faults = list[str]()
        try:
            for part in self._parts(faults):
                if with_slow or part.tag == "python" or not self._rule(part).is_slow:
                    faults += attempt(self._run, replace(part, text=self._replace(part.text)))
        finally:
            faults += attempt(self.end_server)
            if self._interpreter and (code := self._interpreter.end()):
                faults.append(f"{self._page.name}: Python ends with exit code {code}")
        return faults

    def _parts(self, faults: list[str]) -> Iterator[Block]:
        """Yields the blocks of Python and the commands."""
        for block in read_blocks(self._page):
            if block.tag == "python" and not block.included:
                yield block
            elif block.tag == "sh":
                try:
                    yield from split_commands(block)
                except PageFault as fault:
                    faults.append(str(fault))

    def _run(self, part: Block) -> None:
        if part.tag == "sh":
            self._rule(part).run(self, part)
            return
        if name := re.match(r"# ([\w-]+\.py)\n", part.text):
            (self._folder / name[1]).write_text(part.text + "\n", encoding="utf-8")
        self._interpreter = self._interpreter or Interpreter(self._folder, self._environment)
        self._interpreter.run(part)

    def _rule(self, command: Block) -> Rule:
        return next(rule for rule in self._rules if re.match(rule.pattern, command.text))

    def _replace(self, text: str) -> str:
        for pattern, new in self.replaced.items():
            text = re.sub(pattern, new, text)
        return text

    def shell(self, command: Block, text: str) -> str:
        """Runs a text in place of a command, in which curl fails at an error's status; returns what it prints."""
        environment = dict(self._environment)
        if re.search(r" (--fail|-\w*f)\b", text):
            del environment["CURL_HOME"]  # curl takes one such option alone
        return run_command(command, text, self._folder, environment)

    def serve(self, command: Block, text: str) -> ServerProcess:
        """Starts a server, which ends before the next one starts, or at the end of the page."""
        self.end_server()
        self._server = ServerProcess(command, text, self._folder, self._environment)
        return self._server

    def end_server(self) -> None:
        server, self._server = self._server, None
        if server:
            server.end()


def attempt(step: Callable[..., None], *arguments: Block) -> list[str]:
    try:
        step(*arguments)
    except PageFault as fault:
        return [str(fault)]
    return []
