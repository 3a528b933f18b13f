"""A model's card: the sizes and limits that follow from its config.json alone, and how this CPU would compute it."""

from typing import Any

import torch

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.processor import default_dtype, instructions
from internvl_rt.model.work import kv_bytes_per_token

GPUS_GIB = (24, 48, 80, 141)  # memory of common GPUs

# The options of an engine with which logits change, by more than what rounding does or by rounding alone.
CHANGES_RESULTS = (
    *("dtype", "v2pe_delta", "max_tiles", "number_images", "exif", "alpha"),
    *("backend", "num_threads", "batch_invariant"),
)


def model_card(config: ModelConfig, name: str) -> dict[str, Any]:
    """Returns sizes and limits as plain values for JSON. It counts parameters on the meta device, so nothing is loaded.

    `fits` says for each size of GPU memory whether 16-bit weights fit, and at most how many tokens of 16-bit KV cache
    fit beside them. Activations and the CUDA context leave room for fewer. `cpu` says in what an engine on this
    machine's CPU computes by default, and `changes_results` names the options of an engine with which logits change.
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
        "context_window": config.decoder.max_position,
        "tile_side_pixels": config.vision.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        "max_tiles_per_picture": tiles,
        "max_tokens_per_picture": tiles * config.tokens_per_tile,
        "fits": [
            {"gib": gib, "weights_fit": 2 * total < gib << 30, "kv_tokens": max(0, (gib << 30) - 2 * total) // kv_bytes}
            for gib in GPUS_GIB
        ],
        "cpu": {"dtype": str(default_dtype()).removeprefix("torch."), "instructions": instructions()},
        "changes_results": list(CHANGES_RESULTS),
    }


def render_card(card: dict[str, Any]) -> str:
    """Renders the card as a table for people."""
    parameters, weights = card["parameters"], card["weight_bytes"]
    small, large = (format_bytes(weights[dtype]) for dtype in ("bfloat16", "float32"))
    parts = ", ".join(f"{part} {_millions(parameters[part])}" for part in ("vision", "projector", "decoder"))
    rows = [
        ("model", f"{card['name']} ({card['format']} format)"),
        ("parameters", f"{_millions(parameters['total'])}: {parts}"),
        ("weights", f"{small} in bfloat16 or float16, {large} in float32"),
        ("KV cache", f"{card['kv_bytes_per_token'] / 1024:.0f} KiB per token in bfloat16"),
        ("context window", f"{card['context_window']:,} tokens"),
        ("tile", f"{card['tile_side_pixels']} pixels a side, {card['tokens_per_tile']} tokens"),
        ("picture", f"at most {card['max_tiles_per_picture']} tiles, {card['max_tokens_per_picture']:,} tokens"),
    ]
    for fit in card["fits"]:
        left = f"16-bit weights and up to {fit['kv_tokens']:,} tokens of KV cache"
        rows.append((f"{fit['gib']} GiB GPU", left if fit["weights_fit"] else "too small for 16-bit weights"))
    cpu = card["cpu"]
    rows.append(("on this CPU", f"{cpu['dtype']} by default, as the processor has {cpu['instructions']}"))
    rows.append(("change results", ", ".join(card["changes_results"])))
    return "\n".join(f"{label:<15} {text}" for label, text in rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):,.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):,.1f} MiB"
