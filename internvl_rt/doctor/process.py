"""Runs checks in a process of their own, so that a check that dies or hangs disturbs no other."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from select import select
from typing import IO

from internvl_rt.doctor.finding import Finding, one_line

# The checks get this process's path, so that they import what it would, and nothing from the current folder.
SERVE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from internvl_rt.doctor.checks import serve
serve()
"""
TIMEOUT_S = 180  # for one check; a check that builds several kernels takes half a minute
MAX_LOST = 3  # after this many processes that died or hung, no more checks are run


class CheckProcess:
    """Runs one check after another in one process, and in a new one after each that failed.

    What a failed check leaves behind, such as a device that refuses everything after an error, then harms no other.
    """

    def __init__(self, command: Sequence[str] | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """command: starts a process that answers as `checks.serve` does."""
        self._command = command or (sys.executable, "-P", "-c", SERVE, json.dumps(sys.path))
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None  # what the process wrote to stderr
        self._num_lost = 0

    def ask(self, name: str) -> Finding:
        if self._num_lost == MAX_LOST:
            return Finding("not checked", f"{MAX_LOST} checks before this one died or hung")
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # the process has died, and its stdout is at the end
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        if not select([process.stdout], [], [], self._timeout_s)[0]:
            return self._lose(f"did not end within {self._timeout_s:g} s")
        line = process.stdout.readline()
        if not line:
            process.wait()
            return self._lose(f"ended its process with {_ending(process.returncode)}")
        finding = Finding(**json.loads(line))
        if finding.status == "failed":
            self.close()
        return finding

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        return self._process

    def _lose(self, how: str) -> Finding:
        self._num_lost += 1
        assert self._errors is not None
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        self.close()
        last = f", saying last: {one_line(said[-1])}" if said else ""
        return Finding("failed", f"{how}{last}; report this")

    def close(self) -> None:
        """Kills the process. One that waits for its device in the kernel is left to end later."""
        if self._process is None or self._errors is None:
            return
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)  # closes its pipes
        self._errors.close()
        self._process = self._errors = None


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
