"""The kernel that draws tokens writes them to the host's memory too, if it is told to."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels.sample import GREEDY, PLAIN, SPEC, sample, sample_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs_of(*parameters: tuple[float, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    case = Case("", {"R": len(parameters), "V": 300, "parameters": parameters})
    return SPEC.make_inputs(case, torch.float32, DEVICE)


def host_memory(rows: int, width: int) -> Tensor:
    return torch.full((rows, width), 7, dtype=torch.int64, pin_memory=DEVICE.type == "cuda")


def row_on_device(row: int) -> Tensor:
    return torch.tensor([row], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("row", [0, 2])
def test_tokens_are_written_to_their_row_of_the_hosts_memory(row: int) -> None:
    """Greedy and drawn ones, and -1 of a row that is not finite; other rows of the memory stay as they are."""
    inputs, host_KR = inputs_of(PLAIN, GREEDY, (1.0, 20, 0.9, 0.0, 1.0, 0.0, 0.0), PLAIN), host_memory(3, 6)
    inputs["logits_RV"][3, 9] = math.nan
    out = sample(**inputs, host_KR=host_KR, host_row_1=row_on_device(row))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert out.tolist() == sample_reference(**inputs).tolist()
    assert out.tolist()[3] == -1
    expected = torch.full((3, 6), 7)
    expected[row, :4] = out.cpu()
    assert torch.equal(host_KR, expected)


REFUSALS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("host_KR", lambda t: t[0], r"expected \[K, 3 or more\], got \(3,\)"),
    ("host_KR", lambda t: t[:, 1:], r"expected \[K, 3 or more\], got \(2, 2\)"),
    ("host_KR", torch.Tensor.int, "expected torch.int64, got torch.int32"),
    ("host_KR", lambda t: t.to("meta"), "expected memory on the host, got meta"),
    ("host_row_1", lambda t: None, "expected a tensor with host_KR, else None, got None"),
    ("host_row_1", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("host_row_1", lambda t: t.repeat(2), r"expected shape \(1,\), got \(2,\)"),
]


@pytest.mark.parametrize(("argument", "change", "message"), REFUSALS)
def test_memory_that_does_not_fit_is_refused(argument: str, change: Callable[[Any], Any], message: str) -> None:
    where: dict[str, Any] = {"host_KR": host_memory(2, 3), "host_row_1": row_on_device(0)}
    where[argument] = change(where[argument])
    with pytest.raises(ValueError, match=f"{argument}: {message}"):
        sample(**inputs_of(*[PLAIN] * 3), **where)


@pytest.mark.gpu
def test_a_graph_writes_to_another_row_at_every_replay() -> None:
    """A replay finds the row's number on the device; the host reads the tokens when an event has passed."""
    inputs, host_KR, row = inputs_of(*[GREEDY] * 5), host_memory(4, 5), row_on_device(0)
    out = torch.empty(5, dtype=torch.int64, device=DEVICE)
    sample(**inputs, out=out, host_KR=host_KR, host_row_1=row)  # builds the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(**inputs, out=out, host_KR=host_KR, host_row_1=row)
    for number in range(100):
        inputs["logits_RV"].normal_()
        row.fill_(number % 4)
        host_KR[number % 4] = 7
        graph.replay()
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        assert host_KR[number % 4].tolist() == inputs["logits_RV"].argmax(1).tolist()
