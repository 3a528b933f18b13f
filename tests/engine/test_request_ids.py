"""A caller may name a request; the name is in the log and in traces, and nowhere else."""

import json
import logging

import pytest

from internvl_rt import AsyncEngine, RequestError, SamplingParams
from support.calls import ask, collect, load, run

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
LONGEST = "ünd " * 32


def logged_ids(caplog):
    lines = [json.loads(record.message) for record in caplog.records if record.name == "internvl_rt"]
    return [line.get("request_id") for line in lines]


def test_the_log_names_the_requests_of_an_engine(caplog):
    with load() as engine, caplog.at_level(logging.DEBUG, logger="internvl_rt"):
        named = engine.chat(ask("Hello"), GREEDY, request_id=LONGEST)
        *_, last = engine.stream(ask("Hello"), GREEDY, request_id="streamed")
        plain = engine.chat(ask("Hello"), GREEDY)
    assert logged_ids(caplog) == [LONGEST, "streamed", None]
    assert named.choices == plain.choices == last.reply.choices
    assert LONGEST not in repr(named)


def test_the_log_names_the_requests_of_an_asynchronous_engine(caplog):
    loaded = load()

    async def main():
        async with AsyncEngine(loaded) as engine:
            await engine.chat(ask("Hello"), GREEDY, request_id="one")
            await collect(engine.stream(ask("Hello"), GREEDY, request_id="two"))
            with pytest.raises(RequestError, match="request_id must be a string of 0 to 128 printable characters"):
                await engine.chat(ask("Hello"), GREEDY, request_id="a\nb")

    with caplog.at_level(logging.DEBUG, logger="internvl_rt"):
        run(main())
    assert logged_ids(caplog) == ["one", "two"]


@pytest.mark.parametrize("wrong", ["a\nb", "a" * 129, 7, b"a"])
def test_a_request_id_that_could_break_a_line_of_a_log_is_refused_before_anything_is_prepared(wrong, monkeypatch):
    with load() as engine:
        prepared = engine.prepare(ask("Hello"))
        monkeypatch.setattr(engine, "prepare", None)
        for call in (engine.chat, engine.stream):
            with pytest.raises(RequestError, match="request_id must be a string of 0 to 128 printable characters"):
                call(ask("Hello"), GREEDY, request_id=wrong)
        with pytest.raises(RequestError, match="request_id must be"):
            engine.new_request(prepared, GREEDY, request_id=wrong)
