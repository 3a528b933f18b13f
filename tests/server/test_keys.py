"""Who may ask: API keys, what they keep apart, and web pages."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from internvl_rt.errors import RequestError
from internvl_rt.server.keys import Keys, read_keys
from internvl_rt.server.options import ServerOptions
from support.serving import KEY, Running, question, running

CHAT = "/v1/chat/completions"
OTHER = "another-key-of-the-tests"


@pytest.fixture(scope="module")
def closed() -> Iterator[Running]:
    """A server that needs keys, for a web page of another host too."""
    options = ServerOptions(port=0, allowed_origins=("https://chat.example",), default_max_tokens=8)
    with running(options, keys=(KEY, OTHER)) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def test_every_path_but_health_and_the_page_needs_a_key(closed: Running) -> None:
    for method, path in (
        ("POST", CHAT),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/version"),
    ):
        for headers in (
            {},
            {"authorization": "Bearer wrong-key-of-nobody"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            answer = closed.http.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert closed.http.get(path).status_code == 200
    assert (
        closed.client(KEY).chat.completions.create(model="tiny", messages=question()).choices[0].message.content
        == "4719"
    )
    with pytest.raises(openai.AuthenticationError):
        closed.client("wrong-key-of-nobody").models.list()


def test_a_wrong_key_is_refused_before_the_body_is_read(closed: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(closed.url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


def test_keys_do_not_share_prefixes_and_one_key_does(closed: Running) -> None:
    text = "Read all of the digits. " * 30

    def cached(key: str, **more: Any) -> int:
        usage = closed.client(key).chat.completions.create(model="tiny", messages=question(text), **more).usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER) == 0, "another key's"
    assert cached(OTHER) > 0
    assert cached(KEY, extra_body={"cache_salt": "mine"}) == 0
    assert cached(KEY, extra_body={"cache_salt": "mine"}) > 0


def test_shared_prefixes_are_shared_if_asked_for() -> None:
    text = "Read all of the digits. " * 30
    with running(ServerOptions(port=0, shared_prefixes=True, default_max_tokens=8), keys=(KEY, OTHER)) as server:
        for key, is_first in ((KEY, True), (OTHER, False)):
            usage = server.client(key).chat.completions.create(model="tiny", messages=question(text)).usage
            assert (usage.prompt_tokens_details.cached_tokens == 0) == is_first


def test_a_preflight_of_an_allowed_page_passes_without_a_key(closed: Running) -> None:
    ask = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-request-id",
    }
    answer = closed.http.options(CHAT, headers=ask)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    headers = {"origin": "https://chat.example", "authorization": f"Bearer {KEY}"}
    answer = closed.http.post(CHAT, json={"messages": question()}, headers=headers)
    assert answer.status_code == 200
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert closed.http.options(CHAT, headers={**ask, "origin": "https://evil.example"}).status_code == 400


def test_web_pages_of_other_hosts_may_not_send_requests(server: Running) -> None:
    host = server.url.removeprefix("http://")
    body = {"messages": question(), "max_tokens": 8}
    assert server.post(CHAT, body, headers={"origin": server.url}).status_code == 200
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://evil.example", "host": "evil.example"},  # a name that was pointed at this machine
        {"origin": f"http://{host}.evil.example"},
    ):
        answer = server.post(CHAT, body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_keys_are_read_from_a_file_and_kept_as_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    keys = read_keys(str(file))
    assert keys.tenant(KEY) != keys.tenant(OTHER)
    assert None not in (keys.tenant(KEY), keys.tenant(OTHER))
    assert keys.tenant(f"{KEY}x") is None
    assert KEY not in repr(vars(keys))
    assert not Keys(())
    assert read_keys(None).tenant("") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no key"),
        (b"# nothing\n", "has no key"),
        (b"short\n", "characters"),
        (b"k" * 513, "characters"),
        (b"\xff" * 9, "ASCII"),
        (b"long-enough-key\n" * 70_000, "bytes"),
        (None, "No such file"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=said) as caught:
        read_keys(str(file))
    assert "long-enough" not in str(caught.value)
