"""`internvl-rt bench decode` measures the time of a step in which every sequence gets one token.

It measures from step to step on the host, as a caller who waits for the tokens sees it. Each sequence has a prompt of
its own that was really computed, so that no keys and values are shared and none are constant.
"""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from internvl_rt.bench.prompts import Prompter
from internvl_rt.bench.record import Column, Record, peak, reset_peak, shares, spread
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.request import Request
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.work import Work, decoder_work
from internvl_rt.steps.kv_cache import WATERMARK

COLUMNS = (
    Column("ms/token", "median_us", 1e-3),
    Column("p90 ms", "high_us", 1e-3),
    Column("p99 ms", "p99_us", 1e-3),
    Column("tokens/s", "tokens_per_s"),
    Column("GB/s", "gb_s"),
    Column("% of bandwidth", "sheet_bandwidth_percent"),
    Column("GB peak", "peak_memory_bytes", 1e-9),
)
WARM_STEPS = 4


def room_for(
    batch: int, context: int, num_steps: int, max_tokens_per_step: int, double_cost_context: float = math.inf
) -> int:
    """Counts the tokens that a sequence may draw before the last step that is timed.

    Sequences whose prompts are computed first go on drawing while other prompts are computed: one token a step, and a
    step of prompts is at least half full. double_cost_context: as for the scheduler, which computes fewer tokens in a
    step the more stand before them.
    """
    cost = batch * context * (1 + context / double_cost_context)  # of the last token's price, the highest, for all
    return num_steps + WARM_STEPS + 4 + 2 * math.ceil(cost / max_tokens_per_step)


def longest(
    cases: Iterable[tuple[int, int]],
    num_steps: int,
    max_tokens_per_step: int,
    window: int,
    double_cost_context: float = math.inf,
) -> int:
    """Returns the `max_model_len` that the cases (batch, context) need; a case beyond the window does not count."""
    limits = max_tokens_per_step, double_cost_context
    lengths = [context + room_for(batch, context, num_steps, *limits) for batch, context in cases]
    return max((length for length in lengths if length <= window), default=window)


def sweep_decode(engine: Engine, record: Record, cases: Sequence[tuple[int, int]], num_steps: int, seed: int) -> None:
    """cases: batch and context, the tokens of each sequence when the first one is drawn."""
    prompter = Prompter(engine, seed)
    limits = engine.max_tokens_per_step, engine.options.double_cost_context(engine.config.decoder, engine.device)
    blocks = engine.cache.blocks.num_blocks
    blocks -= blocks // WATERMARK  # blocks that admission leaves free
    for batch, context in cases:
        case = f"{batch}x{context}"
        length = context + room_for(batch, context, num_steps, *limits)
        if length > engine.max_model_len:
            record.leave_out(case, f"{length} tokens are more than a sequence may have, {engine.max_model_len}")
            continue
        if (needed := engine.cache.num_blocks_for(batch, length)) > blocks:
            record.leave_out(case, f"needs {needed} blocks of KV cache, but {blocks} fit the memory")
            continue
        if not record.may_start(case):
            continue
        reset_peak(engine.device)
        try:
            seconds, work = _time_steps(engine, record, batch, context, num_steps, prompter)
        except _NoTimeError:
            record.leave_out(case, "the budget was spent while its prompts were computed")
            continue
        mean_s = sum(seconds) / len(seconds)
        record.add(
            case,
            {
                "measures": "time per token",
                "batch": batch,
                "context_tokens": context,
                **spread(seconds),
                "num_samples": len(seconds),
                "tokens_per_s": batch / mean_s,
                **shares(work, float(np.median(seconds)), engine.roof),
                **peak(engine.device),
            },
        )


class _NoTimeError(Exception):
    pass


def _time_steps(
    engine: Engine, record: Record, batch: int, context: int, num_steps: int, prompter: Prompter
) -> tuple[list[float], Work]:
    """Returns the seconds of each step, and the work of the one in the middle."""
    params = SamplingParams(max_tokens=engine.max_model_len, ignore_eos=True)  # the engine cuts this to the room
    requests = [engine.new_request(prompter.prompt(context), params) for _ in range(batch)]
    loop, last = engine.loop, requests[-1]
    try:
        for request in requests:
            loop.submit(request)
        while not all(request.first_token_s for request in requests):
            loop.advance(last)
            _check(requests)
            if record.is_spent():
                raise _NoTimeError
        for _ in range(WARM_STEPS):
            loop.advance(last)
        sequences = [request.answers[0].sequence for request in requests]
        before = [sequence.num_tokens for sequence in sequences]
        times = [time.perf_counter()]
        for _ in range(num_steps):
            loop.advance(last)
            times.append(time.perf_counter())
        _check(requests)
        grown = {sequence.num_tokens - num for sequence, num in zip(sequences, before, strict=True)}
        assert grown == {num_steps}, "each step draws a token of every sequence"
    finally:
        for request in requests:
            loop.cancel(request)
    lens = [num + num_steps // 2 for num in before]
    model = engine.model
    held_in = model.decoder_layer_bytes, engine.cache.dtype
    work = decoder_work(engine.config.decoder, model.dtype, [1] * batch, lens, batch, *held_in)
    return [end - start for start, end in pairwise(times)], work


def _check(requests: Iterable[Request]) -> None:
    """Checks that all requests still run, so that every step was of the whole batch."""
    for request in requests:
        if request.error is not None:
            raise request.take_error()
        assert not request.done, "there is room for all tokens that are drawn"
