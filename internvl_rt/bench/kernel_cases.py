"""Chooses which kernels are measured, at which sizes, in which order and on which inputs; checks their results."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance, map_result, results_of
from internvl_rt.kernels._gemv_plan import build_gemv_workspace
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels.catalogue import discover_specs, preferred_dtype
from internvl_rt.kernels.gemv import MODELS

DECODE_ROWS, PREFILL_ROWS = 64, 3392  # rows of a large decode step, and of the prompt of a picture of 13 tiles
ROTATED_BYTES = 256 * 2**20  # all sets of inputs together: at least twice the L2 of any GPU
MAX_SETS = 64
MAX_SET_BYTES = 4 * 2**30  # bytes of all sets, for operations whose inputs hold much that they do not read
DOUBLE_BYTES = 2**30  # larger inputs are compared in float32, because float64 would take too long and too much memory
TAIL = 8  # standard deviations that one element of many millions may be off
POISON = 0x5A


@dataclass(frozen=True, slots=True)
class Work:
    """An operation with its size and dtype."""

    spec: KernelSpec
    case: Case
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.spec.name}/{self.case.name}/{dtype_name(self.dtype)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a result is from the reference; `problem` is empty if the result is right."""

    rms_error: float
    problem: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def plan_work(device: torch.device, patterns: Sequence[str] = (), *, quick: bool = False) -> list[Work]:
    """One case of each operation, then the other cases, the most important ones first.

    The sizes are real on a GPU and small elsewhere. patterns: which cases, see `matches`; none is all. quick: no more
    than the one case of each operation.
    """
    specs, real = discover_specs(), device.type == "cuda"
    if real:
        capability = target_of(device).capability
        works = [work for spec in specs.values() for work in real_work(spec, capability)]
    else:
        works = [work for spec in specs.values() for work in small_work(spec)]
    works = [work for work in works if not patterns or any(matches(work, pattern) for pattern in patterns)]
    works.sort(key=importance if real else lambda work: work.spec.name)  # the sort is stable
    best = (lambda work: -importance(work)) if real else (lambda work: work.spec.cost(work.case, work.dtype).bytes)
    found = {work.spec.name: work.spec for work in works}
    one_each = [max((work for work in works if work.spec is found[name]), key=best) for name in sorted(found)]
    return one_each if quick else [*one_each, *(work for work in works if work not in one_each)]


def matches(work: Work, pattern: str) -> bool:
    """Says whether a pattern is an operation's name, a part of a case's whole name, or fits that by its * and ?."""
    if pattern in discover_specs():
        return work.spec.name == pattern
    return fnmatchcase(work.name, pattern) if set(pattern) & {"*", "?"} else pattern in work.name


def real_work(spec: KernelSpec, capability: int | None = None) -> list[Work]:
    """The cases of real models that a GPU of a compute capability, such as 90, can run; None: all."""
    cases = (*spec.model_cases, *engine_products()) if spec.name == "gemm_epilogue" else spec.model_cases
    return [
        Work(spec, case, preferred_dtype(spec))
        for case in cases
        if capability is None or case.min_capability <= capability
    ]


def small_work(spec: KernelSpec) -> list[Work]:
    """The small test cases whose inputs are not empty."""
    preferred = torch.float32 if torch.float32 in spec.tolerances else next(iter(spec.tolerances))
    works = [Work(spec, case, preferred) for case in spec.test_cases]
    return [work for work in works if not _is_empty(work)]


def _is_empty(work: Work) -> bool:
    inputs = make_meta_inputs(work)
    return any(
        isinstance(value, Tensor) and value.numel() == 0 for name, value in inputs.items() if "listed" not in name
    )


def engine_products() -> Iterator[Case]:
    """The other products that the engine gives to `gemm_epilogue`: in a vision tower those before `add_norm`; in a
    decoder those of a prompt, and of a step with more rows than `gemv` takes."""
    for tower, width, mlp in (("300m", 1024, 4096), ("6b", 3200, 12800)):
        for tiles in (1, 4, 13):
            for name, k in (("out", width), ("fc2", mlp)):
                sizes = {"R": 1025 * tiles, "N": width, "K": k, "epilogue": "none", "bias": False}
                yield Case(f"{tower}_{name}_alone_{tiles}_tiles", sizes)
    for model, (width, mlp, heads, groups, channels, vocabulary) in MODELS.items():
        plain: dict[str, Any] = {"epilogue": "none", "bias": False}
        residual = {"epilogue": "residual", "bias": False, "scale": False}
        for rows in (DECODE_ROWS, PREFILL_ROWS):
            products: list[tuple[str, int, int, dict[str, Any]]] = [
                ("qkv", (heads + 2 * groups) * channels, width, {**plain, "bias": model != "9b"}),
                ("o", width, heads * channels, residual),
                ("gate_up", 2 * mlp, width, plain),
                ("down", width, mlp, residual),
            ]
            if rows == DECODE_ROWS:  # a prompt needs one row of logits only
                products.append(("lm_head", vocabulary, width, plain))
            for name, n, k, how in products:
                yield Case(f"{model}_{name}_{rows}_rows", {"R": rows, "N": n, "K": k, **how})


def importance(work: Work) -> int:
    """Returns a rank; work with a smaller one comes first, so that a time limit cuts off what matters least."""
    op, case = work.spec.name, work.case
    named = case.name.split("_")
    first_models = bool({"1b", "8b"} & set(named)) or case.sizes.get("D", case.sizes.get("F")) in (
        896,
        3584,
        4864,
        18944,
    )
    vision = any(part in case.name for part in ("vit_300m", "300m_", "projector_300m", "photo_12"))
    tiled = case.name.endswith(("wide", "square", "low", "pointers"))  # plans for bench/tune.py to measure
    if op in ("gemv", "gemv_qkv", "decode_attention") and first_models:
        batch = case.sizes.get("R", len(case.sizes.get("seq_lens", ())))
        context = max(case.sizes.get("seq_lens", (0,)))
        return 0 if batch == 1 and context <= 2048 else 1 if batch <= 8 else 4
    if op == "sample" and case.name in ("vocab_151674_1_rows", "vocab_151674_16_rows"):
        return 1
    if vision and "13" in named and not tiled:
        return 2
    if first_models and not tiled and (op == "prefill_attention" or str(PREFILL_ROWS) in named):
        return 3
    if (vision or first_models or {"6b", "13"} <= set(named)) and not tiled:
        return 4
    return 6 if tiled else 5


def make_meta_inputs(work: Work) -> dict[str, Any]:
    return work.spec.make_inputs(work.case, work.dtype, torch.device("meta"))


def make_rotated_inputs(work: Work, device: torch.device) -> list[dict[str, Any]]:
    """Makes sets of random inputs; on a GPU so many that the L2 has nothing of a set when its turn comes again."""
    torch.manual_seed(0)
    first = work.spec.make_inputs(work.case, work.dtype, device)
    if device.type != "cuda":
        return [first]
    touched = max(1, work.spec.cost(work.case, work.dtype).bytes)
    held = max(1, sum(value.nbytes for value in first.values() if isinstance(value, Tensor)))
    count = min(MAX_SETS, -(-ROTATED_BYTES // touched), max(1, MAX_SET_BYTES // held))
    return [first, *(work.spec.make_inputs(work.case, work.dtype, device) for _ in range(count - 1))]


@cache
def _gemv_workspace(device: torch.device) -> Any:
    return build_gemv_workspace(device)


def given_by_engine(spec: KernelSpec, inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments that the engine keeps between launches; without them the launcher would make them every time."""
    if device.type != "cuda":
        return {}
    if spec.name in ("gemv", "gemv_4bit", "gemv_8bit", "gemv_qkv"):
        return {"workspace": _gemv_workspace(device)}
    if spec.name == "decode_attention":
        shape = len(inputs["q_SHC"]), inputs["k_cache_BGPC"].shape[1]
        return {"counters_SG": torch.zeros(shape, dtype=torch.int32, device=device)}
    return {}


def build_launch(work: Work, inputs: dict[str, Any], out: Any, device: torch.device) -> partial[Any]:
    """A call of the kernel with the engine's arguments."""
    given = given_by_engine(work.spec, inputs, device)
    return partial(work.spec.launcher, **{**inputs, **given}, **({} if out is None else {"out": out}))


def run_reference(work: Work, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The result in high precision, and the tensors that the operation writes in place; `inputs` do not change."""
    held = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    wide = torch.float64 if held <= DOUBLE_BYTES else torch.float32

    def prepared(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == work.dtype and value.is_floating_point():
            return value.to(wide, copy=True)
        return value.clone() if name in work.spec.written(inputs) else value

    copies = {name: prepared(name, value) for name, value in inputs.items()}
    expected = work.spec.reference(**copies)
    return expected, {name: copies[name] for name in work.spec.written(inputs)}


def poisoned_like(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor for a kernel's result, in which elements that the kernel does not write show."""
    if expected.dtype.is_floating_point:
        stored = dtype if expected.itemsize > 1 else expected.dtype
        return torch.full(expected.shape, math.nan, dtype=stored, device=expected.device)
    return torch.full(expected.shape, POISON, dtype=expected.dtype, device=expected.device)


class Check:
    """The reference's result for one set of inputs, and the inputs as they were, to check a kernel more than once."""

    def __init__(self, work: Work, inputs: dict[str, Any]) -> None:
        self._work, self._inputs = work, inputs
        self.expected, self._expected_in_place = run_reference(work, inputs)
        self._before = {name: inputs[name].clone() for name in work.spec.written(inputs)}
        self.out = self.make_out()

    def make_out(self) -> Any:
        """Returns poisoned memory for the result, in the dtypes that the kernel stores; None if there is no result."""
        stored = self._work.spec.result_like(self._inputs)
        return map_result(lambda wanted, like: poisoned_like(wanted, like.dtype), self.expected, stored)

    def restore(self) -> None:
        """Restores the inputs, and poisons the output again."""
        for name, value in self._before.items():
            self._inputs[name].copy_(value)
        for out in results_of(self.out).values():
            out.fill_(math.nan if out.dtype.is_floating_point else POISON)

    def verdict(self) -> Verdict:
        """Compares the present contents of the output and of the tensors written in place with the reference."""
        spec = self._work.spec
        results = results_of(self.out)
        pairs = [(name, results[name], wanted) for name, wanted in results_of(self.expected).items()]
        pairs += [(name, self._inputs[name], wanted) for name, wanted in self._expected_in_place.items()]
        dtype = self._work.dtype
        verdicts = [compare(name, y, want, spec.tolerance_of(y, dtype), exact=spec.exact) for name, y, want in pairs]
        return next((verdict for verdict in verdicts if verdict.problem), verdicts[0])


def check_kernel(work: Work, inputs: dict[str, Any], device: torch.device) -> tuple[Verdict, Check]:
    """Runs the kernel once and compares it with its reference. `inputs` are restored."""
    check = Check(work, inputs)
    build_launch(work, inputs, check.out, device)()
    verdict = check.verdict()
    check.restore()
    return verdict, check


def relative_error(actual: Any, expected: Any) -> float:
    """The relative root mean square error of two results of any dtypes; of several tensors the largest."""
    if not isinstance(expected, Tensor):
        return max(map(relative_error, actual, expected))
    wide = expected.dtype if expected.dtype.is_floating_point and expected.itemsize > 1 else torch.float32
    return float((actual.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm())


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance, *, exact: bool = False) -> Verdict:
    """Compares by the operation's tolerance, integers of 16 bits and more exactly; NaN and infinity never pass.

    The tolerance for single elements was set on small cases. Real cases have 10^8 elements and longer sums, so that an
    element may also be off by TAIL times the root mean square error that is allowed on average.
    """
    if expected.itemsize == 1 and not exact:  # torch computes nothing with numbers in 8 bits
        actual, expected = actual.float(), expected.float()
    if exact or not expected.dtype.is_floating_point:
        wanted = expected.to(actual.dtype)
        num_wrong = int((actual != wanted).sum())
        return Verdict(0.0 if not num_wrong else math.inf, f"{name}: {num_wrong} elements differ" if num_wrong else "")
    error = (actual.to(expected.dtype) - expected).abs_()
    norm = float(expected.norm())
    rms_error = float(error.norm()) / max(norm, 1e-30)
    slack = tolerance.atol + TAIL * tolerance.rms * norm / max(1, expected.numel()) ** 0.5
    worst = float(error.sub_(tolerance.rtol * expected.abs()).max()) - slack
    if not math.isfinite(rms_error) or not math.isfinite(worst):
        return Verdict(math.inf, f"{name}: not finite where the reference is")
    if rms_error > tolerance.rms:
        return Verdict(rms_error, f"{name}: rms error {rms_error:.2g}, at most {tolerance.rms:.2g} expected")
    if worst > 0:
        return Verdict(rms_error, f"{name}: an element is off by {worst:.2g} more than the tolerance")
    return Verdict(rms_error)
