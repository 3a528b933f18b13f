"""Defines the arguments of `internvl-rt bench` and their defaults. Nothing heavy is imported here."""

import argparse
from pathlib import Path
from typing import Any

from internvl_rt.arguments import Parser, above_zero, add_device, add_device_and_numbers, list_of, seed
from internvl_rt.errors import RequestError
from internvl_rt.server import check_libraries
from internvl_rt.terminal import importing

MODEL_HELP = "a folder, a hub id, 'tiny', or random:InternVL3-8B: random weights of that shape, without a file"
PARTS = {
    "vision": "passes of the vision tower over the tiles of a picture",
    "prefill": "the time to the first token, by the length of the prompt",
    "decode": "the time of each token after the first, by batch and context",
    "serve": "requests that are sent at random times, or one after the other, to the asynchronous engine",
}
# Engine options that can be turned off, to see their worth or find a fault, each with the effect of that.
SWITCHES = {
    "cuda_graphs": "launch kernels one by one, not as CUDA graphs",
    "programmatic_launch": "start no kernel before the one before it has ended",
}
# Changes to the kernels of a decode step that an engine's option `experiments` turns on, each with its effect.
EXPERIMENTS = {
    "prefetch_keys": "attention brings its first keys and values to L2 while the kernel before it runs",
    "prefetch_weights": "programs of attention that have nothing to do bring the next weights to L2",
    "early_trigger": "a kernel may start as soon as all programs of the one before it have",
    "tokens_to_host": "the kernel that draws tokens writes them to the host's memory",
}
# Of each argument: a description, the default, the default with --quick, and the most that is accepted.
SETTINGS: dict[str, dict[str, tuple[str, Any, Any, int]]] = {
    "vision": {"tiles": ("tiles of a pass", [*range(1, 14)], [1, 3], 128)},
    "prefill": {
        "tokens": ("prompt lengths", [128, 256, 512, 1024, 2048, 4096, 8192], [128, 256], 1 << 20),
        "tiles": ("pictures of so many tiles besides", [1, 7, 13], [2], 128),
    },
    "decode": {
        "batch": ("sequences that decode together", [1, 8, 64], [1, 4], 4096),
        "context": ("tokens of each of them", [2048, 32000], [256], 1 << 20),
        "tokens": ("steps that are timed", 64, 8, 100_000),
    },
    "serve": {
        "rates": (
            "requests a second that arrive at random, one rate after the other",
            [4.0, 16.0, 64.0],
            [8.0],
            10_000,
        ),
        "seconds": ("in which the requests of a case are sent", 8.0, 1.0, 86_400),
        "max-num-seqs": ("sequences that run together", 64, 64, 4096),
    },
}
MAX_ARRIVALS = 100_000  # at one rate
MAX_CALLERS = 1024  # so many requests may wait in an engine


def add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
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
        for name, (what, value, _, most) in SETTINGS[part].items():
            default = ",".join(f"{each:g}" for each in value) if isinstance(value, list) else f"{value:g}"
            kind = list_of(type(value[0]), most) if isinstance(value, list) else above_zero(type(value), most)
            metavar = "N,N,..." if isinstance(value, list) else "N"
            parser.add_argument(f"--{name}", metavar=metavar, type=kind, help=f"{what} (default: {default})")
        if part == "serve":
            _add_sides(parser)
        parser.add_argument("--seed", metavar="N", type=seed, default=0, help="default: %(default)s")
        add_device_and_numbers(parser)
        parser.add_argument(
            "--budget-s",
            metavar="S",
            type=above_zero(float, 1_000_000),
            help="what has not begun after so many seconds is left out",
        )
        for name, what in SWITCHES.items():
            flag = f"--no-{name.replace('_', '-')}"
            parser.add_argument(flag, dest=name, action="store_false", help=f"{what}, on CUDA; rows are named after it")
        add_experiments(parser, "on CUDA; rows are named after it")
        parser.add_argument("--quick", action="store_true", help="few small cases, to see that everything works")
        if part != "serve":
            _add_plots(parser)
    _add_kernels(parts)
    _add_roofline(parts)


def _add_kernels(parts: "argparse._SubParsersAction[Parser]") -> None:
    parser = parts.add_parser(
        "kernels",
        help="single kernels at the sizes of real models, beside what one would run instead",
        description="Measures kernels under the roof of this device, measured in the same run. Without a GPU the "
        "references run, on small cases: that shows that the bench works, and says nothing about kernels.",
    )
    parser.set_defaults(run=_kernels)
    about = (
        "an operation, a part of <operation>/<case>/<dtype> such as gemv/1b, or a whole name with * and ?; none is all"
    )
    parser.add_argument("patterns", metavar="PATTERN", nargs="*", help=about)
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        action="append",
        default=[],
        help="a part of the name of what is measured besides, such as sdpa, cublas, eager, compile or flashinfer; none "
        "is nothing; may be repeated (default: all)",
    )
    parser.add_argument("--no-compile", action="store_true", help="without baselines that take long to compile")
    parser.add_argument(
        "--budget-s", metavar="S", type=above_zero(float, 1_000_000), default=240.0, help="default: %(default)g"
    )
    parser.add_argument("--quick", action="store_true", help="one case of each operation")
    _add_plots(parser)
    _add_json(parser)
    add_device(parser)


def _add_roofline(parts: "argparse._SubParsersAction[Parser]") -> None:
    parser = parts.add_parser(
        "roofline",
        help="the most that this device can do: copies, products, launches",
        description="Measures the rates with which the other benches compare their numbers.",
    )
    parser.set_defaults(run=_roofline)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and shorter: for rough answers")
    _add_json(parser)
    add_device(parser)


def _add_plots(parser: argparse.ArgumentParser) -> None:
    about = "draw what was measured: PATH-roofline.png, PATH-batch.png or PATH-prompt.png (extra internvl-rt[bench])"
    parser.add_argument("--plots", metavar="PATH", type=Path, help=about)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the last line's document there too")


def _add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concurrency",
        metavar="N,N,...",
        type=list_of(int, MAX_CALLERS),
        default=[],
        help="besides, so many callers, each of whom sends a request when the last one is answered",
    )
    parser.add_argument(
        "--http",
        action="store_true",
        help="send the same requests over HTTP too, from another process to a server in this one: what HTTP costs",
    )


def add_experiments(parser: argparse.ArgumentParser, note: str) -> None:
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        dest="experiments",
        action="append",
        choices=EXPERIMENTS,
        default=[],
        help=f"may be repeated, {note}: " + "; ".join(f"{name}: {what}" for name, what in EXPERIMENTS.items()),
    )


def _run(args: argparse.Namespace) -> int:
    """Checks all that can be checked without torch, which takes seconds to import; then measures."""
    for name, (_, value, quick_value, _) in SETTINGS[args.part].items():
        attribute = name.replace("-", "_")
        if getattr(args, attribute) is None:
            setattr(args, attribute, quick_value if args.quick else value)
    args.switches = {name: getattr(args, name) for name in SWITCHES}
    if args.part == "serve" and max(args.rates) * args.seconds > MAX_ARRIVALS:
        raise RequestError(
            f"{max(args.rates):g} requests a second for {args.seconds:g} s are more than {MAX_ARRIVALS:,}; "
            "lower --rates or --seconds"
        )
    if args.part == "serve" and args.http:
        check_libraries("--http")
    with importing():
        from internvl_rt.checkpoint.find import find_config, find_model
    model = find_model(args.model)  # with its weights, which of a hub id are downloaded here
    config, name = find_config(args.model)
    with importing():
        from internvl_rt.bench.command import run
    return run(args, model, config, name)


def _kernels(args: argparse.Namespace) -> int:
    with importing():
        from internvl_rt.bench.kernels import run
    return run(args)


def _roofline(args: argparse.Namespace) -> int:
    with importing():
        from internvl_rt.bench.roofline import run
    return run(args)
