"""`internvl-rt bench serve` loads an engine with requests, whether it keeps up or not: in this process, and over HTTP.

Times are those of a request's caller, to whom the answer is streamed. They count from its planned arrival, so that
delaying it gains nothing; they include reading its pictures.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, takewhile

from internvl_rt.bench.arrivals import Arrival, Mix, draw_arrivals, fitting_mix
from internvl_rt.bench.client import Load, Outcome, drive
from internvl_rt.bench.record import Column, Record, Row, peak, reset_peak, spread
from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.errors import QueueFullError
from internvl_rt.inputs.sampling_params import SamplingParams

_TIMES = (
    Column("requests", "requests"),
    Column("TTFT ms", "ttft_median_us", 1e-3),
    Column("p95 ms", "ttft_p95_us", 1e-3),
    Column("p99 ms", "ttft_p99_us", 1e-3),
    Column("ms/token", "token_median_us", 1e-3),
    Column("p95 ms", "token_p95_us", 1e-3),
    Column("p99 ms", "token_p99_us", 1e-3),
    Column("tokens/s", "tokens_per_s"),
)
COLUMNS = (
    *_TIMES,
    Column("queued ms", "queued_median_us", 1e-3),
    Column("preempted", "preemptions"),
    Column("prefix hits %", "prefix_hit_percent"),
    Column("visual hits %", "visual_hit_percent"),
    Column("GB peak", "peak_memory_bytes", 1e-9),
)
HTTP_COLUMNS = (
    Column("side", "side"),
    *_TIMES,
    Column("+TTFT ms", "ttft_median_over_engine_us", 1e-3),
    Column("+ms/token", "token_median_over_engine_us", 1e-3),
    Column("tokens/s %", "tokens_per_s_of_engine_percent"),
)
WARM_REQUESTS, WARM_TOKENS = 16, 4
DRAIN_S = 10.0
_COUNTERS = (
    *("generated_tokens", "preemptions", "encoded_tiles", "prefix_queried_tokens", "prefix_hit_tokens"),
    *("visual_cache_queries", "visual_cache_hits"),
)

Side = Callable[[Iterator[Arrival], Load, str], Awaitable[list[Outcome]]]


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that arrive at `rate` a second, or from `callers` that wait for each answer."""

    rate: float | None = None
    callers: int | None = None

    @property
    def name(self) -> str:
        return f"{self.callers}_callers" if self.rate is None else f"{self.rate:g}_per_s"

    def row(self) -> Row:
        if self.callers is not None:
            return {"callers": self.callers}
        assert self.rate is not None
        return {"rate_per_s": self.rate}

    def arrivals(self, mix: Mix, seed: int, seconds: float) -> Iterator[Arrival]:
        return takewhile(lambda arrival: arrival.at_s < seconds, draw_arrivals(mix, seed, self.rate))


def sweep_serve(
    engine: Engine, record: Record, cases: Sequence[Case], seconds: float, seed: int, *, http: bool
) -> None:
    """Sends requests for `seconds` in each case, and waits for their answers for at most DRAIN_S.

    http: sends the same requests over HTTP besides.
    """
    if not http:
        asyncio.run(_sweep(engine, record, cases, seconds, seed, http=False))
        return
    import uvloop  # of the server: with one event loop for both sides, they differ by HTTP alone

    uvloop.run(_sweep(engine, record, cases, seconds, seed, http=True))


async def _sweep(
    engine: Engine, record: Record, cases: Sequence[Case], seconds: float, seed: int, *, http: bool
) -> None:
    config = engine.config
    most = config.max_tiles if engine.options.max_tiles is None else engine.options.max_tiles
    mix = fitting_mix(engine.max_model_len, config.vision.image_size, config.tokens_per_tile, most)
    async with AsyncEngine(engine) as served, AsyncExitStack() as stack:
        sides: dict[str, Side] = {"engine": partial(ask_engine, served, mix)}
        if http:
            from internvl_rt.bench import loopback

            opened = await stack.enter_async_context(loopback.open_loopback(engine, served, loopback.shared_texts(mix)))

            async def over_http(arrivals: Iterator[Arrival], load: Load, salt: str) -> list[Outcome]:
                return await opened.run((loopback.request_of(mix, each, salt) for each in arrivals), load)

            sides["http"] = over_http
        for name, side in sides.items():  # the first requests also compile kernels
            warm = [
                replace(each, max_tokens=WARM_TOKENS) for each in islice(draw_arrivals(mix, seed + 1), WARM_REQUESTS)
            ]
            await side(iter(warm), Load(1.0, 600.0), f"warm {name}")
        for number, case in enumerate(cases):
            if not record.may_start(case.name, seconds * len(sides)):
                continue
            if next(case.arrivals(mix, seed + 2 + number, seconds), None) is None:
                record.leave_out(case.name, f"no request arrived within {seconds:g} s; give more --seconds")
                continue
            rows: dict[str, Row] = {}
            for name, side in sides.items():
                reset_peak(engine.device)
                before, start_s = served.stats(), time.perf_counter()
                load = Load(seconds, DRAIN_S, case.callers)
                outcomes = await side(case.arrivals(mix, seed + 2 + number, seconds), load, f"{case.name} {name}")
                wall_s = time.perf_counter() - start_s
                after = served.stats()
                changes = {counter: after[counter] - before[counter] for counter in _COUNTERS}
                row: Row = {"side": name, "measures": "serving", **case.row(), "arrival_s": seconds, "wall_s": wall_s}
                rows[name] = row | figures(outcomes, changes, wall_s) | peak(engine.device)
                more = over_engine(rows["engine"], rows[name]) if name != "engine" else {}
                record.add(case.name, rows[name] | more)


async def ask_engine(
    engine: AsyncEngine, mix: Mix, arrivals: Iterator[Arrival], load: Load, salt: str
) -> list[Outcome]:
    """Sends requests to an engine, and reads each answer as it comes. salt: as in `loopback.request_of`."""

    async def take() -> Arrival | None:
        return next(arrivals, None)

    async def ask(arrival: Arrival, planned_s: float) -> Outcome:
        params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True)
        reply, first_s = None, 0.0
        try:
            async for piece in engine.stream(mix.messages(arrival), params, cache_salt=salt):
                if piece.text and not first_s:
                    first_s = time.perf_counter()
                reply = piece.reply
        except QueueFullError:
            return Outcome("refused", arrival.has_picture)
        end_s = time.perf_counter()
        assert reply is not None
        return Outcome(
            "answered",
            arrival.has_picture,
            reply.usage.prompt_tokens,
            reply.usage.completion_tokens,
            (first_s or end_s) - planned_s,
            end_s - planned_s,
            reply.timings.queued_s,
        )

    return await drive(take, ask, load)


def figures(outcomes: Sequence[Outcome], changes: dict[str, float], wall_s: float) -> Row:
    """Returns percentiles of the requests that were answered, and the numbers of all others."""
    answered = [outcome for outcome in outcomes if outcome.end == "answered"]
    row: Row = {
        "requests": len(outcomes),
        "picture_requests": sum(outcome.has_picture for outcome in outcomes),
        "answered": len(answered),
        "refused": sum(outcome.end == "refused" for outcome in outcomes),
        "unfinished": sum(outcome.end == "unfinished" for outcome in outcomes),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in answered),
        "generated_tokens": changes["generated_tokens"],
        "tokens_per_s": changes["generated_tokens"] / wall_s,
        "preemptions": changes["preemptions"],
        "encoded_tiles": changes["encoded_tiles"],
    }
    for kind, hits, queries in (
        ("prefix", "prefix_hit_tokens", "prefix_queried_tokens"),
        ("visual", "visual_cache_hits", "visual_cache_queries"),
    ):
        if changes[queries]:
            row[f"{kind}_hit_percent"] = 100 * changes[hits] / changes[queries]
    samples = {
        "ttft": [outcome.ttft_s for outcome in answered],
        "queued": [outcome.queued_s for outcome in answered if outcome.queued_s is not None],
        "token": [outcome.token_s for outcome in answered if outcome.token_s is not None],
    }
    for what, seconds in samples.items():
        if seconds:
            row |= spread(seconds, f"{what}_")
    return row


def over_engine(engine: Row, other: Row) -> Row:
    """Returns how much more time another side takes than the engine, and how much of its throughput it has."""
    row: Row = {}
    for key in (f"{what}_{percentile}" for what in ("ttft", "token") for percentile in ("median", "p95", "p99")):
        if f"{key}_us" in engine and f"{key}_us" in other:
            row[f"{key}_over_engine_us"] = float(other[f"{key}_us"]) - float(engine[f"{key}_us"])
    if engine["tokens_per_s"]:
        row["tokens_per_s_of_engine_percent"] = 100 * float(other["tokens_per_s"]) / float(engine["tokens_per_s"])
    return row
