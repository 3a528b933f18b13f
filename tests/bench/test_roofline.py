"""The roofline, at small sizes, measures what it says; the numbers here are no roofs of a GPU."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from internvl_rt.bench import roofline
from internvl_rt.bench.document import parse_last_line
from internvl_rt.bench.timing import Timing
from internvl_rt.kernels._probes import EXP2_FIXED_POINT, exp2_kernel, node_kernel
from support.result_schema import valid

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def quick_roofline(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    file = tmp_path_factory.mktemp("roofline") / "roofline.json"
    command = [sys.executable, "-m", "internvl_rt", "bench", "roofline", "--device=cpu", "--quick", f"--json={file}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return output, json.loads(file.read_text())


def test_the_roofline_ends_in_a_valid_document_of_positive_numbers(
    quick_roofline: tuple[list[str], dict[str, Any]],
) -> None:
    output, written = quick_roofline
    document = valid(parse_last_line(output))
    assert document == written
    assert (document["part"], document["environment"]["device_kind"]) == ("roofline", "cpu")
    assert document["command"].startswith("internvl-rt bench roofline --device=cpu --quick")
    rows = {row.pop("name"): row for row in document["rows"]}
    copies = {f"copy/{n * 2**20}" for n in (1, 4)}
    products = {f"product/{dtype}" for dtype in ("float32", "bfloat16", "float16")}
    assert rows.keys() == copies | products | {"read", "exp2", "launch"}
    assert all(value > 0 for row in rows.values() for value in row.values() if not isinstance(value, str))


def test_a_roof_that_fails_is_said_and_absent_unless_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such unit")

    for name in ("_copy_rates", "_read_rate", "_product_rates"):
        monkeypatch.setattr(roofline, name, lambda *_: 1.0)
    monkeypatch.setattr(roofline, "_exp2_rate", fail)
    found = roofline.measure_roofline(CPU, quick=True)
    assert found.keys() == {"copy_gb_s", "read_gb_s", "tflops", "launch_us"}
    assert capsys.readouterr().err == "exp2_g_per_s: not measured: no such unit\n"
    monkeypatch.setattr(roofline, "_read_rate", fail)
    with pytest.raises(OSError, match="no such unit"):
        roofline.measure_roofline(CPU, quick=True)


def test_the_kernels_that_are_counted_do_what_is_counted() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter runs the kernel on a CPU
    values = torch.rand(64, device=device)
    expected = values.clone()
    for _ in range(2 * 3):
        expected = torch.exp2(-expected)
    exp2_kernel[(2,)](values, ROUNDS=2, STEPS=3, BLOCK=32)
    torch.testing.assert_close(values, expected)
    assert abs(EXP2_FIXED_POINT - 2**-EXP2_FIXED_POINT) < 1e-6
    counter = torch.ones(1, device=device)
    node_kernel[(1,)](counter, PDL=False)
    assert counter.item() == 2


def test_a_node_of_a_graph_costs_what_a_longer_graph_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(variants: dict[str, list[object]], device: torch.device, **_: object) -> dict[str, Timing]:
        return {
            name: Timing((20 + 1.5 * len(nodes)) / len(nodes), 0, 0, 5, graphed=True)
            for name, nodes in variants.items()
        }

    monkeypatch.setattr(roofline, "time_variants", timed)
    assert roofline._graph_node_us(print, CUDA, roofline.SIZES["cuda", True]) == pytest.approx(1.5)


@pytest.mark.gpu
def test_on_a_gpu_every_roof_is_measured() -> None:
    found = roofline.measure_roofline(CUDA, quick=True)
    rates, products = found.pop("copy_gb_s"), found.pop("tflops")
    assert max(rates.values()) == pytest.approx(found["read_gb_s"], rel=0.4)
    assert products["bfloat16"] > products["float32"]
    names = {"read_gb_s", "exp2_g_per_s", "launch_us", "triton_launch_us", "single_node_us", "graph_node_us"}
    assert names <= found.keys()
    assert found["graph_node_us"] < found["single_node_us"]
    assert min(found.values()) > 0
