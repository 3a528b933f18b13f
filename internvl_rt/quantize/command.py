"""`internvl-rt quantize`: a dense checkpoint to one in FP8 or 4 bits, with a table of what that costs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_rt.arguments import Parser, add_device
from internvl_rt.errors import CheckpointError
from internvl_rt.terminal import importing, say

if TYPE_CHECKING:
    from internvl_rt.quantize.agreement import Agreement
    from internvl_rt.quantize.quantising import Quantised


def add_arguments(parser: Parser, model_help: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"dense weights: {model_help}")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written; it must not exist")
    parser.add_argument(
        "--scheme", choices=("fp8", "w4a16"), required=True,
        help="fp8: 8 bits with a scale a row; w4a16: 4 bits in groups, with activation-aware scales",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="FOLDER", type=Path,
        help="pictures with questions, as docs/quantisation.md says (default: the sample pictures of the package)",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="columns that share a scale of w4a16 (default: 128)"
    )
    parser.add_argument("--asymmetric", action="store_true", help="w4a16 with a zero point for each group")
    parser.add_argument("--vision", action="store_true", help="the vision tower's layers too, in fp8")
    parser.add_argument("--no-compare", action="store_true", help="do not compare with the dense model")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document, for programs")


def run(args: argparse.Namespace) -> int:
    """Takes the arguments of `quantize`; most are checked before torch is imported. Raises InternVLError."""
    from internvl_rt.checkpoint.find import find_config
    from internvl_rt.quantize.options import QuantiseOptions
    from internvl_rt.quantize.questions import read_questions

    given = {name: getattr(args, name) for name in ("group_size", "asymmetric", "vision")}
    if QuantiseOptions(scheme=args.scheme, **given).runs_prompts(not args.no_compare, args.calibration):
        read_questions(args.calibration)
    find_config(args.model)
    with importing():
        from internvl_rt.quantize.quantising import quantise
        from internvl_rt.quantize.unfinished import folder_of, place_of
    more = {"calibration": args.calibration, "compare": not args.no_compare, "device": args.device}
    out, is_written = place_of(args.out), False

    def show(result: "Quantised") -> None:
        nonlocal is_written
        is_written = True
        if not args.json:
            print(_render(result), flush=True)

    try:
        result = quantise(args.model, out, args.scheme, **given, **more, on_written=show)
    except (KeyboardInterrupt, OSError, MemoryError, CheckpointError):
        if is_written:
            say(f"\n{out} is whole; only the comparison of answers is missing")
        elif (folder := folder_of(out)).exists():
            say(f"\nwhat is written so far stays in {folder}; the same command goes on from there")
        raise
    print(json.dumps(_document(result), indent=2) + "\n" if args.json else _render_agreement(result.agreement), end="")
    return 0


def _document(result: "Quantised") -> dict[str, object]:
    return {**asdict(result), "folder": str(result.folder)}


def _render(result: "Quantised") -> str:
    """Formats the errors of the layers, and the sizes, as a table for people."""
    from internvl_rt.model.card import format_bytes

    lines = []
    if result.layers:
        is_searched = result.layers[0].searched is not None
        lines.append("layer  error" + ("  without a search" if is_searched else ""))
        for index, layer in enumerate(result.layers):
            errors = (layer.searched, layer.nearest) if is_searched else (layer.nearest,)
            lines.append(f"{index:>5}" + "".join(f"  {error:>5.2%}" for error in errors))
    sizes = f"{format_bytes(result.num_bytes)}, dense {format_bytes(result.dense_bytes)}"
    return "\n".join([*lines, f"{result.folder}: {sizes}"])


def _render_agreement(agreement: "Agreement | str | None") -> str:
    if agreement is None:
        return ""
    if isinstance(agreement, str):
        return f"answers were not compared: {agreement}\n"
    return (
        f"greedy answers: {agreement.equal} of {agreement.questions} are those of the dense model; "
        f"{agreement.leading} of {agreement.tokens} tokens stand before the first that differs\n"
    )
