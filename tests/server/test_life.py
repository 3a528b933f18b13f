"""The server as a program: its start, its signals, what it says when it cannot start, and an engine that dies."""

import gc
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from internvl_rt.cli import main
from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.server.app import build_app
from internvl_rt.server.keys import Keys
from internvl_rt.server.life import Server, bind
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.service import Service
from support.serving import KEY, Running, question, running

CHAT = "/v1/chat/completions"
LONG = {"messages": question(), "max_tokens": 30_000, "ignore_eos": True}


class Program:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, list[dict[str, Any]]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        url = self.wait_for("listening")["url"]
        self.host, self.port = url.removeprefix("http://").split(":")

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(json.loads(line))

    def wait_for(self, event: str, limit_s: float = 60) -> dict[str, Any]:
        until_s = time.perf_counter() + limit_s
        while time.perf_counter() < until_s:
            for line in list(self.lines):
                if line["event"] == event:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no {event!r} in {self.lines}")

    def request(self, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=60)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def answer(self, body: object, **headers: str) -> Any:
        return json.loads(self.request("POST", CHAT, body, **headers).read())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def program(*arguments: str) -> Iterator[Program]:
    command = [sys.executable, "-m", "internvl_rt", "serve", "tiny", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield Program(process)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_it_serves_and_ends_at_a_signal() -> None:
    with program("--default-max-tokens", "8") as server:
        answer = server.answer({"model": "tiny", "messages": question()})
        assert answer["choices"][0]["message"]["content"] == "4719"
        assert server.end(signal.SIGINT) == 130
        events = [line["event"] for line in server.lines]
        assert events == ["listening", "stopping"]


def test_a_signal_lets_streams_finish_and_refuses_new_work() -> None:
    with program("--drain-s", "30") as server:
        stream = server.request("POST", CHAT, {**LONG, "max_tokens": 300, "stream": True})
        first = stream.readline()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        refused = server.request("POST", CHAT, {"messages": question()})
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5"
        assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        assert server.request("GET", "/ready").status == 503
        assert server.request("GET", "/health").status == 200
        rest = first + stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b'"finish_reason":"length"') == 1
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_what_is_not_done_in_time_ends_with_an_error() -> None:
    with program("--drain-s", "0.3") as server:
        stream = server.request("POST", CHAT, {**LONG, "stream": True})
        stream.readline()
        whole: list[http.client.HTTPResponse] = []
        waiting = threading.Thread(target=lambda: whole.append(server.request("POST", CHAT, LONG)))
        waiting.start()
        time.sleep(0.3)
        assert server.end() == 0
        assert b'"code":"shutting_down"' in stream.read()
        waiting.join(10)
        assert whole[0].status == 503


@pytest.mark.slow
def test_a_second_signal_ends_at_once() -> None:
    with program("--drain-s", "600") as server:
        stream = server.request("POST", CHAT, {**LONG, "stream": True})
        stream.readline()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        start_s = time.perf_counter()
        assert server.end() == 0
        assert time.perf_counter() - start_s < 10


def test_options_reach_server_and_engine(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    trace = tmp_path / "trace.json"
    arguments = [
        "--api-keys-file",
        str(keys),
        "--served-model-name",
        "a/b",
        "--max-model-len",
        "512",
        "--no-page",
        "--access-log",
    ]
    with program(*arguments, "--no-prefix-cache", "--trace", str(trace), "--host", "127.0.0.1") as server:
        key = {"authorization": f"Bearer {KEY}"}
        model = json.loads(server.request("GET", "/v1/models", **key).read())["data"][0]
        assert (model["id"], model["max_model_len"]) == ("a/b", 512)
        assert server.request("GET", "/").status == 404
        server.answer({"messages": question(), "max_tokens": 4}, **key, **{"x-request-id": "traced"})
        assert server.wait_for("request")["request_id"].startswith("req-")
        assert server.end() == 0
    assert '"request_id": "traced"' in trace.read_text()
    assert KEY not in json.dumps(server.lines)


@pytest.mark.slow
def test_a_server_for_others_without_keys_is_warned_about() -> None:
    with program("--host", "0.0.0.0") as server:
        assert server.wait_for("open to others")["level"] == "warning"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "no/such/folder"], "no/such/folder"),
        (["serve", "tiny", "--port", "99999"], "port"),
        (["serve", "tiny", "--max-n", "0"], "max-n"),
        (["serve", "tiny", "--max-tiles", "many"], "max-tiles"),
        (["serve", "tiny", "--hots", "x"], "--hots"),
        (["serve", "tiny", "--allowed-origins", "chat.example"], "allowed_origins"),
        (["serve", "tiny", "--api-keys-file", "/no/such/file"], "api_keys_file"),
        (["serve", "tiny", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["serve"], "MODEL"),
    ],
)
def test_a_wrong_start_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "tiny", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_help_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ServerOptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    for name in ("--max-num-seqs", "--kv-cache-bytes", "--max-pixels", "--v2pe-delta", "--no-prefix-cache"):
        assert name in text
    assert "(default: 8000)" in text


def test_health_fails_and_streams_end_when_the_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        loop = server.service.core.loop

        def die(*_: object) -> bool:
            raise SystemExit("the driver is gone")

        parts: list[bytes] = []
        with server.http.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            chunks = answer.iter_raw()
            parts.append(next(chunks))
            monkeypatch.setattr(loop, "step", die)
            parts += chunks
        assert b'"code":"engine_dead"' in b"".join(parts)
        for path in ("/health", "/ready"):
            found = server.http.get(path)
            assert (found.status_code, found.json()["error"]["code"]) == (503, "engine_dead")
        refused = server.post(CHAT, {"messages": question()})
        assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "false")


def test_a_server_whose_engine_has_died_exits_with_an_error() -> None:
    core, options = Engine.from_pretrained("tiny"), ServerOptions(port=0, drain_s=0.5)
    service = Service(core, AsyncEngine(core), ("tiny",), options, Keys(()), Log(io.StringIO()))
    server = Server(build_app(service), service, bind("127.0.0.1", 0))
    core.loop.fail_worker(RuntimeError("the driver is gone"))
    start_s = time.perf_counter()
    assert server.serve_until_stopped() == 1
    assert 0.4 < time.perf_counter() - start_s < 20
    assert b'internvl_rt:engine_alive{model_name="tiny"} 0.0' in service.metrics.render()


def test_a_mistake_of_ours_is_told_and_logged_and_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:

        def broken(*_: object, **__: object) -> None:
            raise KeyError("a detail")

        monkeypatch.setattr(server.service, "answered", broken)
        refused = server.post(CHAT, {"messages": question(), "max_tokens": 2}, headers={"x-request-id": "bad-1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "internal_error")
        assert "a detail" not in refused.text
        monkeypatch.undo()
        (line,) = server.lines("request failed")
        assert (line["request_id"], line["level"]) == ("bad-1", "error")
        assert "KeyError" in line["traceback"]
        assert server.post(CHAT, {"messages": question(), "max_tokens": 2}).status_code == 200


def test_a_model_that_computes_no_numbers_is_no_fault_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        logits = server.service.core.model.logits
        monkeypatch.setattr(server.service.core.model, "logits", lambda *given: logits(*given) * float("nan"))
        refused = server.post(CHAT, {"messages": question()})
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "not_finite")
        assert refused.headers["x-should-retry"] == "false"
        assert len(server.lines("request failed")) == 1
        monkeypatch.undo()
        assert server.post(CHAT, {"messages": question(), "max_tokens": 2}).status_code == 200


def test_clients_do_not_try_again_what_would_fail_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        calls: list[object] = []

        def broken(*given: object) -> None:
            calls.append(given)
            raise KeyError("a detail")

        monkeypatch.setattr(server.service, "answered", broken)
        with pytest.raises(openai.InternalServerError):
            server.client(max_retries=3).chat.completions.create(model="tiny", messages=question(), max_tokens=2)
        assert len(calls) == 1


def test_nothing_is_left_after_a_server_has_ended() -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with running():
        pass
    num_threads, num_files = count()
    for _ in range(3):
        with running() as server:
            assert isinstance(server, Running)
            server.post(CHAT, {"messages": question(), "max_tokens": 2})
    left = count()
    assert left[0] == num_threads
    assert left[1] <= num_files
