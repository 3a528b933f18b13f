"""Predicts decode steps, mixed steps and first tokens from planned launches and one model of costs; measures nothing.

    python bench/launch_plans.py [--out FILE.md]                         the page
    python bench/launch_plans.py --model InternVL3-1B --batch 1 --context 2048 [--tokens 512] [--cached 0]
                                                                         the operations of one step, with any prompt
    python bench/launch_plans.py --fit FILE.json... [--without PATTERN]  sets a device's constants from what it measured

The launches come from the kernels' own plan functions (step_plans.py), their times from the model (launch_model.py)
with the constants of bench/device_costs.json, which launch_fit.py sets. No GPU is needed.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launch_fit import FITTED, READ, fit, observations_of, read_roofline, summary
from launch_model import COSTS, Device, load_devices, save_devices
from launch_page import RESULTS, milliseconds, render
from options import count
from step_plans import Step, decode_step, prompt_step

from internvl_rt.bench.document import DocumentError, load
from internvl_rt.checkpoint.config import KNOWN_MODELS


def render_operations(step: Step, device: Device, **how: Any) -> str:
    """The operations of one step, for the screen."""
    columns = "times      MB  floor us      us  share  most of it beyond the floor"
    lines = [f"{'operation':<26}{'kernel':<28}{'grid':>10} {columns}"]
    for op, terms in step.terms_us(device, **how):
        kernels = ", ".join(work.kernel.strip("_") for work in op.works)
        grid = " x ".join(map(str, op.launches[0].grid[:2])) if op.launches else "-"
        floor, predicted = op.floor_us(device), sum(terms.values())
        name, lost = max((terms | {"bytes": terms["bytes"] - floor}).items(), key=lambda item: item[1])
        lines.append(
            f"{op.name:<26}{kernels[:27]:<28}{grid:>10} {op.times:>5} {op.cost.bytes / 1e6:>7.2f} {floor:>9.2f} "
            f"{predicted:>7.1f} {floor / predicted:>6.1%}  {name} ({lost:.1f} us)"
        )
    all_us = step.gpu_us(device, **how), step.host_us(device), step.floor_us(device)
    lines.append(f"{device.name}: device {{}} ms, host {{}} ms, floor {{}} ms".format(*map(milliseconds, all_us)))
    return "\n".join(lines)


def refit(paths: list[Path], without: list[str], costs: Path) -> str:
    """Fits the device that the files are from, stores it, and tells what changed. Raises DocumentError."""
    devices, documents = load_devices(costs), {_stored_name(path): load(path) for path in paths}
    names = sorted({document["environment"]["device"] for document in documents.values()})
    if len(names) != 1 or names[0] not in devices:
        known, given = ", ".join(devices), ", ".join(names)
        raise DocumentError(f"expected files of one device of {costs.name} ({known}), got files of {given}")
    old, found = devices[names[0]], observations_of(documents, without)
    new, undetermined = fit(read_roofline(old, documents), found)
    new = replace(new, fitted_to={"files": list(documents), "without": without})
    save_devices(devices | {new.name: new}, costs)
    lines = [f"{new.name}: constants before and after"]
    for key in (*READ, *FITTED):
        kept = "; kept, because these rows do not determine it" if key in undetermined else ""
        lines.append(f"  {key:<20}{getattr(old, key):>10.4g}{getattr(new, key):>10.4g}  {new.sources[key]}{kept}")
    for when, device in (("before", old), ("after", new)):
        for kind, number, median, worst, row in summary(device, found):
            errors = f"median error {median:>6.1%}, worst {worst:.2f} of {row}"
            lines.append(f"  {when:<7}{kind:<7}{number:>4} rows, {errors}")
    return "\n".join(lines)


def _stored_name(path: Path) -> str:
    """The path from bench/results on, if it lies there."""
    return str(path.resolve().relative_to(RESULTS)) if path.resolve().is_relative_to(RESULTS) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the page instead of the screen")
    parser.add_argument("--model", choices=KNOWN_MODELS, help="show the operations of one step of this model instead")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--context", type=count, default=2048)
    parser.add_argument("--tokens", type=count, help="of a prompt in the same step")
    parser.add_argument("--cached", type=int, default=0, help="tokens before them (default: %(default)s)")
    parser.add_argument("--device", default="H200", help="part of a device's name (default: %(default)s)")
    parser.add_argument("--no-programmatic-launch", action="store_true")
    parser.add_argument("--prefetch-weights", action="store_true", help="attention brings the next weights to L2")
    parser.add_argument("--early-trigger", action="store_true", help="the next launch is triggered first")
    parser.add_argument("--fit", type=Path, nargs="+", metavar="FILE", help="of one device, older ones first")
    parser.add_argument("--without", nargs="*", default=[], help="patterns of rows that no longer hold")
    parser.add_argument("--costs", type=Path, default=COSTS, help="the file of constants")
    args = parser.parse_args()
    try:
        if args.fit:
            print(refit(args.fit, args.without, args.costs))
            return 0
        devices = load_devices(args.costs)
        if args.model:
            device = next((each for name, each in devices.items() if args.device in name), None)
            if device is None:
                parser.error(f"--device: expected part of {' or '.join(devices)}, got {args.device!r}")
            sizes = {"batch": args.batch, "context": args.context}
            plan = partial(prompt_step, tokens=args.tokens, cached=args.cached) if args.tokens else decode_step
            how = {"early": args.early_trigger, "prefetch": args.prefetch_weights}
            how |= {"pdl": not args.no_programmatic_launch}
            print(render_operations(plan(args.model, **sizes), device, **how))
            return 0
        page = render(devices)
    except DocumentError as error:
        parser.error(str(error))
    if args.out is None:
        print(page, end="")
    else:
        args.out.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
