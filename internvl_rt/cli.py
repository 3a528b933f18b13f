"""The command line: `internvl-rt chat | info | doctor | bench | write-random`. A command imports what it needs."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvl_rt.bench.arguments import add_bench
from internvl_rt.errors import InternVLError

if TYPE_CHECKING:
    from internvl_rt.engine.engine import Engine
    from internvl_rt.engine.reply import Reply
    from internvl_rt.inputs.position import Delta
    from internvl_rt.inputs.sampling_params import SamplingParams

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPT = 1, 2, 130

MODEL_HELP = "a folder, a hub id such as OpenGVLab/InternVL3-1B, or 'tiny', the checkpoint in the package"
INTERACTIVE_HELP = """commands: /image FILE  adds a picture to the next question
          /video FILE  adds a video to the next question
          /reset       forgets the conversation
          /exit        ends (so does Ctrl-D)"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 failure, 2 wrong usage or input, 130 interrupted."""
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(arguments)
        # argparse skips an optional positional at the first option, so a PROMPT after --image lands in `rest`
        if rest and getattr(args, "prompt", "") is None and not rest[0].startswith("-"):
            args.prompt = rest.pop(0)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(args.run(args))
    except InternVLError as error:
        print(f"internvl-rt: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # in the middle of an answer, perhaps
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader of stdout is gone, so no message would arrive
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        print(f"internvl-rt: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except ModuleNotFoundError as error:
        print(f"internvl-rt: {error}; internvl-rt doctor says what is missing and what to do", file=sys.stderr)
        return EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internvl-rt", description="Runs InternVL3 vision-language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('internvl-rt')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    chat = commands.add_parser(
        "chat", help="ask about pictures and videos", description="Answers a question, or chats."
    )
    chat.set_defaults(run=_chat)
    chat.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    chat.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; without one the chat is interactive")
    chat.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; may be repeated")
    chat.add_argument("--video", metavar="FILE", action="append", default=[], help="a video; may be repeated")
    chat.add_argument("--system", metavar="TEXT", help="the system message, instead of the model's own")
    chat.add_argument("--max-tokens", metavar="N", type=int, default=1024, help="longest answer (default: %(default)s)")
    chat.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    chat.add_argument("--top-p", metavar="P", type=float, default=1.0, help="nucleus sampling (default: %(default)s)")
    chat.add_argument("--top-k", metavar="K", type=int, default=0, help="0 keeps all tokens (default: %(default)s)")
    chat.add_argument("--ignore-eos", action="store_true", help="answer on to --max-tokens, for measurements")
    chat.add_argument("--seed", metavar="N", type=int, help="makes sampling reproducible")
    chat.add_argument("--max-tiles", metavar="N", type=int, help="tiles per picture, without the thumbnail")
    chat.add_argument(
        "--v2pe-delta", metavar="D", type=_delta, default=1.0,
        help="positions per visual token: a power of two from 1 to 1/256, or auto (default: 1)",
    )  # fmt: skip
    chat.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    chat.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: by device)")
    chat.add_argument("--timings", action="store_true", help="print the memory plan; per answer tokens and seconds")

    info = commands.add_parser(
        "info", help="a model's static card", description="Parameters, bytes and limits, from config.json alone."
    )
    info.set_defaults(run=_info)
    info.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or a known name such as InternVL3-8B")
    info.add_argument("--json", action="store_true", help="one JSON document, for programs")

    doctor = commands.add_parser(
        "doctor",
        help="what works on this machine, for a bug report",
        description="Checks versions, device, compiled part, every kernel and one answer, a line each: run it first, "
        "and put its output into a bug report. Exit code 1 where something failed.",
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON document, for programs")

    add_bench(commands)

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


def _delta(text: str) -> "Delta":
    above, _, below = text.partition("/")
    try:
        return "auto" if text == "auto" else float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        message = f"expected a power of two from 1 to 1/256, or auto, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _chat(args: argparse.Namespace) -> int:
    from internvl_rt.engine.engine import Engine
    from internvl_rt.inputs.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    media = [*(_media("image", file) for file in args.image), *(_media("video", file) for file in args.video)]
    engine = Engine.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, v2pe_delta=args.v2pe_delta, max_tiles=args.max_tiles
    )
    if args.timings:
        print(engine.memory.render(), file=sys.stderr)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.prompt is not None:
        message = {"role": "user", "content": [*media, {"type": "text", "text": args.prompt}]}
        _answer(engine, [*start, message], params, args.timings)
        return 0
    return _interactive(engine, start, media, params, args.timings)


def _media(kind: Literal["image", "video"], file: str) -> dict[str, str]:
    """Returns the part of a message. Raises MediaError for what cannot be opened, before a model is loaded for it."""
    from internvl_rt.inputs.media import open_media

    file = os.path.expanduser(file)
    open_media(file, kind, max_bytes=sys.maxsize)[0].close()  # the engine checks the size
    return {"type": kind, kind: file}


def _interactive(
    engine: "Engine", start: list[dict[str, Any]], media: list[dict[str, str]], params: "SamplingParams", timings: bool
) -> int:
    print(INTERACTIVE_HELP, file=sys.stderr)
    messages = list(start)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/reset":
            messages, media = list(start), []
        elif command in ("/image", "/video"):
            try:
                media.append(_media("image" if command == "/image" else "video", rest.strip()))
            except InternVLError as error:
                print(error, file=sys.stderr)
        elif command.startswith("/"):
            print(f"no command {command}\n{INTERACTIVE_HELP}", file=sys.stderr)
        else:
            question = {"role": "user", "content": [*media, {"type": "text", "text": line}]}
            try:
                reply = _answer(engine, [*messages, question], params, timings)
            except InternVLError as error:  # this question fails, the conversation goes on
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print("\nstopped; this question is forgotten", file=sys.stderr)
            else:
                messages += [question, {"role": "assistant", "content": reply.text}]
            media = []
    return 0


def _lines() -> Iterator[str]:
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(engine: "Engine", messages: list[dict[str, Any]], params: "SamplingParams", timings: bool) -> "Reply":
    for piece in engine.stream(messages, params):
        print(piece.text, end="", flush=True)
    print()
    assert piece.reply is not None, "a stream ends with its reply"
    if timings:
        usage = piece.reply.usage
        print(
            f"{usage.prompt_tokens} prompt tokens ({usage.image_tokens} visual), {usage.completion_tokens} answered",
            piece.reply.timings.render(engine.roof),
            sep="\n",
            file=sys.stderr,
        )
    return piece.reply


def _info(args: argparse.Namespace) -> int:
    from internvl_rt.checkpoint.folder import find_config
    from internvl_rt.model.card import model_card, render_card

    config, name = find_config(args.model)
    card = model_card(config, name)
    print(json.dumps(card, indent=2) if args.json else render_card(card))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from internvl_rt.doctor.command import run

    return run(as_json=args.json)


def _write_random(args: argparse.Namespace) -> int:
    from internvl_rt.model.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(args.model, args.folder, seed=args.seed)
    print(args.folder)
    return 0
