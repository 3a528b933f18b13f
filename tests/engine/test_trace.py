"""Traces are valid for the viewers, agree with the replies, and never make a request fail."""

import itertools
import json
import os
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.engine.trace import Trace
from internvl_rt.model.work import Work
from internvl_rt.steps.runner import StepResult
from support.calls import ask

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PHASES = ("request", "queued", "prefill", "decode")
SLACK_US = 1.0  # a trace rounds its times


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        yield engine


def picture():
    return np.random.default_rng().integers(0, 256, (60, 150, 3), dtype=np.uint8)


def read(path):
    return json.loads(path.read_text())["traceEvents"]


def steps_of(events, name=None):
    return [event for event in events if event["ph"] == "X" and name in (None, event["name"])]


def spans_of(events):
    """Returns the seconds of each finished span by request and name, and asserts that the spans nest."""
    spans, open_spans = {}, {}
    for event in events:
        if event["ph"] == "b":
            open_spans.setdefault(event["id"], []).append(event)
        elif event["ph"] == "e":
            begin = open_spans[event["id"]].pop()
            assert (begin["name"], begin["cat"]) == (event["name"], event["cat"])
            assert begin["ts"] <= event["ts"]
            spans.setdefault(event["id"], {})[event["name"]] = (begin["ts"], event["ts"])
    assert not any(open_spans.values())
    for span in spans.values():
        start, end = span["request"]
        assert all(start <= first <= last <= end for first, last in span.values())
    return spans


def total_s(events):
    return sum(event["dur"] for event in events) / 1e6


def test_a_trace_of_one_request_adds_up_to_its_timings(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        reply = engine.chat(ask("Read.", picture()), PARAMS)
    events, t = read(path), reply.timings
    (span,) = spans_of(events).values()
    lengths = {name: (last - first) / 1e6 for name, (first, last) in span.items()}
    assert list(span) == ["queued", "prefill", "decode", "request"]
    assert lengths["queued"] == pytest.approx(t.queued_s, abs=1e-5)
    assert sum(lengths[name] for name in ("queued", "prefill", "decode")) == pytest.approx(lengths["request"], abs=1e-5)
    assert lengths["request"] < t.total_s
    assert total_s(steps_of(events, "vision")) == pytest.approx(t.vision_s, abs=1e-4)
    assert total_s(steps_of(events, "decoder")) == pytest.approx(t.prefill_s + t.decode_s, rel=0.01)
    args = [event["args"] for event in steps_of(events, "decoder")]
    assert sum(arg["flops"] for arg in args) == t.prefill_work.flops + t.decode_work.flops
    assert [arg["tokens"] for arg in args] == [reply.usage.prompt_tokens] + [1] * t.num_decoded
    assert [arg["draws"] for arg in args] == [1] * 6
    (vision,) = steps_of(events, "vision")
    assert vision["args"]["tiles"] * engine.config.tokens_per_tile == reply.usage.image_tokens


def test_steps_follow_each_other_within_the_requests_that_they_serve(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        engine.generate([ask("Hello"), ask("Read.", picture()), ask("And now?")], PARAMS)
    events = read(path)
    steps = steps_of(events)
    for before, after in itertools.pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + SLACK_US
    spans = [span["request"] for span in spans_of(events).values()]
    assert len(spans) == 3
    assert min(first for first, _ in spans) <= steps[0]["ts"] + SLACK_US
    assert max(last for _, last in spans) >= steps[-1]["ts"] + steps[-1]["dur"] - SLACK_US
    assert max(event["args"]["sequences"] for event in steps) == 3


def test_counters_show_blocks_and_requests_at_every_step(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        engine.generate([ask("Hello"), ask("And now?")], PARAMS)
    events = read(path)
    counters = {name: [e["args"] for e in events if e["ph"] == "C" and e["name"] == name] for name in names(events)}
    assert len(counters["KV blocks"]) == len(counters["requests"]) == len(steps_of(events, "decoder"))
    assert min(count["used"] for count in counters["KV blocks"]) >= 1
    assert counters["requests"][-1] == {"running": 2, "waiting": 0}


def names(events):
    return {event["name"] for event in events}


def test_every_event_is_one_that_the_viewers_know(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        engine.chat(ask("Hello"), PARAMS)
    for event in read(path):
        assert event["ph"] in "MXCbe"
        assert {"name", "pid", "tid"} <= set(event)
        assert event["ph"] == "M" or event["ts"] > 0


def test_a_trace_holds_nothing_of_what_was_said(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        engine.chat(ask("Xylophon"), PARAMS)
    events = read(path)
    texts = {value for event in events for value in (event | event.get("args", {})).values() if isinstance(value, str)}
    assert texts - names(events) == {*"MXCbe", "internvl_rt", "steps", "length"}
    assert names(events) == {"process_name", "thread_name", "decoder", "KV blocks", "requests", *PHASES}


def test_a_trace_shows_the_request_id_that_a_caller_gave(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(path):
        engine.chat(ask("Hello"), PARAMS, request_id="first ünd 1")
        list(engine.stream(ask("Hello"), PARAMS, request_id="second"))
        engine.chat(ask("Hello"), PARAMS)
    begins = [event for event in read(path) if event["ph"] == "b" and event["name"] == "request"]
    assert [event["args"].get("request_id") for event in begins] == ["first ünd 1", "second", None]


def test_nothing_is_written_after_the_block_and_nothing_is_left_beside(engine, tmp_path):
    path = tmp_path / "run.json"
    with engine.trace(str(path)):
        engine.chat(ask("Hello"), PARAMS)
    before = path.read_bytes()
    engine.chat(ask("Hello"), PARAMS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_request_in_flight_at_the_end_is_shown_as_far_as_it_got(engine, tmp_path):
    path = tmp_path / "run.json"
    stream = engine.stream(ask("Hello"), SamplingParams(max_tokens=500, ignore_eos=True))
    with engine.trace(path):
        next(stream)
    stream.close()
    events = read(path)
    (span,) = spans_of(events).values()
    assert set(span) == set(PHASES)
    assert [event["args"]["outcome"] for event in events if "outcome" in event.get("args", {})] == ["in flight"]


def test_a_block_that_fails_leaves_its_trace_and_its_error(engine, tmp_path):
    path = tmp_path / "run.json"

    def fail():
        engine.chat(ask("Hello"), PARAMS)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), engine.trace(path):
        fail()
    assert steps_of(read(path))


def test_one_trace_at_a_time_and_the_first_goes_on(engine, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with engine.trace(first):
        with pytest.raises(RequestError, match="only one at a time"), engine.trace(second):
            pass
        engine.chat(ask("Hello"), PARAMS)
    assert steps_of(read(first))
    assert os.listdir(tmp_path) == ["first.json"]


@pytest.mark.parametrize(("place", "message"), [("no/run.json", "No such file"), ("", "this is a folder")])
def test_a_place_that_cannot_be_written_is_refused_at_once(engine, tmp_path, place, message):
    with pytest.raises(RequestError, match=message), engine.trace(tmp_path / place):
        pytest.fail("the block must not begin")
    assert os.listdir(tmp_path) == []


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


MAKERS = {
    "a named pipe": os.mkfifo,
    "a socket": make_socket,
    "a symbolic link": lambda path: path.symlink_to(path.with_name("target")),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_only_a_regular_file_is_replaced(engine, tmp_path, kind):
    path = tmp_path / "run.json"
    (tmp_path / "target").write_text("untouched")
    MAKERS[kind](path)
    before = path.lstat()
    with pytest.raises(RequestError, match=f"replaces a regular one, but this is {kind}"), engine.trace(path):
        pytest.fail("the block must not begin")
    assert path.lstat() == before
    assert (tmp_path / "target").read_text() == "untouched"
    assert sorted(os.listdir(tmp_path)) == ["run.json", "target"]


def test_a_device_is_not_replaced(engine):
    before = os.stat(os.devnull)
    with pytest.raises(RequestError, match="but this is a device"), engine.trace(os.devnull):
        pytest.fail("the block must not begin")
    assert os.stat(os.devnull).st_ino == before.st_ino


def test_what_becomes_a_link_during_the_trace_is_not_replaced(engine, tmp_path):
    path = tmp_path / "run.json"

    def run():
        engine.chat(ask("Hello"), PARAMS)
        path.symlink_to("target")

    with pytest.raises(RequestError, match="but this is a symbolic link"), engine.trace(path):
        run()
    assert path.is_symlink()
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(engine, tmp_path, name):
    with pytest.raises(RequestError) as caught, engine.trace(tmp_path / name):
        pytest.fail("the block must not begin")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_a_disk_that_fills_up_disturbs_no_request_and_keeps_the_file_of_before(engine, tmp_path):
    path = tmp_path / "run.json"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = engine.chat(ask("Hello"), PARAMS).token_ids
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert len(engine.chat(ask("Hello"), long).token_ids) == 100
        assert engine.chat(ask("Hello"), PARAMS).token_ids == expected

    try:
        with pytest.raises(RequestError, match="could not be written: File too large"), engine.trace(path):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["run.json"]


def test_steps_that_were_launched_ahead_begin_when_the_one_before_has_ended(tmp_path):
    path = tmp_path / "run.json"
    stats = {"kv_blocks_used": 1, "running": 1, "waiting": 0}
    with Trace(path) as trace:
        for host_s in (10.0, 10.1, 30.0):  # step 2 is launched while step 1 runs, step 3 after a pause
            result = StepResult([], [], [], 1.0, 4.0, 2, Work(1, 2), Work(3, 4))
            step = SimpleNamespace(decodes=(), chunks=(), num_tokens=0, num_draws=0)
            trace.step(SimpleNamespace(start=SimpleNamespace(host_s=host_s), step=step), result, stats)
    begins = [(event["name"], event["ts"] / 1e6) for event in steps_of(read(path))]
    assert begins == [("vision", 10), ("decoder", 11), ("vision", 15), ("decoder", 16), ("vision", 30), ("decoder", 31)]
