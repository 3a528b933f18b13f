"""`internvl-rt bench serve`: the requests it sends, in this process and over HTTP, and what it says of them."""

import asyncio
import base64
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_rt import AsyncEngine, Engine
from internvl_rt.bench import serve
from internvl_rt.bench.arrivals import Arrival, draw_arrivals, fitting_mix
from internvl_rt.bench.client import Load, Outcome, Request
from internvl_rt.bench.loopback import open_loopback, request_of, shared_texts
from internvl_rt.bench.pictures import encode_png
from internvl_rt.bench.record import spread
from internvl_rt.cli import main
from support.result_schema import valid

MIX = fitting_mix(2048, tile_side=28, tokens_per_tile=4, max_tiles=12)


def bench_serve(capsys, *arguments):
    """Returns the lines that a run printed, and its rows by case and side."""
    assert main(["bench", "serve", "tiny", *arguments, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = valid(json.loads(lines[-1]))["rows"][1:]
    return lines, {(row["name"].split("/")[2], row.get("side", "")): row for row in rows}


def processes_of(pid):
    """Returns the processes whose parent a process is."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in found.stdout.split()]


def test_requests_arrive_at_the_rate_and_the_same_for_the_same_seed():
    def drawn(seed):
        return list(takewhile(lambda arrival: arrival.at_s < 20, draw_arrivals(MIX, seed, 50.0)))

    arrivals = drawn(1)
    assert len(arrivals) == pytest.approx(1000, abs=100)
    gaps = np.diff([arrival.at_s for arrival in arrivals])
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.15), "a Poisson process: gaps vary as much as they last"
    pictures = [arrival.picture for arrival in arrivals if arrival.has_picture]
    assert len(pictures) == pytest.approx(500, abs=60)
    assert len(set(pictures)) == pytest.approx(0.7 * len(pictures), rel=0.15)
    assert drawn(1) == arrivals != drawn(2)
    assert max(each.max_tokens for each in arrivals) <= MIX.max_tokens
    assert {each.at_s for each in islice(draw_arrivals(MIX, 0), 10)} == {0.0}, "without a rate all are there at once"


def test_a_picture_is_a_png_of_its_pixels_and_a_file_of_its_own_for_each_number():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    png = encode_png(pixels, 1)
    files = [png.file(number) for number in (0, 1, 2**64 - 1)]
    assert len({*files}) == 3
    for file in files:
        assert (np.asarray(Image.open(io.BytesIO(file))) == pixels).all()


def test_a_request_over_http_asks_what_is_asked_in_process():
    arrival = next(each for each in draw_arrivals(MIX, 3) if each.has_picture)
    shared = shared_texts(MIX)
    parts = request_of(MIX, arrival, "salt").parts
    body = json.loads("".join(shared[part].decode() if isinstance(part, int) else part for part in parts))
    picture, text = body["messages"][1]["content"]
    asked = MIX.messages(arrival)
    with Image.open(io.BytesIO(asked[1]["content"][0]["image"])) as opened:
        assert opened.text["Comment"] == f"{arrival.picture[1]:016x}"
    assert base64.b64decode(picture["image_url"]["url"].split(",")[1]) == asked[1]["content"][0]["image"]
    assert (body["messages"][0], text) == (asked[0], asked[1]["content"][1])
    assert (body["max_tokens"], body["cache_salt"], body["stream"]) == (arrival.max_tokens, "salt", True)


@pytest.mark.parametrize("over_http", [False, True], ids=["engine", "http"])
def test_requests_that_are_not_answered_in_time_or_refused_are_counted_on_both_sides(over_http):
    long = 20_000  # tokens of an answer, so that those that run are not answered in time on any machine
    arrivals = [replace(each, max_tokens=long) for each in islice(draw_arrivals(MIX, 0, 400.0), 40)]

    async def overload():
        core = Engine.from_pretrained("tiny", device="cpu", max_num_seqs=2, max_waiting=2)
        load = Load(arrivals[-1].at_s, 0.02)
        async with AsyncEngine(core) as engine:
            if not over_http:
                return await serve.ask_engine(engine, MIX, iter(arrivals), load, "salt")
            async with open_loopback(core, engine, shared_texts(MIX)) as loopback:
                return await loopback.run((request_of(MIX, each, "salt") for each in arrivals), load)

    outcomes = asyncio.run(overload())
    row = serve.figures(outcomes, dict.fromkeys(serve._COUNTERS, 0), 1.0)
    assert row["requests"] == len(arrivals)
    assert row["picture_requests"] == sum(each.has_picture for each in arrivals)
    assert row["answered"] + row["refused"] + row["unfinished"] == row["requests"]
    assert min(row["refused"], row["unfinished"]) > 0


def test_a_request_that_arrives_late_has_waited_since_it_was_to_arrive():
    async def late():
        async with AsyncEngine(Engine.from_pretrained("tiny", device="cpu")) as engine:
            arrivals = iter([Arrival(-2.0, "hello", 5)])
            return await serve.ask_engine(engine, MIX, arrivals, Load(1.0, 60.0), "salt")

    (outcome,) = asyncio.run(late())
    assert 2 < outcome.ttft_s < outcome.total_s < 60
    assert outcome.token_s == pytest.approx((outcome.total_s - outcome.ttft_s) / 4)


def test_http_costs_what_its_rows_have_over_those_of_the_engine():
    engine = {**spread([1.0, 2.0], "ttft_"), "tokens_per_s": 200.0}
    other = {**spread([1.5, 2.5], "ttft_"), **spread([1.0], "token_"), "tokens_per_s": 150.0}
    assert serve.over_engine(engine, other) == pytest.approx(
        {
            "ttft_median_over_engine_us": 5e5,
            "ttft_p95_over_engine_us": 5e5,
            "ttft_p99_over_engine_us": 5e5,
            "tokens_per_s_of_engine_percent": 75.0,
        }
    )


def test_what_serve_says_fits_together(capsys):
    lines, rows = bench_serve(capsys, "--rates", "12,0.001", "--seconds", "1", "--max-num-seqs", "8")
    row = rows["12_per_s", "engine"]
    assert row["answered"] == row["requests"] > row["picture_requests"] > 0
    assert (row["refused"], row["unfinished"], row["rate_per_s"]) == (0, 0, 12)
    for what in ("ttft", "token", "queued"):
        percentiles = [row[f"{what}_{name}_us"] for name in ("low", "median", "high", "p95", "p99")]
        assert percentiles == sorted(percentiles)
        assert percentiles[0] > 0
    assert row["tokens_per_s"] == pytest.approx(row["generated_tokens"] / row["wall_s"], rel=1e-4)
    assert 0 < row["prefix_hit_percent"] < 100
    assert "no request arrived within 1 s" in rows["0.001_per_s", ""]["left_out"]
    assert not any("+TTFT" in line for line in lines)


def test_engine_and_http_answer_the_same_requests_side_by_side(capsys):
    lines, rows = bench_serve(capsys, "--http", "--rates", "12", "--concurrency", "3", "--seconds", "1")
    assert [*rows] == [(case, side) for case in ("12_per_s", "3_callers") for side in ("engine", "http")]
    engine, http = rows["12_per_s", "engine"], rows["12_per_s", "http"]
    same = ("requests", "picture_requests", "answered", "prompt_tokens", "generated_tokens", "encoded_tiles")
    assert {key: http[key] for key in same} == {key: engine[key] for key in same}
    assert engine["answered"] == engine["requests"] > engine["picture_requests"] > 0
    assert rows["3_callers", "http"]["callers"] == 3
    for row in rows.values():
        assert (row["refused"], row["unfinished"]) == (0, 0)
        assert row["requests"] >= row.get("callers", 0)
        assert 0 < row["ttft_median_us"] <= row["ttft_p99_us"] < 30e6
        assert 0 < row["token_median_us"] <= row["token_p99_us"] < 10e6
    over = http["ttft_median_us"] - engine["ttft_median_us"]
    assert http["ttft_median_over_engine_us"] == pytest.approx(over, abs=2)
    table = [line.split()[:2] for line in lines if line.startswith(("serve ", "12_per_s", "3_callers"))]
    assert table == [["serve", "side"], *([case, side] for case, side in rows)]


def test_a_failed_request_over_http_ends_the_run_and_says_why():
    async def ask(*requests):
        core = Engine.from_pretrained("tiny", device="cpu")
        async with AsyncEngine(core) as engine, open_loopback(core, engine, ()) as loopback:
            return await loopback.run(requests, Load(60.0, 60.0))

    with pytest.raises(RuntimeError, match=r"a request over HTTP failed: the server answered 400: .*invalid_json"):
        asyncio.run(ask(Request(0.0, False, ["{"]), Request(50.0, False, ["{}"])))


def test_a_client_process_that_has_ended_is_told():
    async def ask():
        core = Engine.from_pretrained("tiny", device="cpu")
        async with AsyncEngine(core) as engine, open_loopback(core, engine, ()) as loopback:
            loopback._input.close()
            return await loopback.run([], Load(60.0, 60.0))

    with pytest.raises(RuntimeError, match="a request over HTTP failed: the client has ended"):
        asyncio.run(ask())


@pytest.mark.fast("http")
@pytest.mark.parametrize("row", ["engine", "http"])
def test_ctrl_c_ends_server_and_client_process(row):
    options = ["--http", "--concurrency", "2", "--rates", "4,4", "--seconds", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "internvl_rt", "bench", "serve", "tiny", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    )
    assert process.stdout is not None
    assert any(line.split()[:2] == ["4_per_s", row] for line in process.stdout)  # the other side runs now
    children = processes_of(process.pid)
    assert len(children) == 1
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\ninterrupted\n")
    assert json.loads(output.splitlines()[-1])["rows"][-1]["left_out"] == "interrupted"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_without_the_servers_libraries_http_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("internvl_rt.server.find_spec", lambda name: None if name == "uvicorn" else name)
    for arguments, what in ((["bench", "serve", "./no-such-model", "--http"], "--http"), (["serve", "x"], "serving")):
        assert main(arguments) == 2
        message = f"{what} needs uvicorn, which is not installed; pip install 'internvl-rt[server]'"
        assert capsys.readouterr().err == f"internvl-rt: {message}\n"


def test_an_outcome_without_a_second_token_has_no_time_for_one():
    assert Outcome("answered", False, 10, 1, 1.0, 1.0).token_s is None


def test_the_script_of_the_goals_prints_what_http_costs_beside_each(capsys, monkeypatch):
    bench = Path(__file__).parents[2] / "bench"
    monkeypatch.syspath_prepend(str(bench))
    import http_cost

    monkeypatch.setattr(sys, "argv", ["http_cost.py", "--samples", "2", "--rounds", "1", "--streams", "2"])
    assert http_cost.main() == 0
    first, streams, data_url = capsys.readouterr().out.splitlines()[1:]
    for line, begins, goal in (
        (first, "first token, picture of 1.0", "goal  2.0 ms"),
        (streams, "2 streams", "goal 15.0 %"),
        (data_url, "4 MB data URL", "goal  6.0 ms"),
    ):
        assert line.startswith(begins)
        assert goal in line
        assert line.split()[-1] in ("held", "missed")
