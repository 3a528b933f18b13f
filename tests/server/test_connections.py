"""Bytes on a connection that no client library sends: each gets an answer in one form, or the connection ends."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from internvl_rt.server.options import ServerOptions
from support.serving import Running, question, running, scripted

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, max_connections=20)) as made:
        yield made


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def post(body: bytes, *lines: str) -> bytes:
    head = "\r\n".join((f"POST {CHAT} HTTP/1.1", "host: x", f"content-length: {len(body)}", *lines, "\r\n"))
    return head.encode() + body


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(1 << 16):
        data += part
    return data


def exchange(server: Running, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body of the answer to bytes on a connection that the server then closes."""
    with connect(server) as client:
        client.sendall(data)
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value for name, value in pairs}, body


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        post(b"{}", "content-length: 3"),
        post(b"{}", "transfer-encoding: chunked"),
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}zz".encode(),
    ],
    ids=["TLS", "path", "CONNECT", "no path", "HTTP/2", "two lengths", "length and chunks", "chunk"],
)
def test_what_is_no_http_request_gets_an_error_object_and_no_line_of_the_log(
    server: Running, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    num_lines = len(server.log.getvalue())
    status, headers, body = exchange(server, data)
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert len(server.log.getvalue()) == num_lines
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("second", [b"no HTTP\r\n\r\n", post(b"{}") + b"no HTTP\r\n\r\n"], ids=["nothing", "one more"])
def test_no_second_answer_is_written_into_a_stream(server: Running, second: bytes) -> None:
    body = json.dumps({"messages": question(), "stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()
    with connect(server) as client:
        client.sendall(post(body))
        data = client.recv(4096)
        client.sendall(second)
        with suppress(ConnectionError):
            while part := client.recv(1 << 16):
                data += part
    assert data.startswith(b"HTTP/1.1 200")
    assert data.count(b"HTTP/1.1") == 1
    server.wait_until_idle()


def test_leaving_ends_a_request_that_others_wait_behind(server: Running) -> None:
    body = json.dumps({"messages": question(), "max_tokens": 8000, "ignore_eos": True}).encode()
    cancelled = server.service.engine.stats()["requests_cancelled"]
    with connect(server) as client:
        client.sendall(post(body) * 3)
        limit_s = time.perf_counter() + 20
        while not server.service.engine.stats()["kv_blocks_used"]:
            assert time.perf_counter() < limit_s
    server.wait_until_idle()
    assert server.service.engine.stats()["requests_cancelled"] == cancelled + 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_offers_another_protocol_is_answered_in_this_one(server: Running, chunked: bool) -> None:
    """Java's client offers HTTP/2 with its first request, body included."""
    body = json.dumps({"messages": question(), "max_tokens": 8}).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    if chunked:
        head = "\r\n".join((f"POST {CHAT} HTTP/1.1", "host: x", *offer, "transfer-encoding: chunked", "\r\n"))
        data = head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        data = post(body, *offer)
    with connect(server) as client:
        client.sendall(data[:200])
        time.sleep(0.05)
        client.sendall(data[200:] + post(body, "connection: close"))  # and a second one on the same connection
        answers = read_all(client)
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.count(b'"content":"4719"') == 2


def test_a_head_counts_without_the_body_before_it(server: Running) -> None:
    body = json.dumps({"messages": question(), "max_tokens": 8}).encode()
    data = post(body + b" " * 60_000) + post(body, f"x-a: {'b' * 8000}", "connection: close")
    with connect(server) as client:
        client.sendall(data[:-2000])
        time.sleep(0.1)
        client.sendall(data[-2000:])
        answers = read_all(client)
    assert answers.count(b"HTTP/1.1 200") == 2


def test_a_head_that_is_too_long_is_told_so(server: Running) -> None:
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        for _ in range(7):
            time.sleep(0.02)
            client.sendall(b"x-a: " + b"b" * 9990 + b"\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"


def test_a_websocket_is_refused_as_a_plain_request(server: Running) -> None:
    offer = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13"
    with connect(server) as client:
        client.sendall(f"GET {CHAT} HTTP/1.1\r\nhost: x\r\n{offer}\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 405")


def test_no_redirect_leads_to_a_host_that_a_request_names(server: Running) -> None:
    status, headers, body = exchange(server, b"GET /health/ HTTP/1.1\r\nhost: evil\r\nconnection: close\r\n\r\n")
    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
    assert "location" not in headers


def test_the_server_ends_in_time_beside_a_client_that_reads_nothing() -> None:
    body = json.dumps({"messages": question(), "stream": True}).encode()
    options = ServerOptions(port=0, drain_s=0.3, stall_timeout_s=60)
    with (
        running(options) as server,
        scripted(server, "x" * 50_000_000, piece_len=100_000),
        connect(server) as client,
    ):
        client.sendall(post(body))
        limit_s = time.perf_counter() + 20
        while not server.service.calls:
            assert time.perf_counter() < limit_s
        time.sleep(0.3)
        start_s = time.perf_counter()
        server.stop()
        assert time.perf_counter() - start_s < 8
    assert not [line for line in map(json.loads, server.log.getvalue().splitlines()) if line["level"] == "error"]
