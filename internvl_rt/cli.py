"""The command line: `internvl-rt COMMAND`, whose commands `internvl-rt --help` lists."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_rt.arguments import Parser, above_zero, add_device_and_numbers, device_name
from internvl_rt.bench.arguments import add_bench
from internvl_rt.completion import SHELLS
from internvl_rt.errors import InternVLError, quoted
from internvl_rt.quantize.command import add_arguments as add_quantise
from internvl_rt.server import check_libraries
from internvl_rt.terminal import EXIT_INTERRUPT, flush_or_discard, importing, prepare_streams, say

if TYPE_CHECKING:
    from internvl_rt.inputs.position import Delta

EXIT_NO_READER, EXIT_ERROR = 1, 2

MODEL_HELP = "a folder, a hub id such as OpenGVLab/InternVL3-1B, or 'tiny', the checkpoint in the package"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    No argument and no error of the system ends in a traceback: each is one line on stderr and exit code 2. It is 130
    after Ctrl-C, and 1 where the reader of stdout has left, or a check of `doctor` failed.
    """
    prepare_streams()
    try:
        return _run(arguments)
    finally:
        flush_or_discard(sys.stdout)
        flush_or_discard(sys.stderr)


def _run(arguments: list[str] | None) -> int:
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed, so no answer can be printed; redirect it, to /dev/null if nobody reads it")
        try:
            args = _parse(arguments)
            return int(args.run(args))
        finally:
            sys.stdout.flush()
    except InternVLError as error:
        say(f"internvl-rt: {error}")
        return EXIT_ERROR
    except KeyboardInterrupt:
        say("\ninterrupted")  # in the middle of an answer, perhaps
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader of stdout is gone, which is no failure to tell
        return EXIT_NO_READER
    except (OSError, MemoryError) as error:
        say(f"internvl-rt: {InternVLError(error if str(error) else 'memory ran out')}")
        return EXIT_ERROR
    except ImportError as error:
        say(f"internvl-rt: {InternVLError(error)}; internvl-rt doctor says what is missing and what to do")
        return EXIT_ERROR


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if args.run is _serve:
        args.arguments, rest = rest, []
    # argparse skips an optional positional at the first option, so a PROMPT after --image lands in `rest`
    if rest and getattr(args, "prompt", "") is None and not rest[0].startswith("-"):
        args.prompt = rest.pop(0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser(of_serve: Sequence[Parser] = ()) -> argparse.ArgumentParser:
    """of_serve: the parser of what follows `serve`, which otherwise takes anything."""
    parser = Parser(prog="internvl-rt", description="Runs InternVL3 vision-language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('internvl-rt')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    chat = commands.add_parser(
        "chat", help="ask about pictures and videos", description="Answers a question, or chats."
    )
    chat.set_defaults(run=_chat)
    chat.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    chat.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; without one the chat is interactive")
    _add_question(chat, max_tokens=1024, temperature=0.0, top_p=1.0)
    chat.add_argument(
        "--think", action=argparse.BooleanOptionalAction,
        help="reason first, on stderr, or do not (default: as the model does; InternVL3.5 does not, and its cards "
        "advise --temperature 0.6 and many --max-tokens for it)",
    )  # fmt: skip
    chat.add_argument("--ignore-eos", action="store_true", help="answer on to --max-tokens, for measurements")
    add_device_and_numbers(chat)
    chat.add_argument("--show-tiles", action="store_true", help="print how each picture is cut into tiles")
    chat.add_argument("--timings", action="store_true", help="print the memory plan; per answer tokens and seconds")

    best = commands.add_parser(
        "best-of",
        help="the best of several answers, by a critic or a vote",
        description="Draws several answers to a question and prints the best one: that of the highest score by a "
        "critic, or the one that most answers agree on. The defaults are those of the official evaluation.",
    )
    best.set_defaults(run=_best_of)
    best.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    best.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question")
    chosen = best.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--critic", metavar="CRITIC", help="a VisualPRM, as MODEL: a folder or a hub id")
    chosen.add_argument("--judge", action="store_true", help="MODEL itself says whether each answer is correct")
    chosen.add_argument("--vote", action="store_true", help="by the final answer that most answers come to")
    best.add_argument("-n", metavar="N", type=int, default=8, help="number of answers (default: %(default)s)")
    _add_question(best, max_tokens=4096, temperature=0.6, top_p=0.95)
    best.add_argument("--greedy-first", action="store_true", help="the first answer is greedy")
    best.add_argument(
        "--max-steps", metavar="N", type=int,
        help="of an answer that a critic scores; neighbours are joined (default: 12)",
    )  # fmt: skip
    best.add_argument(
        "--stop-score", metavar="X", type=float,
        help="draw no more once an answer has this score; the best is then that of the answers that have ended",
    )  # fmt: skip
    best.add_argument("--all", action="store_true", help="print all answers, each behind its score")
    best.add_argument("--json", action="store_true", help="one JSON document with all answers and scores")
    add_device_and_numbers(best)
    best.add_argument(
        "--critic-device", metavar="DEVICE", type=device_name, default="auto",
        help="default: a second GPU if there are two, else that of MODEL, whose memory both share",
    )  # fmt: skip

    info = commands.add_parser(
        "info", help="a model's static card", description="Parameters, bytes and limits, from config.json alone."
    )
    info.set_defaults(run=_info)
    info.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or a known name such as InternVL3-8B")
    info.add_argument(
        "--gpus", metavar="N", type=above_zero(int, 1_000), default=1,
        help="split among so many GPUs, as tensor_parallel_size does (default: %(default)s)",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="one JSON document, for programs")

    doctor = commands.add_parser(
        "doctor",
        help="what works on this machine, for a bug report",
        description="Checks versions, device, compiled part, every kernel and one answer, a line each: run it first, "
        "and put its output into a bug report. Exit code 1 where something failed.",
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON document, for programs")

    kernels = commands.add_parser(
        "kernels",
        help="the catalogue of kernels",
        description="Lists the operations that have a kernel; of those named, what each computes and how it is called.",
    )
    kernels.set_defaults(run=_kernels)
    kernels.add_argument("patterns", metavar="NAME", nargs="*", help="operations, with * and ? perhaps")
    kernels.add_argument("--json", action="store_true", help="one JSON document, for programs")

    quantise = commands.add_parser(
        "quantize",
        help="write a checkpoint in FP8 or 4 bits",
        description="Rounds the language model of a dense checkpoint and writes a folder in the layout of "
        "compressed-tensors. Called again after an interruption, it goes on where it was.",
    )
    quantise.set_defaults(run=_quantise)
    add_quantise(quantise, MODEL_HELP)

    add_bench(commands)

    # Its own parser makes its arguments from options whose module needs torch.
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP: OpenAI's interface and a page", add_help=False, parents=of_serve
    )
    serve.set_defaults(run=_serve)

    completion = commands.add_parser(
        "completion",
        help="completion for a shell",
        description="Prints a script that makes a shell complete commands, options and files. For bash, in ~/.bashrc: "
        'eval "$(internvl-rt completion bash)"; for fish: internvl-rt completion fish | source; for zsh, write it to a '
        "file _internvl-rt in a folder of $fpath.",
    )
    completion.set_defaults(run=_completion)
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))

    random = commands.add_parser(
        "write-random",
        help="write a checkpoint with random weights",
        description="Writes random weights of a model's real shape in the official format, for tests and benchmarks.",
    )
    random.set_defaults(run=_write_random)
    random.add_argument("model", metavar="MODEL", help="a known name such as InternVL3-1B, or a config.json")
    random.add_argument("folder", metavar="FOLDER", type=Path, help="where to; must not exist or be empty")
    random.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    return parser


def _add_question(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float) -> None:
    """Adds what is asked about, and how answers are drawn."""
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--video", metavar="FILE", action="append", default=[], help="a video; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="the system message, instead of the model's own")
    for name, letter, kind, default, about in (
        ("--max-tokens", "N", int, max_tokens, "longest answer"),
        ("--temperature", "T", float, temperature, "0 is greedy"),
        ("--top-p", "P", float, top_p, "nucleus sampling"),
        ("--top-k", "K", int, 0, "0 keeps all tokens"),
    ):
        parser.add_argument(name, metavar=letter, type=kind, default=default, help=f"{about} (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, help="makes sampling reproducible")
    parser.add_argument("--max-tiles", metavar="N", type=int, help="tiles per picture, without the thumbnail")
    parser.add_argument(
        "--v2pe-delta", metavar="D", type=_delta, default=1.0,
        help="positions per visual token: a power of two from 1 to 1/256, or auto (default: 1)",
    )  # fmt: skip


def _serve(args: argparse.Namespace) -> int:
    check_libraries("serving")
    with importing():
        from internvl_rt.server.command import serve
    return serve(args.arguments, MODEL_HELP)


def _delta(text: str) -> "Delta":
    above, _, below = text.partition("/")
    try:
        return "auto" if text == "auto" else float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        message = f"expected a power of two from 1 to 1/256, or auto, got {quoted(text)}"
        raise argparse.ArgumentTypeError(message) from None


def _chat(args: argparse.Namespace) -> int:
    from internvl_rt.chat import run

    return run(args)


def _best_of(args: argparse.Namespace) -> int:
    from internvl_rt.best_of import run

    return run(args)


def _info(args: argparse.Namespace) -> int:
    from internvl_rt.checkpoint.find import find_config

    config, name = find_config(args.model)
    with importing():
        from internvl_rt.model.card import model_card, render_card
    card = model_card(config, name, args.gpus)
    print(json.dumps(card, indent=2) if args.json else render_card(card))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from internvl_rt.doctor.command import run

    return run(as_json=args.json)


def _kernels(args: argparse.Namespace) -> int:
    with importing():
        from internvl_rt.kernel_list import run
    return run(args)


def _quantise(args: argparse.Namespace) -> int:
    from internvl_rt.quantize.command import run

    return run(args)


def _completion(args: argparse.Namespace) -> int:
    with importing():
        from internvl_rt.completion import script
    print(script(args.shell, _parser))
    return 0


def _write_random(args: argparse.Namespace) -> int:
    from internvl_rt.checkpoint.find import random_config

    random_config(args.model)
    with importing():
        from internvl_rt.model.random_checkpoint import write_random_checkpoint
    write_random_checkpoint(args.model, args.folder, seed=args.seed)
    print(args.folder)
    return 0
