"""The forward pass and nothing above it: weights, the operations that they are multiplied with, and both towers.

It loads neither a tokenizer nor the scheduler, so that it can be used, tested, quantised and sharded alone.
"""

from internvl_rt.model.internvl import InternVL, ModelWeights, build_weights, named_parameters
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.weights import load_weights, save_weights

__all__ = [
    "TORCH",
    "InternVL",
    "ModelWeights",
    "Ops",
    "build_weights",
    "load_weights",
    "named_parameters",
    "save_weights",
    "triton_ops",
]
