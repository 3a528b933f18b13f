"""`internvl-rt bench vision` times passes of vision tower and projector over one picture's tiles."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from internvl_rt.bench.prompts import Prompter
from internvl_rt.bench.record import Column, Pace, Record, peak, reset_peak, shares, spread
from internvl_rt.engine.engine import Engine
from internvl_rt.model.work import vision_work
from internvl_rt.steps.device_stream import DeviceStream, Moment
from internvl_rt.steps.tile_encoder import MAX_TILES_PER_PASS

COLUMNS = (
    Column("ms", "median_us", 1e-3),
    Column("p90 ms", "high_us", 1e-3),
    Column("tiles/s", "tiles_per_s"),
    Column("TFLOP/s", "tflops"),
    Column("% of sheet", "sheet_floor_percent"),
    Column("GB peak", "peak_memory_bytes", 1e-9),
)


def sweep_vision(engine: Engine, record: Record, tiles: Sequence[int], pace: Pace, seed: int) -> None:
    """Times passes. The engine must keep no visual tokens, so that each pass is computed."""
    prompter = Prompter(engine, seed)
    for num_tiles in tiles:
        case = f"{num_tiles}_tiles"
        if num_tiles > MAX_TILES_PER_PASS:
            record.leave_out(case, f"a pass has at most {MAX_TILES_PER_PASS} tiles")
            continue
        if not record.may_start(case):
            continue
        reset_peak(engine.device)
        encode = partial(engine.runner.encode, prompter.picture(num_tiles), None)
        seconds = _time_passes(encode, engine.runner.executor.stream, pace)
        work = vision_work(engine.config, engine.model.dtype, num_tiles, engine.model.vision_layer_bytes)
        median_s = float(np.median(seconds))
        record.add(
            case,
            {
                "measures": "pass",
                "tiles": num_tiles,
                **spread(seconds),
                "num_samples": len(seconds),
                "tiles_per_s": num_tiles / median_s,
                **shares(work, median_s, engine.roof),
                **peak(engine.device),
            },
        )


def _time_passes(run: Callable[[], object], stream: DeviceStream, pace: Pace) -> list[float]:
    """Times passes by the device's clock; they follow each other, so that a GPU never waits for the host."""

    def passes(number: int) -> list[float]:
        with stream.use():
            moments = [Moment(stream.device)]
            for _ in range(number):
                run()
                moments.append(Moment(stream.device))
        moments[-1].wait()
        return [before.seconds_until(after) for before, after in pairwise(moments)]

    warm_s = min(passes(2))
    return passes(1 + pace.repeats(warm_s))[1:]  # during the first one the GPU waits for the host to launch
