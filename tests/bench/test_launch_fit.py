"""A fit finds the constants that rows were made with, and says which ones the rows do not determine."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launch_plans
from launch_fit import FITTED, READ, Observation, fit, observations, observations_of, read_roofline
from launch_model import Device, Work, load_devices, predict, save_devices

from internvl_rt.bench.document import DocumentError, save

NAME = "NVIDIA H200"
PRODUCTS = [f"{model}_{product}_{rows}" for model in ("1b", "8b") for product in ("o", "lm_head") for rows in (1, 8)]
KERNELS = (  # cases that together depend on every constant of kernels
    *(f"gemv/{product}" for product in PRODUCTS),
    *("gemv/1b_gate_up_1", "gemv/8b_gate_up_2", "gemv/8b_lm_head_2", "gemv/1b_down_8"),
    *(f"gemv/{model}_lm_head_{rows}" for model in ("2b", "9b") for rows in (8, 16)),
    *(f"gemv/{model}_gate_up_{rows}" for model in ("1b", "2b") for rows in (8, 16)),
    *("gemv_qkv/1b_1", "gemv_qkv/1b_8", "gemv_qkv/8b_8"),
    *(f"decode_attention/{model}_{shape}" for model in ("1b", "8b") for shape in ("1_x_2048", "1_x_32768", "8_x_2048")),
    *("rms_norm/decoder_896_1_rows", "embed_tokens/width_896_1_tokens", "qkv_rope_kv/1b_64_tokens"),
    *(f"prefill_attention/{shape}" for shape in ("1b_3392_behind_0", "1b_512_behind_8192", "8b_3392_behind_0")),
    *(f"gemm_epilogue/{shape}" for shape in ("1b_qkv_64_rows", "8b_gate_up_64_rows", "8b_gate_up_3392_rows")),
)


def document(rows: dict[str, list[dict[str, Any]]], device: str = NAME) -> dict[str, Any]:
    """A file of results with rows by the name of their part."""
    parts = {}
    for name, found in rows.items():
        kind = "step_kernels" if name.startswith("step_1b") else name
        held = {"part": kind, "schema": 1, "rows": found, "environment": {"device": device}, "command": "made up"}
        parts[name] = {"status": "done", "document": held}
    return {"schema": 1, "environment": {"device": device}, "budget_s": 1.0, "parts": parts}


def unmeasured() -> dict[str, list[dict[str, Any]]]:
    kernels = []
    for name in KERNELS:
        row = {"name": f"{name}/bfloat16", "median_us": 1.0}
        kernels.append(row | ({"baseline": "cublas alone"} if name.startswith("gemm_epilogue") else {}))
    decode = [{"name": f"decode/InternVL3-1B/1x{context}/bfloat16", "median_us": 1.0} for context in (2048, 32000)]
    profiled = [{"name": name, "median_us": 1.0, "step_us": 1.0} for name in ("gemv_kernel", "gemv_qkv_kernel")]
    prefill = [{"name": "prefill/InternVL3-1B/128_tokens/bfloat16", "median_us": 1.0, "prefill_median_us": 1.0}]
    return {
        "kernels": kernels,
        "decode": decode,
        "prefill": prefill,
        "step_1b": profiled,
        "step_1b_without_pdl": profiled,
    }


def serial_us(device: Device) -> float:
    """A prompt's attention by few programs, whatever the kernel's plan makes of real cases."""
    return sum(predict(Work(kernel="serial", bytes=1e6, programs=16, key_blocks=128), device).values())


@pytest.fixture(scope="module")
def templates() -> list[Observation]:
    return [*observations(document(unmeasured())), Observation("serial", "kernel", 1.0, serial_us)]


@pytest.fixture
def truth() -> Device:
    """A device whose host takes longer than one of the steps, so that rows tell how long."""
    return replace(load_devices()[NAME], host_step_us=700.0, sm_gb_s=100.0)


def measured(templates: list[Observation], truth: Device) -> list[Observation]:
    return [replace(each, measured_us=each.predict_us(truth)) for each in templates]


def guessing(truth: Device) -> Device:
    """The same device with constants that are up to a quarter off."""
    wrong = {name: getattr(truth, name) * (1.25 if index % 2 else 0.85) for index, name in enumerate(FITTED)}
    wrong["host_step_us"] = 690.0
    return replace(truth, **wrong, guesses=wrong)


def test_every_row_is_an_observation(templates: list[Observation]) -> None:
    names = [each.name for each in templates]
    assert len(names) == len(set(names)) == len(KERNELS) + 2 + 1 + 4 + 1
    assert {each.kind for each in templates} == {"kernel", "step", "prompt"}


def test_a_fit_recovers_the_constants(templates: list[Observation], truth: Device) -> None:
    found, undetermined = fit(guessing(truth), measured(templates, truth), hold=1e-9)
    assert not undetermined
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.01), name
        assert found.sources[name] == "fitted"


def test_one_wrong_row_changes_little(templates: list[Observation], truth: Device) -> None:
    rows = measured(templates, truth)
    rows[2] = replace(rows[2], measured_us=3 * rows[2].measured_us)
    found, _ = fit(guessing(truth), rows)
    errors = sorted(abs(each.log_error(found)) for each in measured(templates, truth))
    assert errors[len(errors) // 2] < 0.02
    assert errors[-1] < 0.2


def test_constants_without_rows_keep_their_value(templates: list[Observation], truth: Device) -> None:
    guess = replace(guessing(truth), guesses=guessing(truth).guesses | {"softmax_g_s": 1.0})
    only = [each for each in measured(templates, truth) if each.name.startswith(("gemv/1b", "rms_norm"))]
    found, undetermined = fit(guess, only)
    assert {"softmax_g_s", "key_block_us", "attention_us", "part_us", "cublas_us", "host_step_us"} <= set(undetermined)
    assert "cores_program_us" not in undetermined
    for name in undetermined:
        assert getattr(found, name) == getattr(guess, name)
        assert found.sources[name] == guess.sources[name]


def test_without_rows_a_fit_is_refused(truth: Device) -> None:
    with pytest.raises(DocumentError, match="expected rows of kernels, decode steps or prompts, got none"):
        fit(truth, observations(document({"kernels": [{"name": "unheard_of/1b_1/bfloat16", "median_us": 1.0}]})))


def test_patterns_leave_rows_out_and_later_files_win() -> None:
    rows = unmeasured()
    kept = observations(document(rows), ["gemv/*", "prefill/*"])
    assert {each.name.split("/")[0] for each in kept}.isdisjoint({"gemv", "prefill"})
    later = document({"decode": [{**rows["decode"][0], "median_us": 5.0}]})
    found = {each.name: each.measured_us for each in observations_of({"a": document(rows), "b": later}, ["gemv*"])}
    assert found["decode/InternVL3-1B/1x2048/bfloat16"] == 5.0
    assert found["decode/InternVL3-1B/1x32000/bfloat16"] == 1.0


def test_the_roofline_is_read(truth: Device) -> None:
    rows = [{"name": name, unit: 10.0 + index} for index, (name, unit) in enumerate(READ.values())]
    found = read_roofline(truth, {"a": document({"roofline": rows})})
    assert [getattr(found, name) for name in READ] == [10.0 + index for index in range(len(READ))]
    assert read_roofline(truth, {"a": document({})}) == truth


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["launch_plans.py", *map(str, arguments)])
    return launch_plans.main()


def test_the_command_fits_stores_and_tells(
    templates: list[Observation], truth: Device, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    costs, results = tmp_path / "costs.json", tmp_path / "results.json"
    save_devices({NAME: guessing(truth)}, costs)
    times = {each.name: each.predict_us(truth) for each in templates}
    rows = {"kernels": [{**row, "median_us": times[row["name"]]} for row in unmeasured()["kernels"]]}
    save(document(rows), results)
    assert run(monkeypatch, "--fit", results, "--without", "gemv/8b*", "--costs", costs) == 0
    out = capsys.readouterr().out
    assert "host_step_us" in out
    assert "these rows do not determine it" in out
    assert "before kernel" in out
    stored = load_devices(costs)[NAME]
    assert stored.fitted_to == {"files": [str(results)], "without": ["gemv/8b*"]}
    assert abs(stored.attention_us / truth.attention_us - 1) < abs(
        guessing(truth).attention_us / truth.attention_us - 1
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{}", "expected schema"),
        (json.dumps(document({}, "NVIDIA GeForce")), "got files of NVIDIA GeForce"),
        (json.dumps(document({})), "got none that the model describes"),
    ],
)
def test_a_file_that_cannot_be_fitted_is_named(
    content: str | None, expected: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--fit", path)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
