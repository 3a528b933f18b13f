"""The planned launches of a decode step are those that `ops_triton` makes, and no prediction is above a roof."""

import importlib.util
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internvl_rt.checkpoint.config import KNOWN_MODELS, DecoderConfig, load_config
from internvl_rt.kernels._launch import Launch
from internvl_rt.kernels._split_plan import num_split_items
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.sample import SPEC as SAMPLE
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.linear import Linear, Norm
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.step_inputs import Batch, LayerCache
from support.specs import discover_specs

BENCH = Path(__file__).parents[2] / "bench" / "launch_plans.py"
BATCHES = (1, 8, 64)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_plans", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder(TorchDispatchMode):
    """Records matrix products without computing them, so that tensors of any size cost address space only."""

    def __init__(self, made: list[Any]) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        added = {aten.mm: "nothing", aten.addmm: "bias", aten.addmm_: "residual"}.get(func._overloadpacket)
        if added is not None:
            k, n = args[-1].shape
            self._made.append((n, k, added))
            return (kwargs or {}).get("out", args[0])
        return func(*args, **(kwargs or {}))


def what_shows(launch: Launch) -> Any:
    """Returns what must agree of two launches: all but tensors, strides, num_slots, and eps, which may be unused."""
    scalars = {name: value for name, value in launch.args.items() if not isinstance(value, torch.Tensor)}
    scalars = {name: scalars[name] for name in scalars if "stride" not in name and name not in ("num_slots", "eps")}
    options = launch.num_warps, launch.num_stages, launch.pdl
    return launch.kernel, launch.grid, options, dict(launch.constexprs), scalars


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_planned_launches_are_those_of_the_operations(
    name: str, batch: int, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    for operation in discover_specs():
        module = import_module(f"internvl_rt.kernels.{operation}")
        if hasattr(module, "run"):
            monkeypatch.setattr(module, "run", made.extend)
            monkeypatch.setattr(module, "target_of", lambda device: bench.TARGET)
    config = load_config(KNOWN_MODELS[name]).decoder
    planned = bench.plans()[name, batch]
    with Recorder(made):
        run_step_of_one_layer(config, batch)
    SAMPLE.launcher(**SAMPLE.make_inputs(planned[-1].case, torch.bfloat16, torch.device("cpu")))
    expected: list[Any] = []
    for operation in planned:
        expected += map(what_shows, operation.launches)
        if not operation.launches:
            added = "bias" if operation.case["bias"] else "nothing"
            added = "residual" if operation.case["epilogue"] == "residual" else added
            expected.append((operation.case["N"], operation.case["K"], added))
    assert [what_shows(launch) if isinstance(launch, Launch) else launch for launch in made] == expected


def run_step_of_one_layer(c: DecoderConfig, batch: int) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def index(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    def linear(n: int, k: int, *, bias: bool = False) -> Linear:
        return Linear(empty(n, k), empty(n) if bias else None)

    ops = triton_ops(torch.device("cpu"))
    norm = Norm(empty(c.hidden_size), None, 1e-6)
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    caches = [empty(batch * 32 + 1, c.num_kv_heads, 64, c.head_dim) for _ in "kv"]
    cache = LayerCache(*caches)
    where = torch.empty(batch), torch.empty(c.head_dim // 2), cache, index(batch)
    num_items = num_split_items(batch, c.num_kv_heads, num_sms=132)
    split = {"split_start_S1": index(batch + 1), "split_W3": index(num_items, 3)}
    tables = Batch(index(batch + 1), index(batch), index(batch, 32), num_decodes=batch, max_query_len=1, **split)
    x = ops.embed_tokens(index(batch), index(batch).long(), empty(c.vocab_size, c.hidden_size))
    qkv = linear(q_width + 2 * kv_width, c.hidden_size, bias=c.qkv_bias)
    q_THC = ops.norm_qkv_rope_kv(x, norm, qkv, None, None, *where)
    y_THC = ops.paged_attention(q_THC, cache, tables)
    x = ops.linear(y_THC.flatten(1), linear(c.hidden_size, q_width), residual=x)
    y_TF = ops.linear(x, linear(2 * c.intermediate_size, c.hidden_size), norm=norm, activation="swiglu")
    x = ops.linear(y_TF, linear(c.hidden_size, c.intermediate_size), residual=x)
    ops.linear(x, linear(c.vocab_size, c.hidden_size), norm=norm, out=empty(batch, c.vocab_size))


def test_every_share_is_of_a_roof(bench: ModuleType) -> None:
    plans = bench.plans()
    assert set(plans) == {(name, batch) for name in KNOWN_MODELS for batch in BATCHES}
    for operations in plans.values():
        assert all(0 < operation.share <= 1 for operation in operations)
        assert all(term >= 0 for operation in operations for term in operation.terms_us.values())


def test_weight_bytes_are_those_of_the_decoder(bench: ModuleType) -> None:
    """Weight bytes leave out norms and biases, and the embedding, of which a step reads one row a sequence."""
    for (name, batch), operations in bench.plans().items():
        config = load_config(KNOWN_MODELS[name])
        parameters = named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta"))
        matrices = {path: p for path, p in parameters.items() if path.startswith("decoder.") and p.ndim == 2}
        del matrices["decoder.embedding_VD"]
        expected = sum(matrix.nbytes for matrix in matrices.values())
        assert sum(operation.times * operation.weight_bytes for operation in operations) == expected, (name, batch)
        assert all(operation.cost.bytes > operation.weight_bytes for operation in operations)


def test_attention_reads_the_whole_cache_once(bench: ModuleType) -> None:
    for (name, batch), operations in bench.plans().items():
        c = load_config(KNOWN_MODELS[name]).decoder
        attention = next(operation for operation in operations if operation.name == "attention")
        cache_bytes = 2 * 2 * 2048 * batch * c.num_kv_heads * c.head_dim
        assert cache_bytes < attention.cost.bytes < 1.02 * cache_bytes
        num_items = attention.case["num_items"]
        assert batch <= num_items <= attention.launches[0].grid[0]
        assert attention.case["split"] * num_items >= batch * 32


def test_fewer_bytes_in_flight_and_fewer_programs_are_slower(bench: ModuleType) -> None:
    def share(n: int, **plan: str) -> float:
        return bench.planned(bench.GEMV, {"R": 8, "N": n, "K": 4096, **plan}, "").share

    assert share(512) < share(2048) < share(8192) < share(32768)
    assert share(4096, plan="matrix") < share(4096)  # the plan reads chunks of 2 KiB


def test_a_fused_product_is_predicted_too(bench: ModuleType) -> None:
    """A table may name a fused kernel that is faster; without one, cuBLAS computes the product."""
    sizes = {"R": 64, "N": 9728, "K": 896, "epilogue": "none", "bias": False}
    assert not bench.planned(GEMM_EPILOGUE, sizes, "").launches
    fused = bench.planned(GEMM_EPILOGUE, {**sizes, "implementation": "low"}, "")
    assert [bench.kernel_name(launch) for launch in fused.launches] == ["fused_kernel"]
    assert 0 < fused.share < 1


def test_the_page_in_the_repository_is_what_the_command_writes(bench: ModuleType) -> None:
    assert (BENCH.parent / "results" / "launch-plans.md").read_text(encoding="utf-8") == bench.render()
