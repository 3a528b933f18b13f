"""`internvl-rt chat`: one question, or a conversation that no mistake ends."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from internvl_rt.arguments import device_and_numbers
from internvl_rt.errors import InternVLError, RequestError, quoted
from internvl_rt.terminal import importing, say

if TYPE_CHECKING:
    from internvl_rt.checkpoint.config import ModelConfig
    from internvl_rt.engine.engine import Engine
    from internvl_rt.engine.reply import Reply
    from internvl_rt.inputs.sampling_params import SamplingParams
    from internvl_rt.inputs.tiles import TileLayout

INTERACTIVE_HELP = """commands: /image FILE  adds a picture to the next question
          /video FILE  adds a video to the next question
          /reset       forgets the conversation
          /exit        ends (so does Ctrl-D)"""


def run(args: argparse.Namespace) -> int:
    """Takes the arguments of `chat`; all are checked before torch is imported. Raises InternVLError."""
    if args.prompt is None and sys.stdin is None:
        raise RequestError("stdin is closed, so no question can be read from it; give a PROMPT")
    params, media = check_question(args, ignore_eos=args.ignore_eos)
    with importing():
        from internvl_rt.checkpoint.find import find_model
    model = find_model(args.model)
    with importing():
        from internvl_rt.engine.engine import Engine
    engine = Engine.from_pretrained(
        model, **device_and_numbers(args), v2pe_delta=args.v2pe_delta, max_tiles=args.max_tiles
    )
    if args.timings:
        say(engine.memory.render())
    start = system_part(args)
    if args.prompt is not None:
        message = {"role": "user", "content": [*media, {"type": "text", "text": args.prompt}]}
        _answer(engine, [*start, message], params, args)
        return 0
    return _converse(engine, start, media, params, args)


def check_question(args: argparse.Namespace, **others: Any) -> "tuple[SamplingParams, list[dict[str, str]]]":
    """Returns how answers are drawn, and the parts of pictures and videos, of arguments that ask a question.

    others: of the sampling parameters. Raises InternVLError before torch is imported.
    """
    with importing():
        from internvl_rt.inputs.sampling_params import SamplingParams
    for name, text in (("PROMPT", args.prompt), ("--system", args.system)):
        check_text(name, text or "")
    if args.max_tiles is not None:
        with importing():
            from internvl_rt.inputs.tiles import ImageOptions
        ImageOptions(max_tiles=args.max_tiles)
    if args.v2pe_delta not in ("auto", 1):
        with importing():
            from internvl_rt.inputs.position import parse_delta
        parse_delta(args.v2pe_delta)
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    params = SamplingParams(**{name: getattr(args, name) for name in names}, **others)
    media = [*(media_part("image", file) for file in args.image), *(media_part("video", file) for file in args.video)]
    return params, media


def system_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the beginning of a conversation with the system message that the arguments name."""
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def check_text(name: str, text: str) -> None:
    """Raises RequestError for lone surrogates: Python makes them of bytes that are no text of the locale's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = quoted(text[max(0, error.start - 20) : error.start + 20])
        raise RequestError(f"{name} is not valid {sys.getfilesystemencoding()} at {around}; type it again") from error


def media_part(kind: Literal["image", "video"], file: str) -> dict[str, str]:
    """Returns the part of a message. Raises MediaError for what cannot be opened, before a model is loaded for it."""
    with importing():
        from internvl_rt.inputs.media import open_media
    file = os.path.expanduser(file)
    open_media(file, kind, max_bytes=sys.maxsize)[0].close()  # the engine checks the size
    return {"type": kind, kind: file}


def show_tiles(layouts: "Sequence[TileLayout | None]", config: "ModelConfig") -> None:
    """Prints how pictures and frames are cut, of neighbours that are cut alike the first."""
    number = 1
    for layout, group in groupby(layouts):
        count = len(list(group))
        what = f"pictures {number} to {number + count - 1}" if count > 1 else f"picture {number}"
        number += count
        if layout is not None:
            sizes = config.vision.image_size, config.tokens_per_tile
            say(f"{what}: {draw_tiles(layout, *sizes, compresses=config.flash is not None)}")


def draw_tiles(layout: "TileLayout", tile_size: int, tokens_per_tile: int, *, compresses: bool = False) -> str:
    """Returns size and cost of a picture, and its grid with the tiles' numbers in the order of the prompt."""
    num_cut = layout.columns * layout.rows
    tiles = (
        "1 tile" if num_cut == 1 else f"{num_cut} tiles and the thumbnail" if layout.thumbnail else f"{num_cut} tiles"
    )
    border = "+" + "----+" * layout.columns
    lines = [
        f"{layout.width:,} x {layout.height:,} pixels, stretched to {layout.columns * tile_size:,} x "
        f"{layout.rows * tile_size:,}: {tiles}, {'at most ' * compresses}{layout.num_tiles * tokens_per_tile:,} tokens"
    ]
    for row in range(layout.rows):
        first = row * layout.columns + 1
        lines += [border, "|" + "".join(f"{first + column:^4}|" for column in range(layout.columns))]
    if layout.thumbnail:
        lines += [border, f"|{num_cut + 1:^4}|  the whole picture"]
        border = "+----+"
    return "\n".join([*lines, border])


def _converse(
    engine: "Engine",
    start: list[dict[str, Any]],
    media: list[dict[str, str]],
    params: "SamplingParams",
    args: argparse.Namespace,
) -> int:
    say(INTERACTIVE_HELP)
    messages = list(start)
    for line in _lines():
        command, _, rest = line.partition(" ")
        try:
            if command == "/exit":
                break
            if command == "/reset":
                messages, media = list(start), []
            elif command in ("/image", "/video"):
                if not rest:
                    raise RequestError(f"{command} needs the name of a file: {command} FILE")
                media.append(media_part("image" if command == "/image" else "video", rest.strip()))
            elif command.startswith("/"):
                say(f"no command {InternVLError(command)!s}\n{INTERACTIVE_HELP}")
            else:
                check_text("the question", line)
                question = {"role": "user", "content": [*media, {"type": "text", "text": line}]}
                media = []
                reply = _answer(engine, [*messages, question], params, args)
                messages += [question, {"role": "assistant", "content": reply.text}]
        except InternVLError as error:  # this question fails, the conversation goes on
            say(str(error))
        except MemoryError:
            say("memory ran out; this question is forgotten")
        except KeyboardInterrupt:
            say("\nstopped; this question is forgotten")
    return 0


def _lines() -> Iterator[str]:
    """Yields what is typed, or comes from a file, without blanks around it and without empty lines."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            say("\n/exit or Ctrl-D ends")
            continue
        if line:
            yield line


def _answer(
    engine: "Engine", messages: list[dict[str, Any]], params: "SamplingParams", args: argparse.Namespace
) -> "Reply":
    if args.show_tiles:
        show_tiles(engine.describe(messages[-1:]).layouts, engine.config)
    is_thinking = False
    for piece in engine.stream(messages, params, think=args.think):
        if piece.reasoning:
            say(piece.reasoning, end="")
            is_thinking = True
        if piece.text and is_thinking:
            say("")
            is_thinking = False
        print(piece.text, end="", flush=True)
    print()
    assert piece.reply is not None, "a stream ends with its reply"
    if args.timings:
        usage = piece.reply.usage
        saved = f", {usage.saved_image_tokens} saved" if usage.saved_image_tokens else ""
        say(
            f"{usage.prompt_tokens} prompt tokens ({usage.image_tokens} visual{saved}), {usage.completion_tokens} "
            "answered\n"
            f"{piece.reply.timings.render(engine.roof)}"
        )
    return piece.reply
