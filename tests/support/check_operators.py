"""Holds every registered operator to torch's own rules for operators, on CPU tensors.

    python tests/support/check_operators.py

Prints the names of those that torch refuses, with what it says; exit code 1 if there are any.
"""

import sys
from pathlib import Path

import torch
from torch import library

sys.path.insert(0, str(Path(__file__).parents[1]))
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.operators import register_operators
from support.specs import smallest_test_case

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def main() -> int:
    refused, specs = {}, discover_specs()
    for name in register_operators():
        spec, operator = specs[name], getattr(torch.ops.internvl_rt, name).default
        dtype = torch.float32 if torch.float32 in spec.tolerances else next(iter(spec.tolerances))
        torch.manual_seed(0)
        inputs = spec.make_inputs(smallest_test_case(spec, dtype), dtype, torch.device("cpu"))
        known = {argument.name for argument in operator._schema.arguments}
        given = {key: value for key, value in inputs.items() if key in known}
        # torch's check of what an operator writes compares its inputs, which torch cannot do in FP8.
        in_fp8 = torch.float8_e4m3fn in [value.dtype for value in given.values() if isinstance(value, torch.Tensor)]
        try:
            library.opcheck(operator, (), given, test_utils=CHECKS[in_fp8:])
        except Exception as error:  # of several kinds
            refused[name] = str(error)
    for name, why in refused.items():
        print(f"{name}: {why}", file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
