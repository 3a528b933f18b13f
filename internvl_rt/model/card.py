"""A model's card: the sizes and limits that follow from its config.json alone, and how this CPU would compute it."""

from collections.abc import Mapping
from dataclasses import replace
from textwrap import wrap
from typing import Any, NamedTuple

import torch

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.quantization import FOUR_BITS, Quantization, Scheme, cast
from internvl_rt.errors import ConfigError
from internvl_rt.model.internvl import build_weights, layer_bytes, named_parameters
from internvl_rt.model.processor import default_dtype, instructions
from internvl_rt.model.shard import Shard, check_size, shard_decoder, vocabulary_of
from internvl_rt.model.weights import find_schemes, shape_weights
from internvl_rt.model.work import Work, data_sheet_roof, decoder_work, kv_block_bytes

GPUS_GIB = (24, 48, 80, 141)  # memory of common GPUs
FASTEST = "NVIDIA H200"  # whose least time of a decode step is told
CONTEXT = 2048  # tokens of the one sequence of that step

# The options of an engine with which logits change, by more than what rounding does or by rounding alone.
CHANGES_RESULTS = (
    *("dtype", "quantization", "quantize_vision", "kv_cache_dtype", "v2pe_delta", "max_tiles", "number_images", "exif"),
    *("alpha", "backend", "num_threads", "tensor_parallel_size", "expert_parallel"),
    "batch_invariant",
)


class _Part(NamedTuple):
    """What one GPU holds of a model, and the least work of its decode step."""

    weight_bytes: int
    kv_bytes: int  # of a token
    step: Work


def model_card(config: ModelConfig, name: str, num_gpus: int = 1) -> dict[str, Any]:
    """Returns sizes and limits as plain values for JSON. It counts parameters on the meta device, so nothing is loaded.

    `held` says for each way to hold the weights how many bytes they take, what a decode step of one sequence of 2,048
    tokens takes at least on an H200, and for each size of GPU memory whether they fit, and at most how many tokens of
    16-bit KV cache fit beside them. Activations and the CUDA context leave room for fewer. `cpu` says in what an engine
    on this machine's CPU computes by default, and `changes_results` names the options of an engine with which logits
    change.

    num_gpus: among how many GPUs the model is split, as `tensor_parallel_size` splits it. If there are several, `held`
    is of the GPU that holds the most, or the one that needs the most time, and `each_gpu` has the bytes of its KV
    cache; where weights cannot be split so, `held` says why instead. Sums between GPUs take no time here.

    Raises RequestError for more GPUs than the model can be split among, and ConfigError if a quantised one cannot be.
    """
    check_size(config.decoder, num_gpus)
    counts = {"vision": 0, "projector": 0, "decoder": 0}
    for path, tensor in named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta")).items():
        part = path.partition(".")[0]
        counts[part] = counts.get(part, 0) + tensor.numel()
    total = sum(counts.values())
    kv_bytes, window = kv_block_bytes(config.decoder, torch.bfloat16, 1), config.decoder.window
    tiles = config.max_tiles + (config.thumbnail and config.max_tiles > 1)  # the thumbnail is one more
    each_gpu = {"each_gpu": {"num_gpus": num_gpus, **_kv_of_each(config, num_gpus)}} if num_gpus > 1 else {}
    return {
        "name": name,
        "format": config.format,
        "parameters": {**counts, "total": total},
        "weight_bytes": {"bfloat16": 2 * total, "float16": 2 * total, "float32": 4 * total},
        "kv_bytes_per_token": kv_bytes,
        "kv_bytes_per_token_in_8_bits": kv_block_bytes(config.decoder, torch.int8, 1),
        **({} if window is None else {"kv_bytes_per_sequence": window * kv_bytes}),
        "context_window": config.decoder.max_position,
        "tile_side_pixels": config.vision.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        **({} if config.flash is None else {"tokens_per_compressed_tile": config.least_tokens_per_tile}),
        "max_tiles_per_picture": tiles,
        "max_tokens_per_picture": tiles * config.tokens_per_tile,
        "held": [
            {"in": name, **_held(config, quantization, num_gpus)}
            for name, quantization in _ways_to_hold(config).items()
        ],
        **each_gpu,
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


def _kv_of_each(config: ModelConfig, num_gpus: int) -> dict[str, int]:
    decoders = [shard_decoder(config.decoder, Shard(rank, num_gpus)) for rank in range(num_gpus)]
    return {
        f"kv_bytes_per_token{suffix}": max(kv_block_bytes(decoder, dtype, 1) for decoder in decoders)
        for suffix, dtype in (("", torch.bfloat16), ("_in_8_bits", torch.int8))
    }


def _held(config: ModelConfig, quantization: Quantization | None, num_gpus: int) -> dict[str, Any]:
    schemes = find_schemes(config, quantization)
    try:
        parts = {_part(config, schemes, Shard(rank, num_gpus)) for rank in range(num_gpus)}
    except ConfigError as error:
        if num_gpus == 1 or config.quantization is not None:
            raise
        return {"cannot_be_split": str(error)}
    roof = data_sheet_roof(FASTEST, torch.bfloat16)
    assert roof is not None, "its data sheet is known"
    num_bytes = max(part.weight_bytes for part in parts)
    fits = [
        {
            "gib": gib,
            "weights_fit": num_bytes < gib << 30,
            "kv_tokens": min(max(0, (gib << 30) - part.weight_bytes) // part.kv_bytes for part in parts),
        }
        for gib in GPUS_GIB
    ]
    seconds = max(roof.floor_s(part.step) for part in parts)
    return {"weight_bytes": num_bytes, "decode_ms_at_least": 1e3 * seconds, "fits": fits}


def _part(config: ModelConfig, schemes: Mapping[str, Scheme], shard: Shard) -> _Part:
    dtype = torch.bfloat16
    weights = shape_weights(config, dtype, schemes, shard)
    vocabulary, decoder = vocabulary_of(config.decoder, shard), shard_decoder(config.decoder, shard)
    decoder = replace(decoder, vocab_size=vocabulary.stop - vocabulary.start)
    return _Part(
        weight_bytes=sum(tensor.nbytes for tensor in named_parameters(weights).values()),
        kv_bytes=kv_block_bytes(decoder, dtype, 1),
        step=decoder_work(decoder, dtype, [1], [CONTEXT], 1, layer_bytes(weights)[1]),
    )


def render_card(card: dict[str, Any]) -> str:
    """Renders the card as a table for people."""
    parameters, weights, each = card["parameters"], card["weight_bytes"], card.get("each_gpu")
    num_gpus = 1 if each is None else each["num_gpus"]
    small, large = (format_bytes(weights[dtype]) for dtype in ("bfloat16", "float32"))
    parts = ", ".join(f"{part} {_millions(count)}" for part, count in parameters.items() if part != "total")
    per_tile = f"{card['tokens_per_tile']} tokens"
    if "tokens_per_compressed_tile" in card:
        per_tile += f", or {card['tokens_per_compressed_tile']} of a compressed one"
    kv_cache = "{:.0f} KiB per token in bfloat16, {:.1f} in FP8 or int8".format(*_kv_kib(card))
    if each is not None:
        kv_cache += "; {:g} and {:.1f} on each of {} GPUs".format(*_kv_kib(each), num_gpus)
    rows = [
        ("model", f"{card['name']} ({card['format']} format)"),
        ("parameters", f"{_millions(parameters['total'])}: {parts}"),
        ("weights", f"{small} in bfloat16 or float16, {large} in float32"),
        ("KV cache", kv_cache),
        ("context window", f"{card['context_window']:,} tokens"),
        ("tile", f"{card['tile_side_pixels']} pixels a side, {per_tile}"),
        ("picture", f"at most {card['max_tiles_per_picture']} tiles, {card['max_tokens_per_picture']:,} tokens"),
    ]
    if "kv_bytes_per_sequence" in card:
        rows.insert(4, ("", f"and {format_bytes(card['kv_bytes_per_sequence'])} for the windows of each sequence"))
    cpu = card["cpu"]
    rows.append(("on this CPU", f"{cpu['dtype']} by default, as the processor has {cpu['instructions']}"))
    lines = [f"{label:<15} {text}" for label, text in rows]
    changes = ", ".join(card["changes_results"])
    lines += wrap(changes, 115, initial_indent=f"{'change results':<15} ", subsequent_indent=" " * 16)
    heads = [f"{gib} GiB GPU" for gib in GPUS_GIB]
    whose, how_many = ("weights", "an") if each is None else ("weights each", str(num_gpus))
    lines += ["", _columns("held in", whose, *heads, f"decode on {how_many} {FASTEST.removeprefix('NVIDIA ')}")]
    for held in card["held"]:
        if "cannot_be_split" in held:
            lines.append(f"{held['in']:<15} cannot be split so")
            continue
        fits = [f"{fit['kv_tokens']:,}" if fit["weights_fit"] else "too small" for fit in held["fits"]]
        least = f"{held['decode_ms_at_least']:.3g} ms at least"
        lines.append(_columns(held["in"], format_bytes(held["weight_bytes"]), *fits, least))
    lines.append("under a GPU: the tokens of KV cache that fit beside the weights, before activations")
    if each is not None:
        whole = "each GPU holds the vision tower, the projector and the embedding whole"
        lines.append(f"{whole}; the time is without sums between GPUs")
    return "\n".join(lines)


def _kv_kib(card: dict[str, Any]) -> tuple[float, float]:
    return card["kv_bytes_per_token"] / 1024, card["kv_bytes_per_token_in_8_bits"] / 1024


def _columns(first: str, *others: str) -> str:
    return f"{first:<15} " + " ".join(f"{other:>13}" for other in others[:-1]) + f"  {others[-1]:>20}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):,.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):,.1f} MiB"
