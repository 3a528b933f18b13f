"""Tests what stays off in the kernels of a decode step until a GPU has measured it: earlier loads, an earlier trigger.

Each experiment is looked for in the machine code, where PREEXIT lets the next kernel start and ACQBULK waits for the
previous one. The interpreter has neither, nor prefetches; it runs what else changes.
"""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from internvl_rt.bench import arguments
from internvl_rt.kernels import _gemv_plan
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._gemv_plan import MAX_ROWS, GemvPlan, choose_gemv_plan
from internvl_rt.kernels._launch import TARGETS, Target
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.kernels.decode_attention import L2_PREFETCH_BYTES, PREFETCHES_WEIGHTS, plan_prefetch
from internvl_rt.kernels.gemv import MODELS, gemv
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as QKV
from internvl_rt.kernels.gemv_qkv import gemv_qkv
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.linear import Linear
from internvl_rt.model.ops_triton import EXPERIMENTS, Switches, triton_ops
from internvl_rt.model.step_inputs import Batch, LayerCache
from support.compile_audit import launches_of
from support.forward import all_logits
from support.instruction_order import ADDING, adding_of, instructions_of
from support.small_models import DEVICE, INTERNLM2, build_model

META = torch.device("meta")
ALL_ON = Switches(**dict.fromkeys(EXPERIMENTS, True))
LINE, CHUNK = "CCTL.E.PF2", "UBLKPF"  # instructions that ask L2 for a line, and for a run of lines
EARLY_KERNELS = [("gemv", "1b_down_1"), ("gemv", "8b_gate_up_1"), ("gemv_qkv", "1b_1"), ("gemv", "1b_o_8")]
STAGED = [("gemv", "8b_down_8"), ("gemv_qkv", "8b_8")]


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def test_names_are_the_same_everywhere_and_all_are_off() -> None:
    off = asdict(Switches())
    assert off.pop("programmatic_launch")
    assert off == dict.fromkeys(EXPERIMENTS, False)
    assert tuple(arguments.EXPERIMENTS) == EXPERIMENTS


# An earlier trigger


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_trigger_comes_first_then_weights_then_the_wait_then_all_else(capability: int) -> None:
    jobs = [(*case, capability) for case in EARLY_KERNELS + STAGED * (capability == 90)]
    for job, names in instructions_of(jobs, experiments=("early_trigger",)).items():
        if capability == 80:
            assert not {"ACQBULK", "PREEXIT"} & set(names)
            continue
        assert names[0] == "PREEXIT"
        assert names.count("PREEXIT") == names.count("ACQBULK") == 1
        before, after = names[1 : names.index("ACQBULK")], names[names.index("ACQBULK") :]
        assert set(before) <= {"LDG", LINE}
        assert before.count(LINE if job[:2] in STAGED else "LDG") >= 4
        if job[1] == "1b_down_1":
            assert before.count("LDG") == len(before) == 4 * 3, "four rows of three chunks, which are all of K"
        if job[1] == "8b_gate_up_1":
            assert before.count("LDG") == len(before) == 8 + 1, "eight rows of a chunk and the norm's weight"
        assert {"LDG", "LDGSTS"} & set(after), "x, at least, comes after the wait"


@pytest.mark.parametrize("target", [*TARGETS.values(), Target(90, 132, interpreted=True)], ids=str)
def test_chunks_are_loaded_ahead_where_kernels_may_start_early(target: Target) -> None:
    """In the interpreter as well, which shows that the sums are the same."""
    specs = discover_specs()
    for operation, case_name in EARLY_KERNELS:
        case = next(case for case in specs[operation].model_cases if case.name == case_name)
        (launch,) = launches_of(specs[operation], case, torch.bfloat16, target, EXPERIMENTS)
        assert launch.constexprs["EARLY"] == (target.capability >= 90 and not target.interpreted)
        ahead = 3 if case_name == "1b_down_1" and target.capability >= 90 else 1
        assert launch.constexprs["AHEAD"] == ahead or case_name == "8b_gate_up_1"
        if not target.interpreted:
            assert launch.constexprs["EARLY"] == launch.pdl


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chunks_ahead_are_no_more_than_there_are_and_fit_the_registers(name: str, rows: int) -> None:
    width, mlp, *_ = MODELS[name]
    for n, k in ((width, width), (2 * mlp, width), (width, mlp)):
        plan = choose_gemv_plan(rows, n, k, torch.bfloat16, TARGETS[90])
        ahead = plan.chunks_ahead(k, 2)
        assert 1 <= ahead <= -(-k // plan.block_k)
        registers = plan.block_n * plan.block_k * 2 // (4 * 32 * plan.num_warps)
        assert ahead == 1 or ahead * registers <= _gemv_plan.AHEAD_REGISTERS
        if name == "1b" and rows < 3:
            assert ahead == -(-k // plan.block_k), "all of a program's weight is loaded before the wait"


PLANS = {"rows": GemvPlan(4, 64, 2), "split_rows": GemvPlan(8, 32, 1, split_k=2)}


@pytest.mark.fast("rows-16")
@pytest.mark.parametrize("registers", [16, 48])  # some chunks, and all of K
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_an_early_trigger_changes_no_bit(plan: GemvPlan, registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemv_plan, "AHEAD_REGISTERS", registers)
    torch.manual_seed(0)
    product = GEMV.make_inputs(Case("", {"R": 2, "N": 16, "K": 300, "norm": True}), torch.float32, DEVICE)
    projection = QKV.make_inputs(Case("", {"R": 2, "D": 300, "H": 1, "G": 1, "C": 16}), torch.float32, DEVICE)
    for launcher, inputs in ((gemv, product), (gemv_qkv, projection)):
        inputs["plan"] = plan
        assert torch.equal(launcher(**inputs, early_trigger=True), launcher(**inputs))


# Weights that are brought to L2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_weights_and_keys_are_asked_for_before_the_wait(capability: int) -> None:
    jobs = [("decode_attention", case, capability) for case in ("1b_1_x_2048", "8b_8_x_2048")]
    for names in instructions_of(jobs, experiments=EXPERIMENTS).values():
        if capability == 80:
            assert not {"ACQBULK", "PREEXIT", CHUNK, LINE} & set(names)
            continue
        assert names[0] == "PREEXIT"
        before, after = names[1 : names.index("ACQBULK")], names[names.index("ACQBULK") :]
        assert set(before) <= {"LDG", LINE, CHUNK}
        assert (CHUNK in before) == (capability in PREFETCHES_WEIGHTS)
        assert before.count(LINE) >= 4
        assert not {CHUNK, LINE} & set(after)
        assert not {"LDG", "LDGSTS"}.isdisjoint(after)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_parts_are_still_added_without_a_barrier(capability: int) -> None:
    job = ("decode_attention", "1b_1_x_2048", capability)
    ahead, loop = adding_of(instructions_of([job], ADDING, EXPERIMENTS)[job])
    assert ahead.count("LDG.E.128") >= 20
    assert loop.count("LDG.E.128") == 20
    assert "BAR" not in loop


def bytes_of(*weights: torch.Tensor, capability: int = 90) -> list[int]:
    """The bytes of each weight that are brought to L2."""
    found = plan_prefetch(weights, TARGETS[capability])
    names = [name for name in ("next", "later") if found[f"{name}_weight"] is not None]
    assert all(found[f"{name}_bytes"] is None for name in {"next", "later"} - set(names))
    return [int(found[f"{name}_bytes"]) for name in names]  # type: ignore[arg-type]


def test_weights_are_asked_for_in_whole_lines_up_to_the_room_in_l2() -> None:
    o, gate_up = empty(896, 896), empty(2 * 4864, 896)
    assert bytes_of(o, gate_up) == [o.nbytes, gate_up.nbytes], "the 1B's fit"
    assert L2_PREFETCH_BYTES < 20e6
    assert bytes_of(empty(3584, 3584), empty(2 * 18944, 3584)) == [L2_PREFETCH_BYTES], "the 8B's `o` alone has 26 MB"
    assert bytes_of(empty(1536, 1536), empty(2 * 8960, 1536)) == [1536 * 1536 * 2, L2_PREFETCH_BYTES - 1536 * 1536 * 2]
    assert bytes_of(empty(3, 50)) == [256], "of 300 bytes"
    assert bytes_of(empty(1, 50)) == bytes_of(empty(0, 64)) == bytes_of() == []


def test_a_weight_that_cannot_be_read_in_one_run_is_left_out() -> None:
    whole = empty(256, 256)
    for other in (empty(256, 512)[:, :256], empty(256, 256).t(), torch.zeros(1025, dtype=torch.bfloat16)[1:]):
        assert bytes_of(other) == []
        assert bytes_of(other, whole) == bytes_of(whole, other) == [whole.nbytes]
    with pytest.raises(ValueError, match="upcoming: expected at most 2 weights, got 3"):
        bytes_of(whole, whole, whole)


@pytest.mark.parametrize("target", [*TARGETS.values(), Target(90, 132, interpreted=True)], ids=str)
def test_weights_are_asked_for_on_the_chips_that_are_named(target: Target) -> None:
    expected = target.capability in (90, 100) and not target.interpreted
    assert (plan_prefetch([empty(64, 64)], target)["next_weight"] is not None) == expected


@pytest.mark.parametrize("rows", [MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("is_on", [False, True])
def test_the_table_passes_on_the_weights_of_a_few_rows(rows: int, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def note(*operands: object, **how: object) -> None:
        asked.update(how)

    monkeypatch.setattr("internvl_rt.model.ops_triton.decode_attention", note)
    ops = triton_ops(DEVICE, ALL_ON if is_on else Switches())
    index = torch.zeros(rows + 1, dtype=torch.int32)
    tables = {"block_table_SN": index[:, None][:rows], "query_start_R1": index[:1], "seq_len_S": index[:rows]}
    batch = Batch(**tables, num_decodes=rows, max_query_len=1, split_start_S1=index, split_W3=index[:, None])
    o, gate_up = (Linear(empty(32, 32), None) for _ in range(2))
    caches = LayerCache(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    ops.paged_attention(torch.zeros(rows, 2, 16), caches, batch, upcoming=(o, gate_up))
    expected = [o.weight_NK, gate_up.weight_NK] if is_on and rows <= MAX_ROWS else []
    assert [id(weight) for weight in asked["upcoming"]] == [id(weight) for weight in expected]
    assert (asked["prefetch_keys"], asked["early_trigger"]) == (is_on, is_on)


@pytest.mark.slow
@torch.inference_mode()
def test_a_model_gives_the_same_logits_with_all_experiments() -> None:
    """A prompt of two tokens, then a decode; equal bits choose equal tokens."""
    model, token_ids = build_model(decoder=INTERNLM2), [5, 6, 7]
    logits = []
    for switches in (Switches(), ALL_ON):
        switched = InternVL(model.config, model.weights, triton_ops(DEVICE, switches))
        logits.append(all_logits(switched, token_ids, None, context_id=47, chunk_lens=[2, 1]))
    assert torch.equal(*logits)
