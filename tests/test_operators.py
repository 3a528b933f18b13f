"""The kernels as torch's operators: legal by torch's own checks, traced whole, and equal to the launchers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from internvl_rt.kernels._contract import KernelSpec, results_of
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.swiglu import swiglu_reference
from internvl_rt.operators import register_operators, schema_of
from support.contract import clone
from support.specs import smallest_test_case

SPECS = discover_specs()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = register_operators()  # where there is no GPU, the interpreter runs the kernels


class GatedNorm(nn.Module):
    """A layer as somebody else might write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.internvl_rt.swiglu(torch.ops.internvl_rt.rms_norm(x + 1, self.weight, 1e-6) * 2)


@pytest.mark.slow
def test_torch_finds_every_operator_legal() -> None:
    script = Path(__file__).parent / "support" / "check_operators.py"
    environment = {"PATH": "", "HOME": str(Path.home())}  # without the interpreter: the references run
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_operator_does_what_its_launcher_does(spec: KernelSpec) -> None:
    dtype = next(iter(spec.tolerances))
    torch.manual_seed(0)
    inputs = spec.make_inputs(smallest_test_case(spec, dtype), dtype, DEVICE)
    operator = getattr(torch.ops.internvl_rt, spec.name)
    known = {argument.name for argument in operator.default._schema.arguments}
    mine = {name: value for name, value in clone(inputs).items() if name in known}
    theirs = {name: value for name, value in clone(inputs).items() if name in known}
    result, expected = operator(**mine), spec.launcher(**theirs)
    for name in spec.written(mine):
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    results = () if result is None else (result,) if isinstance(result, Tensor) else result
    for one, wanted in zip(results, results_of(expected).values(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_schema_says_what_is_written_and_leaves_out_how_it_is_computed() -> None:
    assert schema_of(SPECS["copy_blocks"]) == "(Tensor(a0!) pool_LKBGPC, Tensor source_N, Tensor destination_N) -> ()"
    assert schema_of(SPECS["vit_attention"]) == (
        "(Tensor qkv_RK, int num_tiles, int head_dim, Tensor? q_norm_E, Tensor? k_norm_E, float eps) -> Tensor"
    )
    assert '*, str activation="none", Tensor? residual_RN=None)' in schema_of(SPECS["gemv"])
    assert schema_of(SPECS["route_experts"]) == (
        "(Tensor logits_TX, int num_chosen, int block, *, bool renormalise=True, int first=0, int? count=None) -> "
        "(Tensor expert_id_TJ, Tensor weight_TJ, Tensor pair_W, Tensor block_expert_B)"
    )


def test_registering_twice_does_nothing() -> None:
    assert register_operators() == NAMES == tuple(SPECS)


def test_a_model_that_uses_them_is_traced_whole_for_any_number_of_rows() -> None:
    layer, x = GatedNorm(64).to(DEVICE), torch.randn(3, 64, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module()
    for rows in (x, torch.randn(5, 64, device=DEVICE)):
        expected = swiglu_reference(rms_norm_reference(rows + 1, layer.weight, 1e-6) * 2)
        torch.testing.assert_close(compiled(rows), expected)
    torch.testing.assert_close(exported(x), compiled(x))


def test_what_a_launcher_refuses_its_operator_refuses() -> None:
    with pytest.raises(ValueError, match=r"weight_D: expected shape \(64,\), got \(63,\)"):
        torch.ops.internvl_rt.rms_norm(torch.ones(2, 64, device=DEVICE), torch.ones(63, device=DEVICE), 1e-6)
