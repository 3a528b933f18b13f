"""Picks the smallest case of an operation, for tests that need any."""

import torch

from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels.catalogue import preferred_dtype

LEAST_BYTES = 2000  # a smaller test case has no rows, or one row of one element


def smallest_model_case(spec: KernelSpec) -> tuple[Case, torch.dtype]:
    """Returns the model case that moves the fewest bytes, of those without sinks, which most models do not have."""
    dtype, cases = preferred_dtype(spec), [case for case in spec.model_cases if "sinks" not in case.sizes]
    return min(cases, key=lambda case: spec.cost(case, dtype).bytes), dtype


def smallest_test_case(spec: KernelSpec, dtype: torch.dtype) -> Case:
    """Returns the test case that moves the fewest bytes but at least LEAST_BYTES, or else the largest case."""
    by_bytes = sorted(spec.test_cases, key=lambda case: spec.cost(case, dtype).bytes)
    return next((case for case in by_bytes if spec.cost(case, dtype).bytes >= LEAST_BYTES), by_bytes[-1])
