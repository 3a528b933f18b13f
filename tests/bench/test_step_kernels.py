"""The kernels of a profile become rows of a result document."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import step_kernels


def test_durations_and_gaps_add_up_to_the_step() -> None:
    """The profile has two steps of three kernels; the second kernel starts before the first has ended."""
    one = [("product", 0.0, 10.0), ("attention", 9.0, 14.0), ("product", 15.0, 25.0)]
    kernels = [*one, *((name, start + 30, end + 30) for name, start, end in one)]
    rows = {row["name"]: row for row in step_kernels.rows_of_kernels(kernels, 2)}
    assert (rows["attention"]["a_step"], rows["attention"]["median_us"], rows["attention"]["gap_us"]) == (1, 5, -1)
    assert rows["product"]["a_step"] == 1.5  # the first kernel of all has no gap before it, so it is not counted
    assert rows["step"]["median_us"] == 27.5
    kinds = sum(row["step_us"] for name, row in rows.items() if name != "step")
    assert kinds == pytest.approx((55 - 10) / 2), "from the end of the first kernel to that of the last"


def test_without_a_device_it_says_what_it_needs(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["step_kernels.py"])
    monkeypatch.setattr(step_kernels.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        step_kernels.main()
    assert caught.value.code == 2
    assert "expected a machine with a CUDA device" in capsys.readouterr().err
