"""Launches operations as on a GPU, in the environment that `fake_driver.fake_environment` makes.

    python tests/support/fake_launches.py models            launches one case of every operation as planned
    python tests/support/fake_launches.py contract I OF     runs part I of OF parts of the contract, prints what fails
    python tests/support/fake_launches.py engine            serves requests of every kind, prints the kernels built
    python tests/support/fake_launches.py captured          the same behind graphs, few of which are captured at first

The last two take options of the engine behind them, such as quantization=fp8. Prints JSON, one object a line.
FAKE_DRIVER_LOG names the file in which the stand-in records the launches.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

sys.path.insert(0, str(Path(__file__).parent.parent))
import internvl_rt
from internvl_rt import Engine, SamplingParams
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._contract import KernelSpec
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.steps.cuda_graph import Replay
from support.compile_audit import build, launches_of
from support.fake_driver import TARGET, use_fake_driver, zero_new_memory
from support.specs import smallest_model_case

CPU = torch.device("cpu")
SAMPLE = Path(internvl_rt.__file__).parent / "tiny" / "samples" / "4719.png"


def launch_model_case(spec: KernelSpec, log: Path) -> Iterator[dict[str, Any]]:
    """Yields an object for each planned launch: the plan, and what the driver was asked for."""
    case, dtype = smallest_model_case(spec)
    log.write_text("")
    spec.launcher(**arguments_of(spec, case, dtype, CPU))
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    for index, launch in enumerate(launches_of(spec, case, dtype, TARGET)):
        built = launch.kernel.device_caches[0][0].values()
        plan = {"kernel": launch.kernel.__name__, "grid": list(launch.grid), "threads": 32 * launch.num_warps}
        yield {
            "operation": spec.name,
            "case": case.name,
            "plan": plan | {"pdl": launch.pdl},
            "asked": asked[index] if index < len(asked) else None,
            "launches": len(asked),
            "audited": specialisation(build(launch, TARGET.capability)) in map(specialisation, built),
        }


def specialisation(kernel: CompiledKernel) -> tuple[Any, ...]:
    """Returns what a kernel was compiled for. Its hash also tells whether arguments without attributes are listed."""
    source, options = kernel.src, kernel.metadata._asdict()
    del options["hash"], options["extern_libs"]  # the latter is a path
    return source.signature, source.constants, {key: each for key, each in source.attrs.items() if each}, options


def launch_contract(part: int, parts: int) -> Iterator[dict[str, Any]]:
    """Yields an object for each call that raises, and one with the number of all calls."""
    calls = [(s, case, dtype) for s in discover_specs().values() for case in s.test_cases for dtype in s.tolerances]
    mine = calls[part::parts]
    for spec, case, dtype in mine:
        try:
            spec.launcher(**arguments_of(spec, case, dtype, CPU))
        except Exception as error:
            yield {"call": f"{spec.name}/{case.name}/{dtype}", "error": f"{type(error).__name__}: {str(error)[-1000:]}"}
    yield {"calls": len(mine)}


def capture(compute: Callable[[], torch.Tensor]) -> Replay:
    """Stands in for the capture of a graph: a replay launches again."""
    return Replay(lambda: [compute()].clear(), compute())


def serve(*, captured: bool, model: str = "tiny", **options: Any) -> Iterator[dict[str, Any]]:
    """Yields the name of each kernel that an engine built, and whether it was built late.

    captured: an engine with graphs builds all kernels before the first request. Otherwise late is after requests of all
        kinds. The answers mean nothing, as nothing is computed.
    """
    built: list[dict[str, Any]] = []
    late = False

    def note(*, fn: Any, **_: Any) -> None:
        built.append({"kernel": fn.name.rpartition(".")[2], "late": late})

    def ask(count: int, words: int, params: SamplingParams) -> None:
        image = {"type": "image", "image": str(SAMPLE)}
        texts = [{"type": "text", "text": "a " * rng.randint(1, words)} for _ in range(count)]
        engine.generate([[{"role": "user", "content": [image, text]}] for text in texts], params)

    zero_new_memory()
    triton.knobs.runtime.jit_post_compile_hook = note
    rng = random.Random(0)
    how = {"device": "cpu", "dtype": "bfloat16", "backend": "triton", "max_model_len": 2048, **options}
    engine = Engine.from_pretrained(model, **how)
    if captured:
        sizes = {"max_num_seqs": 64, "max_model_len": 2048, "max_tokens_per_step": engine.max_tokens_per_step}
        engine.runner.capture(**sizes, everything=False, capture=capture)
    else:
        for count in (1, 2, 3, 20):  # kernels differ for one row, two rows, up to 16 rows, and more
            ask(count, 100, SamplingParams(max_tokens=3))
        ask(20, 400, SamplingParams(max_tokens=3, temperature=1.0, repetition_penalty=1.1))
    late = True
    for _ in range(15 if captured else 30):
        params = SamplingParams(
            max_tokens=rng.randint(1, 5),
            temperature=rng.choice((0.0, 0.7)),
            top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.9)),
            repetition_penalty=rng.choice((1.0, 1.2)),
            n=rng.choice((1, 1, 2)) if captured else 1,  # several answers copy blocks
            seed=rng.randint(0, 9),
        )
        ask(rng.choice((1, 1, 2, 3, 5, 9, 21)), rng.choice((5, 50, 500)), params)
    yield from built


def rows(what: str, *given: str) -> Iterator[dict[str, Any]]:
    if what == "contract":
        yield from launch_contract(*map(int, given))
    elif what in ("engine", "captured"):
        yield from serve(captured=what == "captured", **dict(option.split("=", 1) for option in given))
    else:
        for spec in discover_specs().values():
            yield from launch_model_case(spec, Path(os.environ["FAKE_DRIVER_LOG"]))


if __name__ == "__main__":
    use_fake_driver()
    for row in rows(*sys.argv[1:]):
        print(json.dumps(row), flush=True)
