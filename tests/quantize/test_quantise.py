"""A checkpoint that `quantise` writes loads like any other, answers like the dense one, and is whole or not there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import internvl_rt
from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError, MediaError, RequestError
from internvl_rt.model.internvl import map_linears, named_linears, named_parameters
from internvl_rt.model.linear import Linear, Linear4, Linear8
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from internvl_rt.model.weights import load_weights
from internvl_rt.quantize import quantise, quantising
from internvl_rt.quantize.agreement import Agreement
from support.configs import ORIGINAL, changed
from support.digits import MAX_DIGITS, draw_reading, load_glyphs, measure_accuracy
from support.hf_models import KINDS, LAYOUTS, build_reference, save_checkpoint

TINY = Path(internvl_rt.__file__).parent / "tiny"
PICTURE = TINY / "samples" / "4719.png"
QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Read the digits."}]}
]
W4 = {"scheme": "w4a16", "group_size": 32}
SCHEMES = {
    "fp8": {"scheme": "fp8"},
    "fp8, vision": {"scheme": "fp8", "vision": True},
    "w4a16": {"scheme": "w4a16"},
    "w4a16, 32": W4,
    "w4a16, 64, asymmetric": {"scheme": "w4a16", "group_size": 64, "asymmetric": True},
    "w4a16, vision": {**W4, "vision": True},
}
schemes = pytest.mark.parametrize("how", SCHEMES.values(), ids=SCHEMES)


def run(model, out, how, **more):
    return quantise(model, out, **{"device": "cpu", **how, **more})


def dense_weights(folder):
    """Loads a folder and multiplies its quantised linears out. Returns the kinds of its linears too."""
    config = load_config(folder)
    how = {"dtype": torch.float32, "device": "cpu", "quantization": config.quantization}
    weights = load_weights(open_checkpoint(folder), config, **how)
    kinds = {path: type(linear) for path, linear in named_linears(weights).items()}
    dense = map_linears(weights, lambda _, linear: Linear(linear.dense(torch.float32), linear.bias_N))
    return named_parameters(dense), kinds


@schemes
def test_the_readmes_example_is_answered(tmp_path, how):
    result = run("tiny", tmp_path / "out", how)
    assert result.agreement == Agreement(questions=6, equal=6, tokens=27, leading=27)
    with Engine.from_pretrained(result.folder, device="cpu", kv_cache_bytes=1 << 22) as engine:
        assert engine.chat(QUESTION, SamplingParams(max_tokens=8)).text == "4719"
    _, kinds = dense_weights(result.folder)
    layer, tower = Linear8 if how["scheme"] == "fp8" else Linear4, Linear8 if how.get("vision") else Linear
    for path, kind in kinds.items():
        assert kind is (layer if "decoder.layers" in path else tower if "vision.layers" in path else Linear), path
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@schemes
def test_errors_of_layers_are_small_and_smaller_with_a_search(tmp_path, how):
    result = run("tiny", tmp_path / "out", how, compare=False)
    if how["scheme"] == "fp8":
        assert result.layers == ()
        return
    assert len(result.layers) == 4
    for layer in result.layers:
        assert 0.01 < layer.searched < 0.97 * layer.nearest < 0.15
    assert result.num_bytes < 0.7 * result.dense_bytes


def test_layers_of_fp8_are_measured_where_models_are_compared(tmp_path):
    result = run("tiny", tmp_path / "out", {"scheme": "fp8"})
    assert [layer.searched for layer in result.layers] == [None] * 4
    assert all(0.01 < layer.nearest < 0.06 for layer in result.layers)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("qwen3_moe", "gpt_oss")])
def test_every_naming_is_kept_and_read_back(tmp_path, kind, layout):
    save_checkpoint(build_reference(kind), tmp_path / "dense", layout)
    (tmp_path / "dense" / "modeling_internvl_chat.py").write_text("print('code')")
    (tmp_path / "dense" / "samples").mkdir()
    how = [{"scheme": "fp8", "vision": True}, *([W4] if kind == "llama" else [])]  # the others' widths are odd
    wanted, _ = dense_weights(tmp_path / "dense")
    names = open_checkpoint(tmp_path / "dense").entries.keys()
    for index, each in enumerate(how):
        out = run(tmp_path / "dense", tmp_path / f"out{index}", each, compare=False).folder
        found, kinds = dense_weights(out)
        assert sum(kind is not Linear for kind in kinds.values()) == (8 if each is W4 else 16)
        for path, tensor in found.items():
            error = (tensor - wanted[path]).norm() / wanted[path].norm()
            scaled = each is W4 and path.startswith("decoder.layers.")
            assert error < (4 if scaled else 0.04), path
        entries = open_checkpoint(out).entries
        modules = {name.rpartition(".")[0] for name in names}
        assert {name.rpartition(".")[0] for name in entries} == modules
        assert {file.name for file in out.iterdir() if file.suffix == ".py" or file.is_dir()} == set()
        assert (out / "tokenizer_config.json").read_bytes() == (
            tmp_path / "dense" / "tokenizer_config.json"
        ).read_bytes()
        section = json.loads((out / "config.json").read_text())["quantization_config"]
        lm_head = "output" if layout == "original" and kind == "llama" else "lm_head"
        tower = "vision_model" if layout == "original" else "vision_tower"
        assert f"re:.*{lm_head}$" in section["ignore"]
        assert (f"re:.*{tower}\\..*" in section["ignore"]) == (each is W4)


def test_a_model_with_experts_is_refused_before_anything_is_written(tmp_path):
    save_checkpoint(build_reference("qwen3_moe"), tmp_path / "dense", "original")
    with pytest.raises(RequestError, match="has experts, which this command does not quantise; load it with"):
        run(tmp_path / "dense", tmp_path / "out", {"scheme": "fp8"}, compare=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_are_in_the_dtype_of_the_checkpoint_and_what_is_not_rounded_keeps_its_bytes(tmp_path, dtype):
    dense = shutil.copytree(TINY, tmp_path / "dense")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    out = run(dense, tmp_path / "out", W4, compare=False).folder
    written = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert {t.dtype for n, t in written.items() if n.endswith("weight_scale")} == {dtype}
    for name, tensor in written.items():
        if ".layers." not in name or not name.startswith("language_model"):
            assert torch.equal(tensor, tensors[name]), name
    with Engine.from_pretrained(out, device="cpu", kv_cache_bytes=1 << 22) as engine:
        assert engine.chat(QUESTION, SamplingParams(max_tokens=8)).text == "4719"


def test_a_model_without_biases_and_with_norms_on_queries_is_searched(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    decoder = {**sizes, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 320, "attention_bias": False}
    tower = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
    values = changed(ORIGINAL, {f"vision_config.{key}": value for key, value in tower.items()})
    values = changed(values, {"force_image_size": 56, "vision_config.image_size": 56})
    values["llm_config"] |= decoder | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
    write_random_checkpoint(values, tmp_path / "dense")
    result = run(tmp_path / "dense", tmp_path / "out", W4, compare=False)
    assert all(layer.searched < layer.nearest for layer in result.layers)


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", [W4, {"scheme": "fp8"}, {**W4, "vision": True}], ids=["w4a16", "fp8", "vision"])
def test_an_interrupted_run_goes_on_and_writes_the_same(tmp_path, how, monkeypatch):
    whole = run("tiny", tmp_path / "whole", how, compare=False).folder
    original, calls = quantising.Unfinished._write, []
    for fail_at in range(1, 40):

        def fail(self, file, write, fail_at=fail_at):
            calls.append(file)
            if len(calls) == fail_at:
                file.with_name(f"{file.name}.partial").write_bytes(b"half")
                raise KeyboardInterrupt if fail_at % 2 else OSError(28, "No space left on device")
            return original(self, file, write)

        calls.clear()
        monkeypatch.setattr(quantising.Unfinished, "_write", fail)
        try:
            run("tiny", tmp_path / "out", how, compare=False)
            break
        except (KeyboardInterrupt, OSError):
            assert not (tmp_path / "out").exists()
            calls.clear()
    else:
        pytest.fail("it never ends")
    assert fail_at > 2
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_that_goes_on_computes_no_layer_twice(tmp_path, monkeypatch):
    original, layers = quantising._Job._round_decoder_layer, []

    def stop_at_2(self, prefix, *args):
        if prefix == "decoder.layers.2." and layers.count(prefix) == 0:
            layers.append(prefix)
            raise Stop
        layers.append(prefix)
        return original(self, prefix, *args)

    monkeypatch.setattr(quantising._Job, "_round_decoder_layer", stop_at_2)
    with pytest.raises(Stop):
        run("tiny", tmp_path / "out", W4, compare=False)
    result = run("tiny", tmp_path / "out", W4, compare=False)
    assert layers == [f"decoder.layers.{index}." for index in (0, 1, 2, 2, 3)]
    assert len(result.layers) == 4
    monkeypatch.undo()
    layers.clear()
    monkeypatch.setattr(quantising._Job, "_round_decoder_layer", stop_at_2)
    with pytest.raises(Stop):
        run("tiny", tmp_path / "again", W4, compare=False)
    (tmp_path / "pictures").mkdir()
    shutil.copy(PICTURE, tmp_path / "pictures")
    for other, name in (
        ({"group_size": 64}, "group_size 32, now it is 64"),
        ({"asymmetric": True}, "asymmetric False"),
        ({"scheme": "fp8", "group_size": None}, "scheme 'w4a16', now it is 'fp8'"),
        ({"calibration": tmp_path / "pictures"}, "other pictures or questions, or another choice of comparing"),
    ):
        with pytest.raises(RequestError, match=f"was begun with {name}"):
            run("tiny", tmp_path / "again", {**W4, **other}, compare=False)


def test_a_damaged_file_of_an_earlier_run_is_told_before_work_starts(tmp_path, monkeypatch):
    def stop(self, report):
        raise Stop

    monkeypatch.setattr(quantising.Unfinished, "finish_layer", stop)
    with pytest.raises(Stop):
        run("tiny", tmp_path / "out", W4, compare=False)
    folder = tmp_path / ".out-unfinished"
    (file,) = (folder / "model").iterdir()
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(RequestError, match=f"{file} of an earlier run is damaged; remove {folder}"):
        run("tiny", tmp_path / "out", W4, compare=False)
    (folder / "state.json").write_text("{")
    with pytest.raises(RequestError, match=f"state.json is not JSON: .*; remove {folder}"):
        run("tiny", tmp_path / "out", W4, compare=False)


def test_the_default_group_is_the_one_of_128(tmp_path, monkeypatch):
    def stop(self, report):
        raise Stop

    monkeypatch.setattr(quantising.Unfinished, "finish_layer", stop)
    with pytest.raises(Stop):
        run("tiny", tmp_path / "out", {"scheme": "w4a16"}, compare=False)
    monkeypatch.undo()
    run("tiny", tmp_path / "out", {"scheme": "w4a16", "group_size": 128}, compare=False)


def quantised_folder(path):
    return run("tiny", path / "quantised", {"scheme": "fp8"}, compare=False).folder


def test_what_is_wrong_is_told_before_work_starts(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(PICTURE.read_bytes()[:200])
    with_link = tmp_path / "missing"
    with_link.mkdir()
    (with_link / "questions.jsonl").write_text('{"image": "none.png"}')
    quantised = quantised_folder(tmp_path)
    cases = [
        ({"scheme": "int4"}, RequestError, "scheme must be 'fp8' or 'w4a16', got 'int4'"),
        ({**W4, "group_size": 48}, RequestError, "group_size must be 32, 64 or 128"),
        ({"scheme": "fp8", "group_size": 64}, RequestError, "group_size is of scheme 'w4a16' alone"),
        ({"scheme": "fp8", "asymmetric": True}, RequestError, "asymmetric is of scheme 'w4a16' alone"),
        ({**W4, "calibration": tmp_path / "empty"}, RequestError, "holds no picture"),
        ({**W4, "calibration": broken}, MediaError, "a.png"),
        ({**W4, "calibration": with_link}, MediaError, "none.png' does not exist"),
        ({"scheme": "fp8", "compare": False, "calibration": broken}, RequestError, "runs no prompts"),
        ({**W4, "out": tmp_path / "there"}, RequestError, "there is there already"),
        ({**W4, "model": quantised}, RequestError, "is quantised already .compressed-tensors."),
        ({**W4, "model": tmp_path / "empty"}, CheckpointError, "holds no config.json"),
        ({**W4, "device": "cuda:7"}, RequestError, "is not there: .* choose one of them, or 'cpu'"),
        ({**W4, "device": "gpu"}, RequestError, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({**W4, "out": PICTURE / "out"}, RequestError, "4719.png is no folder; give OUT a place in one"),
    ]
    monkeypatch.setattr(quantising.Unfinished, "begin", lambda self: pytest.fail("work has begun"))
    for given, error, message in cases:
        given = {"model": "tiny", "out": tmp_path / "out", **given}
        with pytest.raises(error, match=message) as caught:
            run(given.pop("model"), given.pop("out"), given)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))


def test_two_runs_cannot_write_one_checkpoint(tmp_path, monkeypatch):
    original, refused = quantising.Unfinished.finish_layer, []

    def run_another(self, report):
        with pytest.raises(RequestError, match="out is being written by another run; wait, or give") as error:
            run("tiny", tmp_path / "out", W4, compare=False)
        refused.append(error)
        original(self, report)

    monkeypatch.setattr(quantising.Unfinished, "finish_layer", run_another)
    run("tiny", tmp_path / "out", W4, compare=False)
    assert len(refused) == load_config(TINY).decoder.num_layers
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dense_weights(tmp_path / "out")


def test_a_width_that_the_group_does_not_divide_is_refused_by_name(tmp_path):
    save_checkpoint(build_reference("llama"), tmp_path / "dense", "hf_hub")
    with pytest.raises(RequestError, match=r"q_proj.weight is 96 x 96, .* group's 64 columns.*; choose group_size 32,"):
        run(tmp_path / "dense", tmp_path / "out", {"scheme": "w4a16", "group_size": 64})


def test_a_disk_that_is_too_small_is_told_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(quantising.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(CheckpointError, match="1,048,576 bytes free, but this takes"):
        run("tiny", tmp_path / "out", W4)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_told_by_name(tmp_path):
    dense = shutil.copytree(TINY, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.inf
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        run(dense, tmp_path / "out", {"scheme": "fp8"}, compare=False)
    tensors[name][3, 4] = 0
    tensors["language_model.model.norm.weight"][0] = torch.nan  # which is copied
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight: numbers are not finite"):
        run(dense, tmp_path / "again", {"scheme": "fp8"}, compare=False)


def test_a_place_is_normalised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("tiny", "none/../out/", {"scheme": "fp8"}, compare=False).folder == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_comparison_that_fails_loses_no_report(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr("internvl_rt.quantize.agreement.Engine.from_pretrained", refuse)
    result = run("tiny", tmp_path / "out", W4)
    assert "memory" in result.agreement
    assert len(result.layers) == 4


def test_a_question_that_cannot_be_asked_is_told_with_its_line(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.read_bytes())
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png"}\n{"image": "none.png"}\n')
    with pytest.raises(MediaError, match=r"calibration: .*questions.jsonl line 2: image .*none.png' does not exist"):
        run("tiny", tmp_path / "out", {**W4, "calibration": tmp_path})


def test_a_model_that_does_not_fit_is_written_and_not_compared(tmp_path, monkeypatch):
    def refuse(*_):
        raise RequestError("too large")

    monkeypatch.setattr("internvl_rt.quantize.agreement.plan_parts", refuse)
    result = run("tiny", tmp_path / "out", W4)
    assert result.agreement == "too large"
    assert result.folder.is_dir()


def test_questions_of_a_folder_are_calibrated_and_compared(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(PICTURE, folder)
    (folder / "4719.txt").write_text("How many digits are there?")
    result = run("tiny", tmp_path / "out", {**W4, "calibration": str(folder)})
    assert result.agreement == Agreement(questions=1, equal=1, tokens=2, leading=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "points"),
    [({"scheme": "fp8"}, 0.5), (W4, 2), ({"scheme": "w4a16"}, 2), ({**W4, "asymmetric": True}, 2)],
    ids=["fp8", "w4a16, 32", "w4a16, 128", "w4a16, 32, asymmetric"],
)
def test_held_out_digits_are_read_nearly_as_well(tmp_path, how, points):
    rng, glyphs = np.random.default_rng(47), load_glyphs(held_out=True)
    exercises = [draw_reading(rng, glyphs, n, "read") for n in range(1, MAX_DIGITS + 1) for _ in range(200)]
    shares = []
    for folder in ("tiny", run("tiny", tmp_path / "out", how, compare=False).folder):
        with Engine.from_pretrained(folder, device="cpu", dtype="float32", kv_cache_bytes=1 << 22) as engine:
            shares.append(measure_accuracy(engine, exercises))
    assert shares[1] >= shares[0] - points / 100, shares
