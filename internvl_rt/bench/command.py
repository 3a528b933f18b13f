"""Runs one bench: prints the model's static card, measures, and prints the record as the last line."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from internvl_rt.arguments import device_and_numbers
from internvl_rt.bench import decode, prefill, serve, vision
from internvl_rt.bench.record import Column, Pace, Record, check_plots, peak, table
from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.find import RANDOM_PREFIX
from internvl_rt.checkpoint.quantization import Quantization
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import choose_device, choose_dtype, choose_kv_dtype, choose_quantization
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import RequestError
from internvl_rt.model.card import model_card, render_card
from internvl_rt.model.internvl import layer_bytes
from internvl_rt.model.weights import find_schemes, shape_weights
from internvl_rt.model.work import data_sheet_roof, decoder_work, kv_block_bytes, roof_of, vision_work
from internvl_rt.steps.tile_encoder import MAX_TILES_PER_PASS

PACE, QUICK_PACE = Pace(1.0, 5, 50), Pace(0.0, 3, 3)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "vision": vision.COLUMNS,
    "prefill": prefill.COLUMNS,
    "decode": decode.COLUMNS,
    "serve": serve.COLUMNS,
}
SHEET = "NVIDIA H200"  # its floors are printed if the device's own data sheet is not known


def run(args: argparse.Namespace, model: str | Path, config: ModelConfig, name: str) -> int:
    """Takes arguments as `arguments.add_bench` defines them, none missing. Raises InternVLError, KeyboardInterrupt.

    model: what an engine loads, with its configuration and its name in the results.
    """
    device = choose_device(args.device)
    _check_cases(args, config)
    plots = getattr(args, "plots", None)  # of `serve` there is no picture
    check_plots(plots)
    dtype = choose_dtype(args.dtype, config, device)
    kind = str(dtype).removeprefix("torch.")
    if args.quantization:
        kind += f"-{args.quantization}"  # rows are named after it
    if args.kv_cache_dtype != "auto":
        kind += f"-kv-{args.kv_cache_dtype}"
    print(render_card(model_card(config, name)), flush=True)
    kv_dtype = choose_kv_dtype(args.kv_cache_dtype, config, dtype)
    print_floors(args.part, config, dtype, device, choose_quantization(config, args.quantization), kv_dtype)
    prefix = f"{args.part}/{name.removeprefix(RANDOM_PREFIX).rsplit('/', 1)[-1]}"
    columns, on = COLUMNS[args.part], tuple(dict.fromkeys(args.experiments))
    if args.part == "serve" and args.http:
        columns = serve.HTTP_COLUMNS
    record = Record(args.part, prefix, kind, device, args.budget_s, columns, args.switches, on, plots)
    with record:
        start_s = time.perf_counter()
        options = _engine_options(args, config, device)
        with Engine.from_pretrained(
            model, **device_and_numbers(args), seed=args.seed, experiments=on, **args.switches, **options
        ) as engine:
            load_s = time.perf_counter() - start_s
            table({"loaded in": f"{load_s:.1f} s"})
            record.note(
                "load",
                {
                    "model": name,
                    "dtype": kind,
                    "load_s": load_s,
                    "weight_bytes": engine.memory.weight_bytes,
                    "kv_bytes_per_token": kv_block_bytes(config.decoder, engine.cache.dtype, 1),
                    "kv_cache_bytes": engine.memory.cache_bytes,
                    "tokens_per_tile": config.tokens_per_tile,
                    **peak(device),
                },
            )
            _sweep(args, engine, record)
    return 0


def print_floors(
    part: str,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Prints the least time that the work of some passes takes: computed, not measured.

    Products with quantised weights are counted at the rate of dense ones, as if they were multiplied out.
    """
    roof = roof_of(device, dtype) or data_sheet_roof(SHEET, dtype)
    assert roof is not None, "its data sheet is known"
    decoder = config.decoder
    of_vision, of_layers = layer_bytes(shape_weights(config, dtype, find_schemes(config, quantization)))
    of_decoder = of_layers, kv_dtype

    def decode_ms(batch: int, context: int) -> float:
        return 1e3 * roof.floor_s(decoder_work(decoder, dtype, [1] * batch, [context] * batch, batch, *of_decoder))

    def prefill_ms(num_tokens: int) -> float:
        return 1e3 * roof.floor_s(decoder_work(decoder, dtype, [num_tokens], [num_tokens], 1, *of_decoder))

    found = {
        "vision": [(f"{n} tiles", 1e3 * roof.floor_s(vision_work(config, dtype, n, of_vision))) for n in (1, 7, 13)],
        "prefill": [(f"{n:,} tokens", prefill_ms(n)) for n in (128, 2048, 8192)],
        "decode": [(f"batch {n}, {c:,} tokens", decode_ms(n, c)) for n, c in ((1, 2048), (64, 2048), (1, 32000))],
    }
    rows = {"floors": f"computed from {roof.name}"}
    for name in found if part == "serve" else [part]:
        rows[f"  {name}"] = ", ".join(f"{case}: {floor_ms:.3g} ms" for case, floor_ms in found[name])
    table(rows)


def _check_cases(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raises RequestError if no case can be measured, whatever the memory: the model is not loaded to find that out."""
    window = config.decoder.max_position
    if args.part == "vision" and min(args.tiles) > MAX_TILES_PER_PASS:
        raise RequestError(f"a pass has at most {MAX_TILES_PER_PASS} tiles, got --tiles {min(args.tiles)}; lower it")
    if args.part == "prefill":
        shortest = min(num for _, num, _ in prefill.prompt_lengths(args.tokens, args.tiles, config.tokens_per_tile))
        if shortest >= window:
            raise RequestError(
                f"the shortest prompt has {shortest:,} tokens, but the model's window {window:,}; lower --tokens"
            )
    if args.part == "decode":
        shortest = min(args.context) + decode.room_for(1, 1, args.tokens, 1)  # at least
        if shortest > window:
            raise RequestError(
                f"the shortest sequence gets {shortest:,} tokens, but the model's window has {window:,}; lower "
                "--context or --tokens"
            )


def _engine_options(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Returns the options that each bench needs; caches are off unless reuse is measured."""
    window = config.decoder.max_position
    if args.part == "serve":
        return {"max_num_seqs": args.max_num_seqs, "capture_all": True}  # as for a server
    alone: dict[str, Any] = {"prefix_cache": False, "visual_cache_bytes": 0, "max_num_seqs": 1}
    if args.part == "vision":
        return alone | {"max_model_len": min(window, 1024)}
    if args.part == "prefill":
        lengths = [num for _, num, _ in prefill.prompt_lengths(args.tokens, args.tiles, config.tokens_per_tile)]
        return alone | {"max_model_len": min(window, 1 + max(lengths))}
    options = EngineOptions()
    slower = options.double_cost_context(config.decoder, device)
    length = decode.longest(_decode_cases(args), args.tokens, options.tokens_per_step(device), window, slower)
    return alone | {"max_num_seqs": max(args.batch), "max_model_len": length}


def _decode_cases(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Puts the short contexts first: they take the least time."""
    return [(batch, context) for context in sorted(args.context) for batch in args.batch]


def _sweep(args: argparse.Namespace, engine: Engine, record: Record) -> None:
    pace = QUICK_PACE if args.quick else PACE
    match args.part:
        case "vision":
            vision.sweep_vision(engine, record, args.tiles, pace, args.seed)
        case "prefill":
            prefill.sweep_prefill(engine, record, args.tokens, args.tiles, pace, args.seed)
        case "decode":
            decode.sweep_decode(engine, record, _decode_cases(args), args.tokens, args.seed)
        case _:
            cases = [serve.Case(rate=rate) for rate in args.rates]
            cases += [serve.Case(callers=callers) for callers in args.concurrency]
            serve.sweep_serve(engine, record, cases, args.seconds, args.seed, http=args.http)
