"""`internvl-rt bench serve` loads an engine with requests that arrive at random, whether it keeps up or not.

Times count from a request's planned arrival, so that delaying it gains nothing; they include reading its pictures.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from internvl_rt.bench.arrivals import Arrival, draw_arrivals, fitting_mix
from internvl_rt.bench.record import Column, Record, Row, peak, reset_peak, spread
from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Reply
from internvl_rt.errors import QueueFullError
from internvl_rt.inputs.sampling_params import SamplingParams

COLUMNS = (
    Column("requests", "requests"),
    Column("TTFT ms", "ttft_median_us", 1e-3),
    Column("p99 ms", "ttft_p99_us", 1e-3),
    Column("ms/token", "token_median_us", 1e-3),
    Column("p99 ms", "token_p99_us", 1e-3),
    Column("tokens/s", "tokens_per_s"),
    Column("queued ms", "queued_median_us", 1e-3),
    Column("preempted", "preemptions"),
    Column("prefix hits %", "prefix_hit_percent"),
    Column("visual hits %", "visual_hit_percent"),
    Column("GB peak", "peak_memory_bytes", 1e-9),
)
WARM_REQUESTS, WARM_TOKENS = 16, 4
DRAIN_S = 10.0
_COUNTERS = (
    *("generated_tokens", "preemptions", "encoded_tiles", "prefix_queried_tokens", "prefix_hit_tokens"),
    *("visual_cache_queries", "visual_cache_hits"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: it has neither reply nor refusal if it was not done in time."""

    late_s: float = 0.0  # from the planned to the real arrival
    reply: Reply | None = None
    refused: bool = False


def sweep_serve(engine: Engine, record: Record, rates: Sequence[float], seconds: float, seed: int) -> None:
    """Sends requests for `seconds` at each rate, and waits for their answers for at most DRAIN_S."""
    asyncio.run(_sweep(engine, record, rates, seconds, seed))


async def _sweep(engine: Engine, record: Record, rates: Sequence[float], seconds: float, seed: int) -> None:
    config = engine.config
    most = config.max_tiles if engine.options.max_tiles is None else engine.options.max_tiles
    mix = fitting_mix(engine.max_model_len, config.vision.image_size, config.tokens_per_tile, most)
    async with AsyncEngine(engine) as served:
        warm = draw_arrivals(WARM_REQUESTS, 1.0, mix, seed + 1)
        await _serve(served, warm, 600.0, WARM_TOKENS)  # the first requests also compile kernels
        for number, rate in enumerate(rates):
            case = f"{rate:g}_per_s"
            if not record.may_start(case, seconds):
                continue
            arrivals = draw_arrivals(rate, seconds, mix, seed + 2 + number)
            if not arrivals:
                record.leave_out(case, f"no request arrived within {seconds:g} s; give more --seconds")
                continue
            reset_peak(engine.device)
            before, start_s = served.stats(), time.perf_counter()
            outcomes = await _serve(served, arrivals, DRAIN_S)
            wall_s = time.perf_counter() - start_s
            after = served.stats()
            changes = {name: after[name] - before[name] for name in _COUNTERS}
            row: Row = {"measures": "serving", "rate_per_s": rate, "arrival_s": seconds, "wall_s": wall_s}
            record.add(case, row | _figures(arrivals, outcomes, changes, wall_s) | peak(engine.device))


async def _serve(
    engine: AsyncEngine, arrivals: Sequence[Arrival], drain_s: float, max_tokens: int = 1 << 30
) -> list[Outcome]:
    """Returns one outcome for each arrival, when all are done or `drain_s` after the last arrival."""
    start_s = time.perf_counter()

    async def ask(arrival: Arrival) -> Outcome:
        params = SamplingParams(max_tokens=min(arrival.max_tokens, max_tokens), ignore_eos=True)
        late_s = time.perf_counter() - start_s - arrival.at_s
        try:
            return Outcome(late_s, await engine.chat(arrival.messages, params))
        except QueueFullError:
            return Outcome(late_s, refused=True)

    tasks: list[asyncio.Task[Outcome]] = []
    try:
        for arrival in arrivals:
            await asyncio.sleep(start_s + arrival.at_s - time.perf_counter())
            tasks.append(asyncio.create_task(ask(arrival)))
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [Outcome() if task.cancelled() else task.result() for task in tasks]


def _figures(arrivals: Sequence[Arrival], outcomes: Sequence[Outcome], changes: dict[str, float], wall_s: float) -> Row:
    """Returns percentiles of the requests that were answered, and the numbers of all others."""
    answered = [(outcome.late_s, outcome.reply) for outcome in outcomes if outcome.reply is not None]
    row: Row = {
        "requests": len(outcomes),
        "picture_requests": sum(arrival.has_picture for arrival in arrivals),
        "answered": len(answered),
        "refused": sum(outcome.refused for outcome in outcomes),
        "unfinished": sum(outcome.reply is None and not outcome.refused for outcome in outcomes),
        "prompt_tokens": sum(reply.usage.prompt_tokens for _, reply in answered),
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
    if answered:
        timed = [(late_s, reply.timings) for late_s, reply in answered]
        row |= spread([late_s + timings.first_token_s for late_s, timings in timed], "ttft_")
        row |= spread([timings.queued_s for _, timings in timed], "queued_")
        decoded = [timings for _, timings in timed if timings.num_decoded]
        if decoded:
            row |= spread([(each.total_s - each.first_token_s) / each.num_decoded for each in decoded], "token_")
    return row
