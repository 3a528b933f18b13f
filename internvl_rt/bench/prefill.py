"""`internvl-rt bench prefill` measures the time to the first token of one request that finds the engine idle.

It measures from the request's submission to its first token on the host: tokens and tiles are ready before, since the
time to read and cut pictures depends on the pictures. Nothing of a prompt is in any cache.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from internvl_rt.bench.prompts import Prompter
from internvl_rt.bench.record import Column, Pace, Record, peak, reset_peak, shares, spread
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Reply
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.sampling_params import SamplingParams

COLUMNS = (
    Column("tokens", "prompt_tokens"),
    Column("TTFT ms", "median_us", 1e-3),
    Column("p90 ms", "high_us", 1e-3),
    Column("vision ms", "vision_median_us", 1e-3),
    Column("tokens/s", "tokens_per_s"),
    Column("TFLOP/s", "tflops"),
    Column("% of peak", "sheet_peak_percent"),
    Column("GB peak", "peak_memory_bytes", 1e-9),
)
TEXT_TOKENS = 64  # text tokens around a picture
_ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def prompt_lengths(tokens: Sequence[int], tiles: Sequence[int], tokens_per_tile: int) -> Iterator[tuple[str, int, int]]:
    """Yields name, tokens and tiles of each case: text alone, then a picture with a few words."""
    for num_tokens in tokens:
        yield f"{num_tokens}_tokens", num_tokens, 0
    for num_tiles in tiles:
        yield f"{num_tiles}_tiles", TEXT_TOKENS + num_tiles * tokens_per_tile, num_tiles


def sweep_prefill(
    engine: Engine, record: Record, tokens: Sequence[int], tiles: Sequence[int], pace: Pace, seed: int
) -> None:
    prompter = Prompter(engine, seed)
    for case, num_tokens, num_tiles in prompt_lengths(tokens, tiles, engine.config.tokens_per_tile):
        if num_tokens >= engine.max_model_len:
            record.leave_out(case, f"{num_tokens} tokens and an answer do not fit {engine.max_model_len}")
            continue
        if not record.may_start(case):
            continue
        reset_peak(engine.device)
        picture = prompter.picture(num_tiles) if num_tiles else None
        prompt = prompter.prompt(num_tokens, picture)
        _ask(engine, prompt)  # the first request also compiles kernels
        first = _ask(engine, prompt)
        timings = [_ask(engine, prompt).timings for _ in range(pace.repeats(first.timings.total_s))]
        seconds = [each.first_token_s for each in timings]
        median_s = float(np.median(seconds))
        row = {
            "measures": "time to first token",
            "prompt_tokens": num_tokens,
            "tiles": num_tiles,
            **spread(seconds),
            "num_samples": len(seconds),
            "prefill_median_us": 1e6 * float(np.median([each.prefill_s for each in timings])),
            "tokens_per_s": num_tokens / median_s,
            **shares(timings[0].vision_work + timings[0].prefill_work, median_s, engine.roof),
            **peak(engine.device),
        }
        if num_tiles:
            row["vision_median_us"] = 1e6 * float(np.median([each.vision_s for each in timings]))
        record.add(case, row)


def _ask(engine: Engine, prompt: Prepared) -> Reply:
    (reply,) = engine.generate_prepared(iter([replace(prompt, start_s=time.perf_counter())]), [_ONE])
    return reply
