"""Makes quantised checkpoints of dense ones: FP8, or 4 bits with activation-aware scales from prompts with pictures.

The names below load on first use, so that arguments are checked without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_rt.quantize.agreement import Agreement
    from internvl_rt.quantize.options import QuantiseOptions
    from internvl_rt.quantize.quantising import LayerError, Quantised, quantise

__all__ = ["Agreement", "LayerError", "QuantiseOptions", "Quantised", "quantise"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'internvl_rt.quantize' has no attribute {name!r}")
    from internvl_rt.quantize import quantising

    return getattr(quantising, name)
