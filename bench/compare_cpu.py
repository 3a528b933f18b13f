"""Compares on a CPU, in one run and at equal precision, with transformers, llama.cpp and OpenVINO GenAI.

    python bench/compare_cpu.py [--model InternVL3-1B] [--rounds 4] [--busy] [--out FOLDER]
                                [--peer-python PATH] [--llama-cpp SOURCE] [--export-python PATH]
    python bench/compare_cpu.py --quick --sides ours-auto plain

Measured are the first token of a prompt with a picture of one tile, vision tower included; the first token of a text of
as many tokens; the time of a step in which 1, 4 or 16 sequences get a token each; and the peak memory of the process
(VmHWM), after loading and at the end. The weights are random ones of the model's shape, written once and converted for
each peer by its own converter. Answers are greedy; float32 tokens of ours and of transformers must be equal.

`ours-auto` is what a user gets; `plain` is the references in plain torch, float32, of which the goals are ratios. Each
side is a process of its own, which starts, warms up, measures and ends before the next one starts: the sides in turn in
the first round, backwards in the second, and so on. Caches of prefixes and pictures are off, since all rounds ask the
same. A side that is not installed, or fails, is left out with its reason. With --busy, ours and plain are measured
again beside a process that keeps one core busy.

Peers may live in other Pythons (of PyPI: transformers; llama-cpp-python, built from its source archive, whose
vendor/llama.cpp is --llama-cpp; openvino-genai; optimum-intel, which exports for OpenVINO and wants another version of
transformers). The files of all peers take 15 GB for the 1B, in the folder for temporary files (TMPDIR). The last line
is JSON; the exit code is 1 if tokens differ in float32 or a side of ours failed.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from compare_transformers import QUICK, TURNS, write_folders
from cpu_page import show, write_page
from cpu_runtimes import IMAGE, Inputs
from options import count, exit_with, seconds

from internvl_rt.bench.document import save
from internvl_rt.bench.record import environment
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.inputs.prompt import build_prompt
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.kernels.patch_embed import IMAGENET_MEAN, IMAGENET_STD

BENCH = Path(__file__).parent
TEXT_TOKENS = 64  # of the prompt of each sequence that decodes
PRINTABLE = 94  # token ids below are a printable ASCII character each, so that texts and ids say the same
BUSY = ("ours-auto", "plain")  # sides that are measured beside a busy core too
# llama.cpp's converter takes the last layer of the projector, mlp1.3, for one of the tower's layer 3, which must exist.
TINY = QUICK | {"vision_config": {**QUICK["vision_config"], "num_hidden_layers": 4}}
Row = dict[str, Any]


class SideError(Exception):
    """A side cannot be measured."""


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    runtime: str  # a key of cpu_runtimes.RUNTIMES
    dtype: str

    @property
    def is_ours(self) -> bool:
        return self.runtime in ("ours", "plain")


SIDES = (
    Side("ours-auto", "ours", "auto"),
    Side("plain", "plain", "float32"),
    *(
        Side(f"{runtime}-{dtype}", runtime, dtype)
        for runtime in ("ours", "transformers", "llama.cpp", "openvino")
        for dtype in ("float32", "bfloat16")
    ),
)


def write_inputs(folder: Path, args: argparse.Namespace) -> Inputs:
    """Writes the prompts and the picture of all sides, as ids and as pixels."""
    config, tokenizer = load_config(folder / "ours"), load_tokenizer(folder / "ours")
    draw = np.random.default_rng(0)
    side = config.vision.image_size
    tile = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels = (tile / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    np.save(folder / "tile.npy", tile)
    np.save(folder / "pixels.npy", np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
    prompt = build_prompt(TURNS, tokenizer, [config.tokens_per_tile])
    length = len(prompt.token_ids)

    def text(num_tokens: int) -> list[int]:
        found: list[int] = draw.integers(0, PRINTABLE, num_tokens).tolist()
        return found

    inputs = Inputs(
        picture_ids=list(prompt.token_ids),
        picture_text=prompt.text.replace(f"<img>{'<IMG_CONTEXT>' * config.tokens_per_tile}</img>", IMAGE),
        long_ids=text(length),
        text_ids=[text(TEXT_TOKENS) for _ in range(max(args.rows))],
        max_len=max(length + args.tokens, TEXT_TOKENS + args.steps) + 2 * max(args.rows),
        rows=args.rows,
        tokens=args.tokens,
        steps=args.steps,
        samples=args.samples,
        threads=args.threads,
        default_threads=torch.get_num_threads(),
    )
    (folder / "inputs.json").write_text(json.dumps(asdict(inputs)))
    return inputs


def convert(side: Side, folder: Path, args: argparse.Namespace) -> None:
    """Writes the weights in the side's own format if it has one. Raises SideError."""
    python, options = args.peer_python, ()
    if side.runtime == "llama.cpp":
        if args.llama_cpp is None:
            raise SideError("no source of llama.cpp was given, which has its converter; give --llama-cpp")
        options = (side.dtype, args.llama_cpp)
    elif side.runtime == "openvino":  # both precisions are computed from the same files
        python = args.export_python or python
    else:
        return
    if reason := _convert((python, BENCH / "cpu_convert.py", side.runtime, folder, *options), folder / "log"):
        raise SideError(f"its weights could not be converted: {reason}")


@cache
def _convert(command: tuple[str | Path, ...], log: Path) -> str:
    """Runs a converter once; returns why it failed, or ''."""
    with log.open("w") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    return _reason(log, done.returncode) if done.returncode else ""


def _reason(log: Path, code: int) -> str:
    """Returns the last line that says something; a traceback's is the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} (exit code {code})"[:300]


def visit(side: Side, folder: Path, args: argparse.Namespace) -> Row:
    """Starts a side, asks it once, and ends it. Raises SideError."""
    python = sys.executable if side.is_ours else args.peer_python
    command = [python, BENCH / "cpu_side.py", side.runtime, side.dtype, folder]
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=os.environ | threads
        ) as process,
    ):
        try:
            answers = process.communicate("\n", timeout=args.limit_s)[0].splitlines()
        except subprocess.TimeoutExpired:
            process.kill()
            raise SideError(f"it took longer than {args.limit_s:g} s") from None
    if process.returncode or len(answers) != 2:
        raise SideError(_reason(log, process.returncode))
    found: Row = json.loads(answers[0]) | json.loads(answers[1])
    return found


def measure(
    sides: Sequence[Side], rounds: int, ask: Callable[[Side], Row], left_out: dict[str, str]
) -> dict[str, list[Row]]:
    """Visits the sides in turn, backwards in every second round; adds those that fail to `left_out`."""
    visits: dict[str, list[Row]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else tuple(reversed(sides)):
            if side.name in left_out:
                continue
            try:
                visits[side.name].append(ask(side))
            except SideError as error:
                left_out[side.name] = str(error)
            state = left_out.get(side.name, "measured")
            print(f"round {number + 1} of {rounds}: {side.name}: {state}", file=sys.stderr, flush=True)
    return {name: found for name, found in visits.items() if name not in left_out}


def summarise(side: Side, visits: Sequence[Row]) -> Row:
    """Makes a row of one side: the best and the median of each time, the largest of each memory."""
    first = visits[0]
    row = {"side": side.name, "runtime": side.runtime} | {key: first[key] for key in ("dtype", "version", "threads")}
    for key in first:
        if key.startswith(("first_", "per_token_")):
            name = key.removesuffix("_s")
            each = [visit[key] for visit in visits]
            row[key] = min(min(times) for times in each)
            row[f"{name}_median_s"] = median(time for times in each for time in times)
    row["load_s"] = min(visit["load_s"] for visit in visits)
    return row | {key: max(visit[key] for visit in visits) for key in ("loaded_bytes", "peak_bytes")}


def equal_tokens(row: Row, tokens: Mapping[str, list[int]], ours: Mapping[str, list[int]]) -> Row:
    """Counts the tokens up to the first that differs, in each answer, against ours at the same precision."""
    pairs = [(tokens[name], ours[name]) for name in tokens]
    equal = [[*(one == other for one, other in zip(*pair, strict=True)), False].index(False) for pair in pairs]
    return row | {"equal_tokens": sum(equal), "of_tokens": sum(len(mine) for _, mine in pairs)}


@contextmanager
def busy_core() -> Iterator[None]:
    """Keeps one core busy, whichever the system gives, as long as this process lives."""
    process = subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def compare(folder: Path, args: argparse.Namespace) -> tuple[list[Row], dict[str, int]]:
    """Returns the rows of the result."""
    sides = [side for side in SIDES if not args.sides or side.name in args.sides]
    left_out: dict[str, str] = {}
    inputs = write_inputs(folder, args)
    for side in sides:
        try:
            convert(side, folder, args)
        except (SideError, OSError) as error:
            left_out[side.name] = str(error)

    def ask(side: Side) -> Row:
        return visit(side, folder, args)

    visits = measure(sides, args.rounds, ask, left_out)
    tokens = {name: found[0]["tokens"] for name, found in visits.items()}
    rows = []
    for side in sides:
        if side.name in left_out:
            rows.append({"side": side.name, "left_out": left_out[side.name]})
            continue
        row = summarise(side, visits[side.name])
        if not side.is_ours and (ours := tokens.get(f"ours-{side.dtype}")):
            row = equal_tokens(row, tokens[side.name], ours)
        rows.append(row)
    if args.busy:
        with busy_core():
            again, failed = [side for side in sides if side.name in BUSY and side.name in visits], dict[str, str]()
            found = measure(again, args.rounds, ask, failed)
        rows += [
            summarise(side, found[side.name]) | {"beside": "one busy core"} for side in again if side.name in found
        ]
        rows += [{"side": name, "left_out": reason, "beside": "one busy core"} for name, reason in failed.items()]
    return rows, {"prompt_tokens": len(inputs.picture_ids), "text_tokens": TEXT_TOKENS}


def machine() -> dict[str, Any]:
    """Says where this was measured, as all results do, with what decides how a CPU computes."""
    able = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    found = {"capability": torch.backends.cpu.get_cpu_capability(), "instructions": " ".join(able)}
    found |= {"cores": os.cpu_count() or 0, "platform": platform.platform()}
    return environment(torch.device("cpu")) | found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [side.name for side in SIDES]
    parser.add_argument("--model", choices=KNOWN_MODELS, default="InternVL3-1B")
    parser.add_argument(
        "--sides", nargs="+", choices=names, metavar="SIDE", help=f"of {', '.join(names)}; all if absent"
    )
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 4, 16], help="sequences that decode together")
    parser.add_argument("--steps", type=count, default=8, help="that are timed, of each number of sequences")
    parser.add_argument("--tokens", type=count, default=8, help="of the long answers, which are compared")
    parser.add_argument("--samples", type=count, default=2, help="of a first token in each round")
    parser.add_argument("--rounds", type=count, default=4, help="visits of each side")
    parser.add_argument(
        "--threads", type=count, help="of each side; if absent, ours and torch choose, others get torch's"
    )
    parser.add_argument("--limit-s", type=seconds, default=1800, help="for one visit (default: %(default)s)")
    parser.add_argument("--busy", action="store_true", help="measure ours and plain beside a busy core too")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="the Python that has the peers")
    parser.add_argument("--export-python", type=Path, help="the Python that has optimum-intel; else the peers'")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE", help="llama.cpp's source, with its converter")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write <date>.json and <date>.md there")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything works")
    args = parser.parse_args(arguments)
    if args.llama_cpp and not (args.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"--llama-cpp: expected llama.cpp's source, but {args.llama_cpp} has no convert_hf_to_gguf.py")
    for name in ("peer_python", "export_python"):
        if (path := getattr(args, name)) and not os.access(path, os.X_OK):
            parser.error(f"--{name.replace('_', '-')}: expected a Python, but {path} is no program")
    return args


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        write_folders(TINY if args.quick else args.model, Path(scratch))
        rows, lengths = compare(Path(scratch), args)
    settings = {"model": "quick" if args.quick else args.model, **lengths, "rows": " ".join(map(str, args.rows))}
    settings |= {key: getattr(args, key) for key in ("steps", "samples", "rounds")}
    found = machine()
    paths = {str(path) for path in (args.peer_python, args.export_python, args.llama_cpp, args.out) if path}
    words = [Path(word).name if word in paths else word for word in sys.argv[1:]]  # a page is for other machines too
    document = {
        "part": "compare_cpu",
        "schema": 1,
        "rows": [{"side": "settings", **settings}, *rows],
        "environment": found,
        "command": shlex.join(["python", "bench/compare_cpu.py", *words]),
    }
    show(document)
    if args.out:
        results = {"schema": 1, "environment": found, "budget_s": 0, "parts": {}}
        results["parts"] = {"compare_cpu": {"status": "done", "command": document["command"], "document": document}}
        path = args.out / f"{found['date'][:19].replace(':', '').replace('T', '-')}.json"
        save(results, path)
        print(path, write_page(path), sep="\n")
    print(json.dumps(document))
    failed = [row["side"] for row in rows if "left_out" in row and row["side"].startswith(("ours", "plain"))]
    differ = [
        row for row in rows if row["side"] == "transformers-float32" and row.get("equal_tokens") != row.get("of_tokens")
    ]
    return int(bool(failed or differ))


if __name__ == "__main__":
    exit_with(main)
