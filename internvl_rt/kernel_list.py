"""`internvl-rt kernels`: the catalogue of operations as a list, or a page on each that a pattern names."""

import argparse
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from inspect import Parameter, Signature
from textwrap import indent, wrap
from typing import Any

import torch

from internvl_rt.errors import RequestError
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels.catalogue import Kernel, catalogue, preferred_dtype

WIDTH = 100


def run(args: argparse.Namespace) -> int:
    """Prints a line for each operation, or all that is known of those named. Raises RequestError if there is none."""
    found = catalogue()
    asked = [kernel for name, kernel in found.items() if any(fnmatchcase(name, each) for each in args.patterns)]
    if args.patterns and not asked:
        raise RequestError(f"no operation {args.patterns[0]!r}; there are {', '.join(found)}")
    kernels = asked or [*found.values()]
    if args.json:
        print(json.dumps([describe(kernel) for kernel in kernels], indent=2))
    elif asked:
        print("\n\n".join(map(render, kernels)))
    else:
        print("\n".join(f"{kernel.name:<20}{kernel.formula}" for kernel in kernels))
        print("\ninternvl-rt kernels NAME says how to call one; internvl-rt bench kernels NAME measures it.")
    return 0


def describe(kernel: Kernel) -> dict[str, Any]:
    """Returns all that the catalogue holds, for programs."""
    dtype = preferred_dtype(kernel.spec)
    return {
        "name": kernel.name,
        "formula": kernel.formula,
        "import": kernel.import_line,
        "signature": f"{kernel.name}{kernel.signature}",
        "dims": kernel.dims,
        "dtypes": [_short(each) for each in kernel.dtypes],
        "architectures": list(kernel.architectures),
        "used_by": kernel.used_by,
        "in_place": list(kernel.spec.in_place),
        "tolerances": {
            _short(each): {"rtol": t.rtol, "atol": t.atol, "rms": t.rms, "reason": t.reason}
            for each in kernel.dtypes
            for t in [kernel.tolerance(each)]
        },
        "cases": [
            {"name": case.name, "shapes": kernel.shapes(case), "bytes": cost.bytes, "flops": cost.flops}
            for case in kernel.cases
            for cost in [kernel.cost(case, dtype)]
        ],
    }


def render(kernel: Kernel) -> str:
    exact = ["    equal to the reference to the bit"] if kernel.spec.exact else []
    tolerances = [
        f"    {_short(dtype):<10} {t.rtol:g} of the value + {t.atol:g}, rms {t.rms:g}: {t.reason}"
        for dtype in kernel.dtypes
        for t in [kernel.tolerance(dtype)]
    ]
    case = min(kernel.cases, key=lambda each: kernel.cost(each, preferred_dtype(kernel.spec)).bytes)
    lines = [
        kernel.name,
        *wrap(kernel.formula, WIDTH, initial_indent="  ", subsequent_indent="  "),
        *([indent(kernel.notes, "  ")] if kernel.notes else []),
        "",
        f"  {kernel.import_line}",
        f"  {kernel.name}(",
        *(f"      {parameter}," for parameter in _parameters(kernel.signature)),
        "  )",
        *(f"  writes {name} in place" for name in kernel.spec.in_place),
        "  dimensions: internvl_rt/kernels/_contract.py has the letters; reference: the same arguments, any device",
        f"  called by {kernel.used_by or 'no model'}",
        f"  compiled and inspected for {', '.join(kernel.architectures)}",
        "  how far from the reference in float64:",
        *(exact or tolerances),
        f"  {len(kernel.cases)} cases of real models; the smallest:",
        *_case(kernel, case),
    ]
    return "\n".join(lines)


def _case(kernel: Kernel, case: Case) -> list[str]:
    dtype = preferred_dtype(kernel.spec)
    cost = kernel.cost(case, dtype)
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in kernel.shapes(case).items())
    return [
        f"    {kernel.name}/{case.name}/{_short(dtype)}: at least {cost.bytes:,} bytes and {cost.flops:,} operations",
        *wrap(shapes, WIDTH, initial_indent="    ", subsequent_indent="    "),
    ]


def _parameters(signature: Signature) -> Iterator[str]:
    for name, parameter in signature.parameters.items():
        if parameter.kind is Parameter.KEYWORD_ONLY and name == _first_keyword(signature):
            yield "*"
        yield re.sub(r"\b(torch|collections\.abc|internvl_rt\.kernels\._?\w+)\.", "", str(parameter))


def _first_keyword(signature: Signature) -> str:
    return next(name for name, each in signature.parameters.items() if each.kind is Parameter.KEYWORD_ONLY)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
