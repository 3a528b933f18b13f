"""The terms of the model of costs, each with numbers that one can compute by hand."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from launch_model import CONSTANTS, NUM_SMS, Device, Work, load_devices, predict, save_devices

DEVICE = Device(
    name="round numbers", fitted_to={"files": [], "without": []}, sources=dict.fromkeys(CONSTANTS, "made up"),
    guesses={}, sheet_gb_s=5000, sheet_tflops=1000, read_gb_s=4000, product_tflops=800, node_us=1.0, node_pdl_us=0.5,
    graph_start_us=3, eager_us=8, eager_triton_us=15, latency_us=0.9, input_us=0.6, sm_gb_s=100, l2_gb_s=8000,
    cores_tflops=5, cores_us=0.25, cores_program_us=0.5, matrix_us=2, matrix_program_us=0.75, exchange_us=1.5,
    part_us=0.125, attention_us=1.25, softmax_g_s=2000, key_block_us=0.5, cublas_us=2.5, cublas_share=0.8, draw_us=1.75,
    host_step_us=100, host_sequence_us=2, host_prompt_us=300, replay_us=8, early_trigger_saves_us=0.2,
)  # fmt: skip


def terms(*, off: bool = False, early: bool = False, in_l2: float = 0.0, **work: Any) -> dict[str, float]:
    """The terms that are not 0, for work that fills the chip unless it says otherwise. off: no programmatic launch."""
    given: dict[str, Any] = {"kernel": "k", "bytes": 0.0, "programs": NUM_SMS} | work
    found = predict(Work(**given), DEVICE, pdl=not off, early=early, in_l2=in_l2)
    return {name: value for name, value in found.items() if value}


def test_a_kernel_waits_for_its_predecessor_and_its_first_load_and_then_streams() -> None:
    found = terms(bytes=40e6)
    assert found == pytest.approx({"boundary": 1.0, "first load": 0.9, "bytes": 10.0})
    assert terms(bytes=40e6, looks_up=True)["first load"] == pytest.approx(0.9 + 0.6)


def test_programmatic_launch_shortens_the_boundary_and_hides_what_is_loaded_before_the_wait() -> None:
    product = {"unit": "cores", "pdl": True, "weights_first": True}
    assert terms(**product)["boundary"] == 0.5
    assert terms(**product)["first load"] == 0.6, "x, which the previous kernel wrote"
    assert terms(**product, off=True)["boundary"] == 1.0
    assert terms(**product, off=True)["first load"] == 0.9, "weights and x at once"
    assert terms(pdl=True, looks_up=True)["first load"] == 0.9, "the index was read before the wait"
    assert terms(pdl=True, looks_up=True, off=True)["first load"] == 1.5
    assert terms(pdl=True, looks_up_late=True)["first load"] == 1.5, "the index is read after the wait"
    assert terms(pdl=True, looks_up_late=True, off=True)["first load"] == 1.5
    assert terms(**product, early=True)["boundary"] == pytest.approx(0.3)
    assert terms(**product, early=True, off=True)["boundary"] == 1.0


def test_bytes_in_l2_stream_faster() -> None:
    assert terms(bytes=40e6, in_l2=16e6)["bytes"] == pytest.approx(24 / 4 + 16 / 8)


def test_the_busiest_multiprocessor_may_take_longest() -> None:
    """Two programs are on one of 132 multiprocessors, with 30 kB each, of which 10 kB are on their way at a time."""
    programs = NUM_SMS + 1
    work = {"bytes": programs * 30e3, "programs": programs, "in_flight": 10e3}
    stream = programs * 30e3 / 4e6
    one_by_one = 10e3 / 100e3 + 50e3 / (10e3 / 0.9)
    assert terms(**work, resident=1)["busiest multiprocessor"] == pytest.approx(one_by_one - stream)
    side_by_side = 20e3 / 100e3 + 40e3 / (20e3 / 0.9)
    assert terms(**work, resident=2)["busiest multiprocessor"] == pytest.approx(side_by_side - stream)
    at_once = {"bytes": 30e3, "programs": 1}
    assert terms(**at_once)["busiest multiprocessor"] == pytest.approx(0.3 - 30e3 / 4e6), "not above its own rate"


def test_products_have_a_start_an_end_and_changes_of_programs() -> None:
    cores = terms(unit="cores", rounds=10, resident=4, flops=20e6)
    assert cores["start and end"] == 0.25
    assert cores["change of programs"] == pytest.approx(3 * 0.5), "ten programs, four at a time"
    assert cores["arithmetic"] == pytest.approx(4.0)
    matrix = terms(unit="matrix", rounds=4, resident=2, flops=1600e6)
    assert (matrix["start and end"], matrix["change of programs"]) == (2, 1.5)
    assert matrix["arithmetic"] == pytest.approx(2.0)


def test_only_the_longest_of_stream_and_arithmetic_counts() -> None:
    assert terms(bytes=40e6, unit="cores", flops=20e6).keys() == {"boundary", "first load", "bytes", "start and end",
                                                                  "change of programs"}  # fmt: skip
    assert terms(bytes=40e6, unit="cores", flops=60e6)["arithmetic"] == pytest.approx(12 - 10)


def test_cublas_reaches_a_share_of_the_rates() -> None:
    assert terms(unit="cublas", bytes=40e6, flops=1e6)["start and end"] == pytest.approx(2.5 + 10 / 0.8 - 10)
    assert sum(terms(unit="cublas", bytes=4e6, flops=16e9).values()) == pytest.approx(1 + 0.9 + 2.5 + 20 / 0.8)


def test_split_attention_exchanges_and_adds_up_parts() -> None:
    found = terms(unit="attention", exchanges=True, parts=16)
    assert (found["start and end"], found["exchange"], found["sum of parts"]) == (1.25, 1.5, 2.0)


def test_prefill_attention_is_serial_where_programs_are_few() -> None:
    serial = terms(programs=33, key_blocks=128, flops=8e6, exponentials=1e3)
    assert serial["arithmetic"] == pytest.approx(64.0)
    busy = terms(programs=1000, key_blocks=128, flops=80e9, exponentials=40e6)
    assert busy["arithmetic"] == pytest.approx(100 + 20)
    quarter = terms(programs=33, key_blocks=8, flops=8e9, exponentials=4e6)
    assert quarter["arithmetic"] == pytest.approx(4 * (10 + 2)), "a quarter of the multiprocessors has all the work"


def test_a_draw_takes_its_own_time() -> None:
    assert terms(draws=True)["arithmetic"] == 1.75


def test_constants_are_stored_and_loaded_with_their_sources(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    device = replace(DEVICE, guesses={"latency_us": 0.7}, fitted_to={"files": ["a.json"], "without": ["x/*"]})
    save_devices({device.name: device}, path)
    assert load_devices(path) == {device.name: device}


def test_the_stored_devices_have_every_constant_and_say_where_it_is_from() -> None:
    devices = load_devices()
    assert [name.split()[1] for name in devices] == ["H100", "H200"]
    for device in devices.values():
        assert all(getattr(device, name) > 0 for name in CONSTANTS)
        assert all(device.sources[name] for name in CONSTANTS)
