"""Answers what tests and benches ask about every operation's `SPEC`."""

import torch

from internvl_rt.kernels._check import arguments_of, discover_specs
from internvl_rt.kernels._contract import Case, KernelSpec

__all__ = ["arguments_of", "discover_specs", "preferred_dtype", "smallest_model_case", "smallest_test_case"]

LEAST_BYTES = 2000  # a smaller test case has no rows, or one row of one element


def preferred_dtype(spec: KernelSpec) -> torch.dtype:
    """Returns bfloat16, or the operation's first data type where it has no bfloat16."""
    return torch.bfloat16 if torch.bfloat16 in spec.tolerances else next(iter(spec.tolerances))


def smallest_model_case(spec: KernelSpec) -> tuple[Case, torch.dtype]:
    """Returns the model case that moves the fewest bytes."""
    dtype = preferred_dtype(spec)
    return min(spec.model_cases, key=lambda case: spec.cost(case, dtype).bytes), dtype


def smallest_test_case(spec: KernelSpec, dtype: torch.dtype) -> Case:
    """Returns the test case that moves the fewest bytes but at least LEAST_BYTES, or else the largest case."""
    by_bytes = sorted(spec.test_cases, key=lambda case: spec.cost(case, dtype).bytes)
    return next((case for case in by_bytes if spec.cost(case, dtype).bytes >= LEAST_BYTES), by_bytes[-1])
