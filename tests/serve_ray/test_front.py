"""An ingress without Ray: its guards, the replica that it asks for, and what a client is told when a replica ends."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import httpx2
import pytest

from internvl_rt.serve_ray.front import BusyError, Front, LostReplicaError, Part
from internvl_rt.serve_ray.holdings import Report
from internvl_rt.serve_ray.in_process import Head, Message
from internvl_rt.serve_ray.options import read_plan
from internvl_rt.server.body import Body
from internvl_rt.server.call import EVENTS
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log

KEY = "a-key-of-the-tests"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}
Script = Callable[[int], AsyncGenerator[Part, None]]  # what happens at the first, second, ... attempt


def start(content_type: str = "application/json", status: int = 200) -> Message:
    headers = [(b"content-type", content_type.encode()), (b"x-request-id", b"of the replica")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def good(_: int) -> AsyncGenerator[Part, None]:
    yield "a"
    yield [start(), body(b"{}")]


class Fake:
    """A front, and the requests that it has passed on."""

    def __init__(self, script: Script = good, keys: tuple[str, ...] = (), **options: Any) -> None:
        self.asked: list[tuple[Head, bytes, Mapping[str, float]]] = []
        self.front = Front(read_plan({"model": "tiny", **options}), Keys(keys), Log(), self._ask)
        self._script = script

    async def _ask(self, head: Head, sent: bytes, advantage: Mapping[str, float]) -> AsyncGenerator[Part, None]:
        self.asked.append((head, sent, advantage))
        async for part in self._script(len(self.asked)):
            yield part

    def request(self, method: str, path: str, **more: Any) -> httpx2.Response:
        async def send() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.front.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())


def error_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_a_request_is_passed_on_and_its_answer_comes_back() -> None:
    fake = Fake()
    answered = fake.request("POST", CHAT, json=BODY, headers={"x-request-id": "mine", "authorization": "Bearer x"})
    assert (answered.status_code, answered.json()) == (200, {})
    assert answered.headers["x-internvl-rt-replica"] == "a"
    assert "x-request-id" not in answered.headers, "Serve's proxy writes it"
    ((head, sent, advantage),) = fake.asked
    assert (head.method, head.path, json.loads(sent), advantage) == ("POST", CHAT, BODY, {})
    assert (b"x-request-id", b"mine") in head.headers
    assert (b"authorization", b"Bearer x") in head.headers


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("GET", "/"), ("POST", "/nosuch"), ("PUT", CHAT)])
def test_what_is_no_work_is_passed_on_without_a_body(method: str, path: str) -> None:
    fake = Fake(keys=(KEY,))
    assert fake.request(method, path, content=b"a body").status_code == 200
    assert [(head.method, head.path, sent) for head, sent, _ in fake.asked] == [(method, path, b"")]


def test_who_may_not_call_is_refused_here() -> None:
    fake = Fake(keys=(KEY,))
    assert error_of(fake.request("POST", CHAT, json=BODY)) == (401, "invalid_api_key")
    assert error_of(fake.request("GET", "/metrics")) == (401, "invalid_api_key")
    page = {"origin": "https://evil.example", "authorization": f"Bearer {KEY}"}
    assert error_of(fake.request("POST", CHAT, json=BODY, headers=page)) == (403, "origin_not_allowed")
    assert fake.asked == []
    assert fake.request("POST", CHAT, json=BODY, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_page_of_an_allowed_origin_may_read_answers_and_errors_and_replicas_do_not_hear_of_it() -> None:
    origin = "https://chat.example"
    fake = Fake(allowed_origins=origin, max_body_bytes=1000)
    for sent in (BODY, {"messages": "a" * 2000}):
        answered = fake.request("POST", CHAT, json=sent, headers={"origin": origin})
        assert answered.headers.get_list("access-control-allow-origin") == [origin]
    ((head, _, _),) = fake.asked
    assert b"origin" not in dict(head.headers)


def test_bodies_beyond_the_limits_are_refused_here() -> None:
    fake = Fake(max_body_bytes=1000, max_text_bytes=500, max_bodies_bytes=900)
    assert error_of(fake.request("POST", CHAT, content=b"a" * 1001)) == (413, "body_too_large")
    assert error_of(fake.request("POST", CHAT, content=b"a" * 950)) == (429, "too_many_bytes")
    assert error_of(fake.request("POST", CHAT, content=b"a" * 600)) == (413, "body_too_large")
    assert fake.asked == []
    assert fake.front._num_body_bytes == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_request_that_is_lost_before_its_answer_begins_goes_to_another_replica(known: bool) -> None:
    async def script(attempt: int) -> AsyncGenerator[Part, None]:
        if attempt == 1 and not known:
            raise LostReplicaError
        yield "ab"[attempt - 1]
        if attempt == 1:
            raise LostReplicaError
        yield [start(), body(b"{}")]

    fake = Fake(script)
    fake.front.take(Report("a", 0, True, b"", b""))
    assert fake.request("POST", CHAT, json=BODY).status_code == 200
    assert len(fake.asked) == 2
    assert len(fake.front.holdings) == (0 if known else 1), "the replica that has ended is forgotten"


def test_a_request_that_ends_two_replicas_is_not_sent_to_a_third() -> None:
    async def script(attempt: int) -> AsyncGenerator[Part, None]:
        yield "a"
        raise LostReplicaError

    fake = Fake(script)
    lost = fake.request("POST", CHAT, json=BODY)
    assert error_of(lost) == (503, "replica_lost")
    assert (lost.headers["retry-after"], len(fake.asked)) == ("1", 2)
    assert "x-should-retry" not in lost.headers


def test_a_stream_whose_replica_ends_ends_with_an_error_that_says_to_try_again() -> None:
    async def script(attempt: int) -> AsyncGenerator[Part, None]:
        yield "a"
        yield [start(EVENTS), body(b'data: {"a":1}\n\n', more=True)]
        raise LostReplicaError

    fake = Fake(script)
    answered = fake.request("POST", CHAT, json=BODY)
    first, error, done, _ = answered.text.split("\n\n")
    assert (first, done) == ('data: {"a":1}', "data: [DONE]")
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {
            "message": "the replica that had this request has ended; send the request again",
            "type": "server_error",
            "param": None,
            "code": "replica_lost",
        }
    }
    assert len(fake.asked) == 1


def test_a_full_pool_and_one_without_replicas_say_when_to_try_again() -> None:
    async def busy(_: int) -> AsyncGenerator[Part, None]:
        raise BusyError
        yield "never"

    async def none(_: int) -> AsyncGenerator[Part, None]:
        await asyncio.sleep(60)
        yield "never"

    refused = Fake(busy).request("POST", CHAT, json=BODY)
    assert (*error_of(refused), refused.headers["retry-after"]) == (429, "queue_full", "1")
    late = Fake(none, request_timeout_s=0.05).request("POST", CHAT, json=BODY)
    assert (*error_of(late), late.headers["retry-after"]) == (503, "no_replica", "1")


def test_a_fault_of_a_replica_is_told_as_such() -> None:
    async def script(_: int) -> AsyncGenerator[Part, None]:
        yield "a"
        raise ZeroDivisionError

    assert error_of(Fake(script).request("POST", CHAT, json=BODY)) == (500, "internal_error")


def test_probes_and_metrics_are_answered_from_what_replicas_report() -> None:
    fake = Fake()
    assert error_of(fake.request("GET", "/health")) == (503, "no_replica")
    assert fake.front.take(Report("a", 0, True, b"", b"", None, b"# HELP x y\n# TYPE x gauge\nx 1.0\n"))
    assert fake.request("GET", "/ready").json() == {"status": "ok", "replicas": 1, "routes_by_prefix": False}
    assert fake.request("GET", "/metrics").text == '# HELP x y\n# TYPE x gauge\nx{replica="a"} 1.0\n'
    assert fake.asked == []


class FixedPrompts:
    """Stands for `PromptKeys`: each prompt has the same digests."""

    def __init__(self, *digests: bytes) -> None:
        self._digests = list(digests)

    async def digests(self, path: str, sent: Body, salt: object) -> list[bytes]:
        if not self._digests:
            raise ZeroDivisionError
        return self._digests


def test_the_replicas_that_hold_more_of_a_prompt_are_named_and_the_one_that_gets_it_is_believed_to() -> None:
    one, two = bytes(16), bytes([1] * 16)
    fake = Fake()
    fake.front.prompts = FixedPrompts(one, two)  # type: ignore[assignment]
    fake.front.take(Report("a", 0, True, b"", b""))
    fake.request("POST", CHAT, json=BODY)
    fake.front.take(Report("b", 0, True, one, b""))
    fake.front.take(Report("c", 0, True, b"", b""))
    fake.request("POST", CHAT, json=BODY)
    fake.request("POST", CHAT, json=BODY)
    assert [advantage for *_, advantage in fake.asked] == [{}, {"b": 0.5}, {"a": 1.0, "b": 0.5}], (
        "with one there is no choice"
    )


def test_a_mistake_in_computing_digests_costs_no_request() -> None:
    fake = Fake()
    fake.front.prompts = FixedPrompts()  # type: ignore[assignment]
    for name in "ab":
        fake.front.take(Report(name, 0, True, b"", b""))
    assert fake.request("POST", CHAT, json=BODY).status_code == 200
