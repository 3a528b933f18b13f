"""Products of the few rows of a decode step with a weight, and what comes before and after them, as one kernel.

    y = act(norm(x) W^T + b) + residual                norm: RMSNorm or nothing; act: SwiGLU of (gate | up) or nothing

Such a product takes as long as reading the weight; the plan sees to it that enough bytes are on their way at any time.
All values stay in float32 until the result is stored; the reference also rounds the norm, the product and the gate.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._gemv_body import gemv_kernel
from internvl_rt.kernels._gemv_plan import MAX_ROWS, GemvPlan, GemvWorkspace, choose_gemv_plan
from internvl_rt.kernels._gemv_plan import build_gemv_workspace as build_gemv_workspace
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._numbers_8bit import DENSE
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.swiglu import swiglu_reference

Activation = Literal["none", "swiglu"]

TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 1100 products in another order"),
    # The float64 reference rounds nothing; on matrix units x times the norm's weight is rounded, and so is the result.
    # SwiGLU multiplies the error of gate with up and the error of up with gate, and either value may be 4: of 1000
    # seeds the worst used 0.76 of the elements' limits and 0.78 of the rms limits.
    torch.float16: Tolerance(1e-3, 4e-3, 6.5e-4, "operands and result are each rounded to 11 bits"),
    torch.bfloat16: Tolerance(8e-3, 3.2e-2, 5.5e-3, "operands and result are each rounded to 8 bits"),
}


def plan_product(
    x_RK: Tensor,
    weight_NK: Tensor,
    norm_weight_K: Tensor | None,
    eps: float,
    num_tiles: int,
    plan: GemvPlan,
    workspace: GemvWorkspace | None,
    programmatic_launch: bool,
    early_trigger: bool,
    target: Target,
) -> dict[str, Any]:
    """Returns what gemv and gemv_qkv are launched with in common; each adds arguments and constexprs of its own."""
    rows, k = x_RK.shape
    chunks = cdiv(k, plan.block_k)
    args: dict[str, Any] = {
        "x": x_RK,
        "weight": weight_NK,
        "last_row": rows - 1,
        "K": k,
        "split_len": cdiv(chunks, plan.split_k) * plan.block_k,
        "eps": eps,
        "x_stride": x_RK.stride(0),
        "weight_stride": weight_NK.stride(0),
    }
    pdl = programmatic_launch and target.has_programmatic_launch
    early = early_trigger and programmatic_launch and target.capability >= 90
    constexprs: dict[str, Any] = {
        "ROWS": 16 if plan.matrix else rows,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "WARPS": plan.num_warps,
        "MATRIX": plan.matrix,
        "STAGES": plan.num_stages,
        # x times the norm's weight can exceed float16. TF32 keeps as many bits, and has float32's range.
        "WIDE": norm_weight_K is not None and x_RK.dtype == torch.float16,
        "PRECISION": "ieee" if x_RK.dtype == torch.float32 else "tf32",
        "SPLIT": plan.split_k > 1,
        "PDL": pdl,
        "PREFETCH": plan.prefetched if pdl else 0,
        "EARLY": early and pdl,
        # The interpreter, which has no programmatic launch, loads as many chunks ahead as a GPU would.
        "AHEAD": plan.chunks_ahead(k, cdiv(weight_NK.shape[1] * weight_NK.itemsize, k)) if early else 1,
    }
    if norm_weight_K is not None:
        args["norm_weight"] = norm_weight_K
    else:
        constexprs["norm_weight"] = None
    if plan.split_k > 1:
        programs = num_tiles * plan.split_k
        workspace = workspace or build_gemv_workspace(x_RK.device, programs * max(1, plan.block_n // 64))
        needed = programs * constexprs["ROWS"] * (plan.block_n + 1)
        require(workspace.partial.device == x_RK.device, "workspace", f"one on {x_RK.device}", workspace.partial.device)
        require(workspace.partial.numel() >= needed, "workspace", f"{needed} partial sums", workspace.partial.numel())
        require(workspace.arrived.numel() >= num_tiles, "workspace", f"{num_tiles} counts", workspace.arrived.numel())
        args |= {"partial": workspace.partial, "arrived": workspace.arrived}
    else:
        constexprs |= {"partial": None, "arrived": None}
    return {
        "grid": (num_tiles if rows else 0, plan.split_k, 1),
        "args": args,
        "constexprs": constexprs,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages or 1,  # without stages the kernel itself loads one chunk ahead
        "pdl": pdl,
        # Without stages a product runs on one warp's units: those of a warpgroup (sm_90) and tcgen05 need 64 rows.
        "matrix_units": plan.num_stages > 0 and plan.block_n >= 64 and x_RK.dtype != torch.float32,
    }


def plan_outputs(
    common: dict[str, Any], bias_N: Tensor | None, activation: Activation, residual_RN: Tensor | None, out: Tensor
) -> None:
    """Adds to `plan_product`'s result what comes behind the product in gemv and gemv_4bit."""
    for name, tensor in (("bias", bias_N), ("residual", residual_RN)):
        common["args" if tensor is not None else "constexprs"][name] = tensor
    common["args"] |= {
        "out": out,
        "N": out.shape[1],
        "residual_stride": 0 if residual_RN is None else residual_RN.stride(0),
        "out_stride": out.stride(0),
    }
    common["constexprs"]["SWIGLU"] = activation == "swiglu"


def require_rows(name: str, x: Tensor, plan: GemvPlan | None) -> None:
    """Checks the dtype of x and its number of rows, also for `plan`. Raises ValueError naming what does not fit."""
    require_one_of(name, x.dtype, TOLERANCES)
    require(x.ndim == 2, name, "two dimensions", tuple(x.shape))
    require(len(x) <= MAX_ROWS, name, f"at most {MAX_ROWS} rows", len(x))
    if plan is not None and not plan.matrix:
        require(len(x) <= 2, "plan", "matrix units for more than 2 rows", plan)


def require_vectors(
    x: Tensor, bias: tuple[str, Tensor | None], n: int, norm: tuple[str, Tensor | None], k: int
) -> None:
    """Checks the bias [n] and the norm's weight [k], each with its name. Raises ValueError naming what does not fit."""
    for (name, vector), length in ((bias, n), (norm, k)):
        if vector is not None:
            require_tensor(name, vector, (length,), x.dtype, x.device)


def require_operands(
    operands: Mapping[str, Tensor | None], plan: GemvPlan | None, *, numbers: torch.dtype | None = None
) -> tuple[torch.Size, torch.Size]:
    """Checks `operands`, which are x, weight, bias and norm by name in this order; returns the shapes of x and weight.

    numbers: the weight's dtype, if it is not that of x.
    Raises ValueError naming the operand that does not fit.
    """
    (x_name, x), (weight_name, weight), bias, norm = operands.items()
    assert x is not None
    assert weight is not None
    require_rows(x_name, x, plan)
    require(weight.ndim == 2 and min(weight.shape) > 0, weight_name, "two dimensions, none 0", tuple(weight.shape))
    n, k = weight.shape
    require_tensor(x_name, x, (len(x), k), x.dtype, x.device)
    require_tensor(weight_name, weight, (n, k), numbers or x.dtype, x.device)
    require_vectors(x, bias, n, norm, k)
    return x.shape, weight.shape


def result_of(x_RK: Tensor, n: int, activation: Activation, residual_RN: Tensor | None, out: Tensor | None) -> Tensor:
    """Returns `out`, or memory for the product of x and a weight of n rows. Raises ValueError if one does not fit."""
    require(activation in ("none", "swiglu"), "activation", "'none' or 'swiglu'", repr(activation))
    if activation == "swiglu":
        require(n % 2 == 0, "weight_NK", "an even number of rows with 'swiglu'", n)
    shape = (len(x_RK), n // 2 if activation == "swiglu" else n)
    if residual_RN is not None:
        require_tensor("residual_RN", residual_RN, shape, x_RK.dtype, x_RK.device)
    if out is None:
        out = torch.empty(shape, dtype=x_RK.dtype, device=x_RK.device)
    require_tensor("out", out, shape, x_RK.dtype, x_RK.device)
    require(out.numel() == 0 or out.data_ptr() != x_RK.data_ptr(), "out", "memory of its own", "x_RK")
    if residual_RN is not None and out.data_ptr() == residual_RN.data_ptr():
        require(out.stride() == residual_RN.stride(), "out", "all of the residual or memory of its own", "a part of it")
    return out


def gemv_reference(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,  # does not change the result
    early_trigger: bool = False,  # nor does this
) -> Tensor:
    """Computes the product; with "swiglu" the weight's 2F rows are (gate | up), and the result is [R, F]."""
    normed_RK = x_RK if norm_weight_K is None else rms_norm_reference(x_RK, norm_weight_K, eps)
    y_RN = F.linear(normed_RK, weight_NK, bias_N)
    if activation == "swiglu":
        y_RN = swiglu_reference(y_RN)
    return y_RN if residual_RN is None else residual_RN + y_RN


def plan_gemv(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    rows, (n, k) = len(x_RK), weight_NK.shape
    plan = plan or choose_gemv_plan(rows, n, k, x_RK.dtype, target, normed=norm_weight_K is not None)
    num_tiles = cdiv(n, plan.block_n)
    how = (num_tiles, plan, workspace, programmatic_launch, early_trigger, target)
    common = plan_product(x_RK, weight_NK, norm_weight_K, eps, *how)
    plan_outputs(common, bias_N, activation, residual_RN, out)
    common["constexprs"] |= {**DENSE, "scale": None, "scale_stride": None, "BLOCKS": False, "WORD": 1}
    return (Launch(gemv_kernel, **common),)


def gemv(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    out: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
) -> Tensor:
    """Computes `gemv_reference`, for at most MAX_ROWS rows at any stride; all of one dtype. `out` may be the residual.

    Every call gives the same bits. Among 3 to 16 rows, a row also gets the same bits whatever the other rows are. A
    plan with splits needs a workspace: without one it is made for this call, which takes one more launch. From sm_90 on
    the kernel reads weight, norm and bias before the previous kernel has ended, so that kernel must not write them.
    Without `programmatic_launch` it waits for the previous kernel's end, as kernels usually do. With `early_trigger`,
    which changes no result, the next kernel may start as soon as all programs of this one have, and more of the weight
    is loaded before the wait.
    Raises ValueError naming the argument that does not fit.
    """
    _, (n, _) = require_operands(
        {"x_RK": x_RK, "weight_NK": weight_NK, "bias_N": bias_N, "norm_weight_K": norm_weight_K}, plan
    )
    out = result_of(x_RK, n, activation, residual_RN, out)
    target = target_of(x_RK.device)
    run(
        plan_gemv(
            x_RK,
            weight_NK,
            bias_N,
            norm_weight_K,
            eps,
            activation=activation,
            residual_RN=residual_RN,
            plan=plan,
            workspace=workspace,
            programmatic_launch=programmatic_launch,
            early_trigger=early_trigger,
            out=out,
            target=target,
        )
    )
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Cuts x, weight and residual from tensors with `padding` more columns of NaN; `factor` scales x; `plan` is a name
    in TEST_PLANS; `early`: the trigger is, so several chunks of K may be loaded before the loop.
    """
    rows, n, k, padding = case["R"], case["N"], case["K"], case.sizes.get("padding", 0)
    swiglu = case.sizes.get("activation") == "swiglu"

    def matrix(height: int, width: int, factor: float = 1.0) -> Tensor:
        values = torch.full((height, width + padding), torch.nan, dtype=dtype, device=device)
        values[:, :width] = factor * torch.randn(height, width, dtype=torch.float32, device=device)
        return values[:, :width]

    def vector(width: int) -> Tensor:
        return torch.randn(width, dtype=torch.float32, device=device).to(dtype)

    return {
        "x_RK": matrix(rows, k, case.sizes.get("factor", 1.0)),
        "weight_NK": matrix(n, k, k**-0.5),
        "bias_N": vector(n) if case.sizes.get("bias") else None,
        "norm_weight_K": vector(k) if case.sizes.get("norm") else None,
        "eps": 1e-6,
        "activation": "swiglu" if swiglu else "none",
        "residual_RN": matrix(rows, n // 2 if swiglu else n) if case.sizes.get("residual") else None,
        "plan": TEST_PLANS.get(case.sizes.get("plan", "")),
        **({"early_trigger": True} if case.sizes.get("early") else {}),
    }


TEST_PLANS = {  # so small that a small case has several chunks, blocks and splits
    "rows": GemvPlan(4, 64, 2),
    "matrix": GemvPlan(16, 64, 2, matrix=True),
    "split": GemvPlan(16, 64, 4, split_k=3, matrix=True),
    "split_rows": GemvPlan(8, 32, 1, split_k=2),
    "stages": GemvPlan(64, 64, 4, matrix=True, num_stages=3),
    "split_stages": GemvPlan(16, 32, 4, split_k=3, matrix=True, num_stages=2),
}
_NORM: dict[str, Any] = {"norm": True}
_SWIGLU: dict[str, Any] = {"norm": True, "activation": "swiglu"}
_RESIDUAL: dict[str, Any] = {"residual": True}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    rows, n, k = case["R"], case["N"], case["K"]
    outputs = n // 2 if case.sizes.get("activation") == "swiglu" else n
    elements = n * k + rows * (k + outputs * (1 + bool(case.sizes.get("residual"))))
    return Cost(bytes=dtype.itemsize * elements, flops=2 * rows * n * k)


def _test_cases() -> Iterator[Case]:
    def case(name: str, rows: int, n: int, k: int, **more: object) -> Case:
        return Case(name, {"R": rows, "N": n, "K": k, **more})

    for rows in (0, 1, 2, 3, 5, 16):
        yield case(f"rows_{rows}", rows, 40, 72, bias=True, **_NORM)
        yield case(f"swiglu_{rows}", rows, 48, 64, **_SWIGLU)
        yield case(f"residual_{rows}", rows, 24, 96, **_RESIDUAL)
    on_matrix_units = (("matrix", 2), ("matrix", 16), ("split", 5), ("stages", 2), ("stages", 16), ("split_stages", 5))
    for plan, rows in (("rows", 1), ("rows", 2), ("split_rows", 2), *on_matrix_units):
        yield case(f"{plan}_{rows}_plain", rows, 33, 300, plan=plan)
        yield case(f"{plan}_{rows}_norm", rows, 16, 192, plan=plan, bias=True, padding=8, **_NORM)
        yield case(f"{plan}_{rows}_swiglu", rows, 34, 130, plan=plan, bias=True, padding=3, **_SWIGLU, **_RESIDUAL)
        yield case(f"{plan}_{rows}_huge", rows, 16, 128, plan=plan, factor=1e4, **_NORM)  # squares beyond float16
        # The mean square is about as small as eps.
        yield case(f"{plan}_{rows}_tiny", rows, 16, 128, plan=plan, factor=1e-3, **_NORM)
    for plan, k in (("rows", 300), ("rows", 1100), ("split_rows", 300)):  # all chunks are loaded early, or 12 of 18
        yield case(f"early_{plan}_{k}", 2, 34, k, plan=plan, early=True, bias=True, **_SWIGLU, **_RESIDUAL)
    for rows in (1, 3):
        yield case(f"one_by_one_{rows}", rows, 1, 1, **_NORM)
        yield case(f"many_{rows}", rows, 200, 256, **_RESIDUAL)
        yield case(f"wide_{rows}", rows, 20, 1100, **_NORM)
        yield case(f"zeros_{rows}", rows, 16, 64, factor=0.0, **_NORM)
    yield case("many_swiglu_16", 16, 400, 64, **_SWIGLU)  # with so many elements the rms shows an error with structure


MODELS = {  # D, F, H, G, C, V
    "1b": (896, 4864, 14, 2, 64, 151674),
    "2b": (1536, 8960, 12, 2, 128, 151674),
    "8b": (3584, 18944, 28, 4, 128, 151674),
    "9b": (4096, 10240, 32, 2, 128, 128141),
    "14b": (5120, 13824, 40, 8, 128, 151674),
    "38b": (5120, 27648, 40, 8, 128, 151674),
    "78b": (8192, 29568, 64, 8, 128, 151674),
}


def _model_cases() -> Iterator[Case]:
    for model, (width, mlp, _, _, _, vocabulary) in MODELS.items():
        for rows in (1, 2, 8, 16):
            yield Case(f"{model}_o_{rows}", {"R": rows, "N": width, "K": width, **_RESIDUAL})
            yield Case(f"{model}_gate_up_{rows}", {"R": rows, "N": 2 * mlp, "K": width, **_SWIGLU})
            yield Case(f"{model}_down_{rows}", {"R": rows, "N": width, "K": mlp, **_RESIDUAL})
            yield Case(f"{model}_lm_head_{rows}", {"R": rows, "N": vocabulary, "K": width, **_NORM})


SPEC = KernelSpec(
    name="gemv",
    used_by="every decoder: products of a step of up to 16 rows",
    reference=gemv_reference,
    plan=plan_gemv,
    launcher=gemv,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances=TOLERANCES,
)
