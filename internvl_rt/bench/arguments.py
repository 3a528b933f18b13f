"""Defines the arguments of `internvl-rt bench` and their defaults. Nothing heavy is imported here."""

import argparse
from collections.abc import Callable
from typing import Any

from internvl_rt.errors import RequestError

MODEL_HELP = "a folder, a hub id, 'tiny', or random:InternVL3-8B: random weights of that shape, without a file"
PARTS = {
    "vision": "passes of the vision tower over the tiles of a picture",
    "prefill": "the time to the first token, by the length of the prompt",
    "decode": "the time of each token after the first, by batch and context",
    "serve": "requests that arrive at random, through the asynchronous engine",
}
# Engine options that can be turned off, to see their worth or find a fault, each with the effect of that.
SWITCHES = {
    "cuda_graphs": "launch kernels one by one, not as CUDA graphs",
    "programmatic_launch": "start no kernel before the one before it has ended",
}
# Of each argument: a description, the default, and the default with --quick.
SETTINGS: dict[str, dict[str, tuple[str, Any, Any]]] = {
    "vision": {"tiles": ("tiles of a pass", [*range(1, 14)], [1, 3])},
    "prefill": {
        "tokens": ("prompt lengths", [128, 256, 512, 1024, 2048, 4096, 8192], [128, 256]),
        "tiles": ("pictures of so many tiles besides", [1, 7, 13], [2]),
    },
    "decode": {
        "batch": ("sequences that decode together", [1, 8, 64], [1, 4]),
        "context": ("tokens of each of them", [2048, 32000], [256]),
        "tokens": ("steps that are timed", 64, 8),
    },
    "serve": {
        "rates": ("requests a second, one rate after the other", [4.0, 16.0, 64.0], [8.0]),
        "seconds": ("of arrivals at each rate", 8.0, 1.0),
        "max-num-seqs": ("sequences that run together", 64, 64),
    },
}


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser(
        "bench",
        help="measure a model on this machine",
        description="Prints a model's static card, measures, and ends with one line of JSON.",
    )
    parts = bench.add_subparsers(title="what to measure", required=True, metavar="PART")
    for part, about in PARTS.items():
        parser = parts.add_parser(part, help=about, description=f"Measures {about}.")
        parser.set_defaults(run=_run, part=part)
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
        for name, (what, value, _) in SETTINGS[part].items():
            default = ",".join(f"{each:g}" for each in value) if isinstance(value, list) else f"{value:g}"
            kind = _list_of(type(value[0])) if isinstance(value, list) else _above_zero(type(value))
            metavar = "N,N,..." if isinstance(value, list) else "N"
            parser.add_argument(f"--{name}", metavar=metavar, type=kind, help=f"{what} (default: {default})")
        parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
        parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: by device)")
        parser.add_argument(
            "--budget-s",
            metavar="S",
            type=_above_zero(float),
            help="what has not begun after so many seconds is left out",
        )
        for name, what in SWITCHES.items():
            flag = f"--no-{name.replace('_', '-')}"
            parser.add_argument(flag, dest=name, action="store_false", help=f"{what}, on CUDA; rows are named after it")
        parser.add_argument("--quick", action="store_true", help="few small cases, to see that everything works")
    kernels = parts.add_parser("kernels", help="single kernels: a script of the repository")
    kernels.set_defaults(run=_kernels)


def _run(args: argparse.Namespace) -> int:
    from internvl_rt.bench.command import run

    for name, (_, value, quick_value) in SETTINGS[args.part].items():
        attribute = name.replace("-", "_")
        if getattr(args, attribute) is None:
            setattr(args, attribute, quick_value if args.quick else value)
    args.switches = {name: getattr(args, name) for name in SWITCHES}
    return run(args)


def _kernels(args: argparse.Namespace) -> int:
    raise RequestError(
        "single kernels are measured against others that the package does not need, so their bench is not in it; in a "
        "checkout of the repository run: python bench/kernel_table.py"
    )


def _above_zero(kind: type) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    return number


def _list_of(kind: type) -> Callable[[str], list[Any]]:
    one = _above_zero(kind)

    def numbers(text: str) -> list[Any]:
        return [one(part) for part in text.split(",")]

    return numbers
