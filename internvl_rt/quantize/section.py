"""The quantization_config of what `quantise` writes, as llm-compressor's reader and vLLM know it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.json_section import Section
from internvl_rt.checkpoint.quantization import Quantization, read_quantization
from internvl_rt.model.dialects import Dialect
from internvl_rt.quantize.options import QuantiseOptions

_VERSION = "0.20.0"  # of compressed-tensors, whose fields these are
_NOT_SAID: dict[str, Any] = {"block_structure": None, "actorder": None, "observer_kwargs": {}}


def build_section(options: QuantiseOptions, dialect: Dialect) -> dict[str, Any]:
    """Returns the quantization_config of a folder in this naming.

    Patterns begin with `.*`, since transformers and vLLM put different prefixes before the names of a file.
    """
    vision, projector = _pattern(dialect.vision_prefix), _pattern(dialect.projector_prefix or "mlp1.")
    ignore = [f"re:.*{re.escape(dialect.lm_head.rpartition('.')[2])}$", projector]
    fp8, int4 = _fp8(), _int4(options)
    if not options.vision:
        groups, ignore = {"group_0": fp8 if options.scheme == "fp8" else int4}, [*ignore, vision]
    elif options.scheme == "fp8":
        groups = {"group_0": fp8}
    else:
        groups = {"group_0": fp8 | {"targets": [vision]}, "group_1": int4}
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": ignore,
    }


def parse_section(section: Mapping[str, Any]) -> Quantization:
    """Returns what the loader makes of a quantization_config."""
    found = read_quantization(Section(Path("config.json"), "", {"quantization_config": section}))
    assert found is not None
    return found


def _pattern(prefix: str) -> str:
    """Returns a pattern of all modules below a prefix of tensors' names, whatever stands before its last part."""
    return f"re:.*{re.escape(prefix.strip('.').rpartition('.')[2])}\\..*"


def _fp8() -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, **_NOT_SAID}
    inputs = {**number, "strategy": "token", "dynamic": True, "observer": None}
    weights = {**number, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    return _group("float-quantized", weights, inputs)


def _int4(options: QuantiseOptions) -> dict[str, Any]:
    number = {"num_bits": 4, "type": "int", "symmetric": not options.asymmetric, "group_size": options.group}
    return _group(
        "pack-quantized", {**number, **_NOT_SAID, "strategy": "group", "dynamic": False, "observer": "minmax"}, None
    )


def _group(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "format": form,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
