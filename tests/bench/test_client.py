"""The client of `internvl-rt bench serve --http` reads answers wherever they are cut, and sends as its load says."""

import asyncio
import time

import pytest

from internvl_rt.bench.client import EventReader, Load, Outcome, Request, ResponseReader, drive

EVENTS = [b'{"a":"1"}', b'{"b":"\r\n2"}', b"[DONE]"]
SENT = b"".join(b"data: " + event + b"\n\n" for event in EVENTS)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"


def chunked(body, size):
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def read(pieces):
    response, events, found = ResponseReader(), EventReader(), []
    for piece in pieces:
        assert not response.is_complete
        found += events.push(response.push(piece))
    assert (response.status, response.is_complete) == (200, True)
    return found


@pytest.mark.parametrize(
    "response",
    [chunked(SENT, 1), chunked(SENT, 17), chunked(SENT, 1000), HEAD + b"content-length: %d\r\n\r\n" % len(SENT) + SENT],
    ids=["chunks of one byte", "chunks across events", "one chunk", "a length"],
)
def test_an_answer_is_read_the_same_wherever_it_is_cut(response):
    assert read([response]) == EVENTS
    assert read([response[index : index + 1] for index in range(len(response))]) == EVENTS
    for cut in range(1, len(response)):
        assert read([response[:cut], response[cut:]]) == EVENTS


def test_comments_of_a_stream_are_no_events():
    assert EventReader().push(b": keep-alive\n\ndata: 1\n\n: keep") == [b"1"]


def test_an_answer_without_a_body_is_complete_with_its_head():
    response = ResponseReader()
    assert response.push(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n") == b""
    assert (response.status, response.is_complete) == (204, True)


def sent(times, load, answer_s=0.0, fails_at=None):
    """Sends requests to nobody; returns when each was sent, and what became of them."""
    requests, asked = iter([Request(at_s, False, []) for at_s in times]), []
    start_s = time.perf_counter()

    async def take():
        return next(requests, None)

    async def ask(request, planned_s):
        asked.append((time.perf_counter() - start_s, planned_s - start_s))
        if len(asked) == fails_at:
            raise RuntimeError("failed")
        await asyncio.sleep(answer_s)
        return Outcome("answered", request.has_picture)

    return asked, asyncio.run(drive(take, ask, load))


def test_a_load_without_callers_sends_each_request_at_its_time():
    asked, outcomes = sent([0.1, 0.2, 0.2], Load(0.3, 5.0), answer_s=0.5)
    assert [planned_s for _, planned_s in asked] == pytest.approx([0.1, 0.2, 0.2], abs=0.1)
    assert all(at_s >= planned_s - 0.01 for at_s, planned_s in asked)
    assert [outcome.end for outcome in outcomes] == ["answered"] * 3


def test_each_caller_waits_for_its_answer_and_sends_until_the_time_is_over():
    asked, outcomes = sent([0.0] * 100, Load(0.5, 5.0, callers=2), answer_s=0.2)
    assert 2 < len(asked) == len(outcomes) <= 6
    assert all(at_s < 0.6 for at_s, _ in asked)
    assert {outcome.end for outcome in outcomes} == {"answered"}


def test_what_is_not_answered_in_time_is_unfinished():
    _, outcomes = sent([0.0, 0.0], Load(0.1, 0.1), answer_s=60.0)
    assert [outcome.end for outcome in outcomes] == ["unfinished"] * 2


@pytest.mark.parametrize("callers", [None, 2])
def test_the_first_error_ends_a_load(callers):
    with pytest.raises(RuntimeError, match="failed"):
        sent([0.0, 0.0, 60.0], Load(90.0, 90.0, callers), answer_s=60.0, fails_at=2)
