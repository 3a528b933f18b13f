"""Pictures are fetched from listed hosts alone, from the address that was checked, within limits of bytes and time."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from internvl_rt.server.fault import ApiError
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.remote import Fetcher, is_public
from support.serving import SAMPLES, question, running

PICTURE = (SAMPLES / "4719.png").read_bytes()


class Site(BaseHTTPRequestHandler):
    """A web site of pictures and traps."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["host"]))
        path = self.path.partition("?")[0]
        redirects = {
            "/to-picture": "/picture.png",
            "/loop": "/loop",
            "/away": "http://elsewhere.test/picture.png",
            "/to-file": "file:///etc/passwd",
            "/to-meta": "http://169.254.169.254/latest",
        }
        if path in redirects:
            self.send_response(302)
            self.send_header("location", redirects[path])
            self.send_header("content-length", "0")
            self.end_headers()
        elif path == "/picture.png":
            self.send_response(200)
            self.send_header("content-length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)
        elif path == "/unsized":
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(PICTURE)
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(PICTURE), PICTURE))
        elif path == "/cut":
            self.send_response(200)
            self.send_header("content-length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE[:100])
            self.close_connection = True
        elif path in ("/endless", "/slow"):
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (1 if path == "/slow" else 65536))
                    if path == "/slow":
                        time.sleep(0.05)
            except OSError:
                pass
        else:
            self.send_response(404)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"secret")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    site.daemon_threads = True
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield int(site.server_port)
    site.shutdown()


def fetcher(port: int, *, is_allowed: Callable[[str], bool] = lambda _: True, max_s: float = 5.0) -> Fetcher:
    async def resolve(host: str, _: int) -> list[str]:
        return {"pictures.test": ["127.0.0.1"], "both.test": ["127.0.0.1", "10.0.0.1"]}.get(host, [])

    return Fetcher(
        [f"pictures.test:{port}", f"both.test:{port}", "plain.test"],
        100_000,
        max_s,
        resolve=resolve,
        is_allowed=is_allowed,
    )


def fetch(made: Fetcher, url: str) -> bytes:
    return asyncio.run(made.fetch(url, "here"))


def refused(made: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(made, url)
    assert caught.value.status == 400
    assert caught.value.param == "here"
    assert "127.0.0.1" not in caught.value.message
    assert "secret" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("path", ["/picture.png", "/to-picture", "/unsized", "/chunked", "/picture.png?size=1&x=%20"])
def test_a_picture_of_a_listed_host_is_fetched(port: int, path: str) -> None:
    Site.asked.clear()
    assert fetch(fetcher(port), f"http://pictures.test:{port}{path}") == PICTURE
    assert Site.asked[-1][1] == f"pictures.test:{port}", "the host is named, not the address"


@pytest.mark.parametrize(
    "url",
    [
        "http://elsewhere.test/a.png",
        "http://pictures.test/a.png",
        "http://pictures.test:1/a.png",
        "ftp://plain.test/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "http://plain.test@evil.test/",
        "http://user:key@plain.test/",
        "http://evil.test\\@plain.test/",
        "http://plain.test\\.evil.test/",
        "http://plain.test /",
        "http://plain.test\n/",
        "http://pla\u0131n.test/",
        "http:///a",
        "http://",
        "http://sub.plain.test/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://2130706433/",
        "x" * 10_000,
        "gopher://plain.test/",
        "http://plain.test:x/",
    ],
)
def test_what_is_not_listed_or_may_be_read_in_two_ways_is_not_fetched(port: int, url: str) -> None:
    Site.asked.clear()
    assert refused(fetcher(port), url).code in ("media_not_allowed", "media_not_fetched")
    assert Site.asked == []


def test_nothing_is_fetched_without_a_list() -> None:
    assert refused(Fetcher([], 1000, 1), "https://example.com/a.png").code == "media_not_allowed"


@pytest.mark.parametrize("path", ["/loop", "/away", "/to-file", "/to-meta", "/missing", "/cut", "/endless"])
def test_redirects_and_answers_are_checked(port: int, path: str) -> None:
    start_s = time.perf_counter()
    refused(fetcher(port), f"http://pictures.test:{port}{path}")
    assert time.perf_counter() - start_s < 4


def test_a_slow_host_is_given_up(port: int) -> None:
    start_s = time.perf_counter()
    assert "took more than" in refused(fetcher(port, max_s=0.3), f"http://pictures.test:{port}/slow").message
    assert time.perf_counter() - start_s < 2


def test_every_address_of_a_host_must_be_public(port: int) -> None:
    Site.asked.clear()
    refused(fetcher(port, is_allowed=lambda address: address == "127.0.0.1"), f"http://both.test:{port}/picture.png")
    refused(fetcher(port, is_allowed=is_public), f"http://pictures.test:{port}/picture.png")
    refused(fetcher(port), "http://plain.test/no-address")
    assert Site.asked == []


def test_a_host_is_resolved_once_for_a_request(port: int) -> None:
    """A second answer of the name server cannot lead elsewhere."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    checked: list[str] = []

    async def resolve(*_: object) -> list[str]:
        return next(answers)

    def is_allowed(address: str) -> bool:
        checked.append(address)
        return True

    made = Fetcher([f"pictures.test:{port}"], 100_000, 5, resolve=resolve, is_allowed=is_allowed)
    assert fetch(made, f"http://pictures.test:{port}/picture.png") == PICTURE
    assert checked == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses_are_told_from_private_ones(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_fetched_picture_is_read_as_one_that_was_sent(port: int) -> None:
    with running(ServerOptions(port=0, default_max_tokens=8), fetcher=fetcher(port)) as server:
        answer = server.client().chat.completions.create(
            model="tiny", messages=question("Read the digits.", f"http://pictures.test:{port}/picture.png")
        )
        assert answer.choices[0].message.content == "4719"
        bad = server.post("/v1/chat/completions", {"messages": question("x", f"http://pictures.test:{port}/missing")})
        error = bad.json()["error"]
        assert (bad.status_code, error["code"], error["param"]) == (
            400,
            "media_not_fetched",
            "messages[0].content[0].image_url",
        )
