"""The bench of patch rows and class rows, small on a CPU, multiplies the right rows, and every way gives the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import rows  # noqa: E402

from internvl_rt.bench.document import parse_last_line  # noqa: E402
from internvl_rt.bench.timing import Timing  # noqa: E402
from support.result_schema import valid  # noqa: E402


def run(*options: str) -> subprocess.CompletedProcess[str]:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/rows.py", *options]
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)


def test_every_way_to_multiply_has_a_row() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    document = valid(parse_last_line(done.stdout.splitlines()))
    assert document["part"] == "kernels"
    assert [row["name"] for row in document["rows"]] == [
        f"product_rows/out_{way}/bfloat16" for way in ("65", "64", "64+1")
    ]
    for row in document["rows"]:
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_us"] / 1e6)


@pytest.mark.slow
def test_what_the_time_does_not_reach_is_named() -> None:
    document = json.loads(run("--budget-s=1e-9").stdout.splitlines()[-1])
    assert (document["rows"], document["left_out"]) == ([], ["out, 1 tiles"])
    assert run("--budget-s=0").returncode == 2


def test_the_rows_are_those_of_the_vision_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 1,025 rows a tile equals that of the patch rows alone, and that of patch and class rows apart."""
    written: dict[str, torch.Tensor] = {}

    def run_once(variants: Any, *_: Any, **__: Any) -> dict[str, Timing]:
        for way, calls in variants.items():
            out_RN = calls[0].args[2].fill_(torch.nan)
            calls[0]()
            written[way] = out_RN.clone()
        return dict.fromkeys(variants, Timing(1.0, 1.0, 1.0, 1))

    monkeypatch.setattr(rows, "time_variants", run_once)
    found = rows.measure("out", 16, 32, 13, 1024, torch.device("cpu"))
    assert [row["flops"] for row in found] == [2 * num_rows * 16 * 32 for num_rows in (13325, 13312, 13325)]
    assert list(written) == ["13325", "13312", "13312+13"]
    torch.testing.assert_close(written["13312+13"], written["13325"])
    torch.testing.assert_close(written["13312"][:13312], written["13325"][:13312])
    assert written["13312"][13312:].isnan().all()
    assert rows.LAYER == {"qkv": (3072, 1024), "out": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}
