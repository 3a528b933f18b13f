"""A model's card: the sizes and limits that follow from its config.json alone, and how this CPU would compute it."""

from textwrap import wrap
from typing import Any

import torch

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.quantization import FOUR_BITS, Quantization, cast
from internvl_rt.model.internvl import build_weights, layer_bytes, named_parameters
from internvl_rt.model.processor import default_dtype, instructions
from internvl_rt.model.weights import find_schemes, shape_weights
from internvl_rt.model.work import data_sheet_roof, decoder_work, kv_bytes_per_token

GPUS_GIB = (24, 48, 80, 141)  # memory of common GPUs
FASTEST = "NVIDIA H200"  # whose least time of a decode step is told
CONTEXT = 2048  # tokens of the one sequence of that step

# The options of an engine with which logits change, by more than what rounding does or by rounding alone.
CHANGES_RESULTS = (
    *("dtype", "quantization", "quantize_vision", "kv_cache_dtype", "v2pe_delta", "max_tiles", "number_images", "exif"),
    *("alpha", "backend", "num_threads", "batch_invariant"),
)


def model_card(config: ModelConfig, name: str) -> dict[str, Any]:
    """Returns sizes and limits as plain values for JSON. It counts parameters on the meta device, so nothing is loaded.

    `held` says for each way to hold the weights how many bytes they take, what a decode step of one sequence of 2,048
    tokens takes at least on an H200, and for each size of GPU memory whether they fit, and at most how many tokens of
    16-bit KV cache fit beside them. Activations and the CUDA context leave room for fewer. `cpu` says in what an engine
    on this machine's CPU computes by default, and `changes_results` names the options of an engine with which logits
    change.
    """
    counts = {"vision": 0, "projector": 0, "decoder": 0}
    for path, tensor in named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta")).items():
        counts[path.partition(".")[0]] += tensor.numel()
    total = sum(counts.values())
    kv_bytes = kv_bytes_per_token(config.decoder, torch.bfloat16)
    tiles = config.max_tiles + (config.thumbnail and config.max_tiles > 1)  # the thumbnail is one more
    return {
        "name": name,
        "format": config.format,
        "parameters": {**counts, "total": total},
        "weight_bytes": {"bfloat16": 2 * total, "float16": 2 * total, "float32": 4 * total},
        "kv_bytes_per_token": kv_bytes,
        "kv_bytes_per_token_in_8_bits": kv_bytes_per_token(config.decoder, torch.int8),
        "context_window": config.decoder.max_position,
        "tile_side_pixels": config.vision.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        "max_tiles_per_picture": tiles,
        "max_tokens_per_picture": tiles * config.tokens_per_tile,
        "held": [
            {"in": name, **_held(config, quantization, kv_bytes)}
            for name, quantization in _ways_to_hold(config).items()
        ],
        "cpu": {"dtype": str(default_dtype()).removeprefix("torch."), "instructions": instructions()},
        "changes_results": list(CHANGES_RESULTS),
    }


def _ways_to_hold(config: ModelConfig) -> dict[str, Quantization | None]:
    """Returns how weights can be held, by name: as they are stored, if they are quantised, else in three ways."""
    if config.quantization is not None:
        schemes = [scheme for _, scheme in config.quantization.groups]
        kinds = {"FP8" if one.is_float else "int8" if one.bits == 8 else "4 bits" for one in schemes}
        return {" and ".join(sorted(kinds)): config.quantization}
    return {"bfloat16": None, "FP8": cast("fp8", vision=False), "4 bits": FOUR_BITS}


def _held(config: ModelConfig, quantization: Quantization | None, kv_bytes: int) -> dict[str, Any]:
    dtype = torch.bfloat16
    weights = shape_weights(config, dtype, find_schemes(config, quantization))
    num_bytes = sum(tensor.nbytes for tensor in named_parameters(weights).values())
    roof = data_sheet_roof(FASTEST, dtype)
    assert roof is not None, "its data sheet is known"
    step = decoder_work(config.decoder, dtype, [1], [CONTEXT], 1, layer_bytes(weights)[1])
    fits = [
        {"gib": gib, "weights_fit": num_bytes < gib << 30, "kv_tokens": max(0, (gib << 30) - num_bytes) // kv_bytes}
        for gib in GPUS_GIB
    ]
    return {"weight_bytes": num_bytes, "decode_ms_at_least": 1e3 * roof.floor_s(step), "fits": fits}


def render_card(card: dict[str, Any]) -> str:
    """Renders the card as a table for people."""
    parameters, weights = card["parameters"], card["weight_bytes"]
    small, large = (format_bytes(weights[dtype]) for dtype in ("bfloat16", "float32"))
    parts = ", ".join(f"{part} {_millions(parameters[part])}" for part in ("vision", "projector", "decoder"))
    kv, kv_in_8_bits = card["kv_bytes_per_token"], card["kv_bytes_per_token_in_8_bits"]
    rows = [
        ("model", f"{card['name']} ({card['format']} format)"),
        ("parameters", f"{_millions(parameters['total'])}: {parts}"),
        ("weights", f"{small} in bfloat16 or float16, {large} in float32"),
        ("KV cache", f"{kv / 1024:.0f} KiB per token in bfloat16, {kv_in_8_bits / 1024:.1f} in FP8 or int8"),
        ("context window", f"{card['context_window']:,} tokens"),
        ("tile", f"{card['tile_side_pixels']} pixels a side, {card['tokens_per_tile']} tokens"),
        ("picture", f"at most {card['max_tiles_per_picture']} tiles, {card['max_tokens_per_picture']:,} tokens"),
    ]
    cpu = card["cpu"]
    rows.append(("on this CPU", f"{cpu['dtype']} by default, as the processor has {cpu['instructions']}"))
    lines = [f"{label:<15} {text}" for label, text in rows]
    changes = ", ".join(card["changes_results"])
    lines += wrap(changes, 115, initial_indent=f"{'change results':<15} ", subsequent_indent=" " * 16)
    heads = [f"{gib} GiB GPU" for gib in GPUS_GIB]
    lines += ["", _columns("held in", "weights", *heads, f"decode on an {FASTEST.removeprefix('NVIDIA ')}")]
    for held in card["held"]:
        fits = [f"{fit['kv_tokens']:,}" if fit["weights_fit"] else "too small" for fit in held["fits"]]
        least = f"{held['decode_ms_at_least']:.3g} ms at least"
        lines.append(_columns(held["in"], format_bytes(held["weight_bytes"]), *fits, least))
    lines.append("under a GPU: the tokens of KV cache that fit beside the weights, before activations")
    return "\n".join(lines)


def _columns(first: str, *others: str) -> str:
    return f"{first:<15} " + " ".join(f"{other:>13}" for other in others[:-1]) + f"  {others[-1]:>20}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):,.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):,.1f} MiB"
