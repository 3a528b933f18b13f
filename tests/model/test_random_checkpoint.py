"""Random checkpoints have the official format, are reproducible, and are written completely or not at all."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError, ConfigError
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.model.internvl import named_parameters
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from internvl_rt.model.weights import load_weights
from support import harmony
from support.configs import HF, ORIGINAL, changed

VISION = {
    "force_image_size": 28,
    "vision_config.image_size": 28,
    "vision_config.patch_size": 7,
    "vision_config.hidden_size": 16,
    "vision_config.num_attention_heads": 2,
    "vision_config.num_hidden_layers": 2,
    "vision_config.intermediate_size": 24,
}
DECODER = {
    "llm_config.hidden_size": 32,
    "llm_config.num_attention_heads": 4,
    "llm_config.num_key_value_heads": 2,
    "llm_config.num_hidden_layers": 2,
    "llm_config.intermediate_size": 48,
    "llm_config.vocab_size": 300,
}
QWEN2 = changed(ORIGINAL, {**VISION, **DECODER})
INTERNLM2 = changed(json.loads(KNOWN_MODELS["InternVL3-9B"].read_text()), {**VISION, **DECODER})


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("values", [QWEN2, INTERNLM2])
def test_the_engine_runs_it_as_any_other_checkpoint(tmp_path, values):
    write_random_checkpoint(values, tmp_path / "model")
    with Engine.from_pretrained(tmp_path / "model", device="cpu") as engine:
        reply = engine.chat([{"role": "user", "content": "Hello, 你好"}], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(reply.token_ids) == 4


@pytest.mark.parametrize("values", [QWEN2, INTERNLM2])
def test_its_config_is_the_one_that_was_given_but_for_the_dtype(tmp_path, values):
    write_random_checkpoint(values, tmp_path / "model", dtype=torch.float32)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written == {**values, "torch_dtype": "float32"}
    assert {tensor.dtype for tensor in tensors(tmp_path / "model").values()} == {torch.float32}


def test_an_internlm2_model_gets_the_merged_layout(tmp_path):
    write_random_checkpoint(INTERNLM2, tmp_path / "model")
    names = open_checkpoint(tmp_path / "model").entries.keys()
    assert "language_model.model.layers.1.attention.wqkv.weight" in names
    assert "language_model.output.weight" in names


def test_tensors_depend_on_seed_and_name_and_not_on_the_shards(tmp_path):
    for name, options in {"a": {}, "b": {"max_shard_bytes": 10_000}, "c": {"seed": 1}}.items():
        write_random_checkpoint(QWEN2, tmp_path / name, **options)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    random = [name for name in a if "norm" not in name and not name.startswith("mlp1.0.weight")]
    assert not [name for name in random if torch.equal(a[name], c[name])]
    q_projections = [a[f"language_model.model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 1)]
    assert not torch.equal(*q_projections)


def test_norms_are_one_and_the_rest_small(tmp_path):
    write_random_checkpoint(QWEN2, tmp_path / "model")
    config = load_config(tmp_path / "model")
    weights = load_weights(open_checkpoint(tmp_path / "model"), config, dtype=torch.float32, device="cpu")
    for name, tensor in named_parameters(weights).items():
        if name.endswith("weight_D"):
            assert (tensor == 1).all(), name
        elif "scale" in name:
            assert 0.1 <= tensor.min() < tensor.max() <= 1, name
        else:
            assert 0 < tensor.std() < 0.04, name


def test_added_tokens_are_at_their_official_ids_where_the_vocabulary_is_the_official_one(tmp_path):
    narrow = {"llm_config.hidden_size": 8, "llm_config.vocab_size": 151674}
    write_random_checkpoint(changed(QWEN2, narrow), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    official = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<tool_call>": 151657}
    official |= {"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667, "</box>": 151673, "!": 0, "+": 10, "-": 12}
    assert {token: tokenizer.token_id(token) for token in official} == official
    assert tokenizer.vocab_size == 151674
    text = "Any text: 你好, 🐼\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>", specials=True) == [151645]


def test_a_smaller_vocabulary_ends_with_the_added_tokens(tmp_path):
    write_random_checkpoint(QWEN2, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.vocab_size, tokenizer.token_id("</box>")) == (300, 299)


def test_a_config_file_and_a_folder_with_one_are_taken_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    write_random_checkpoint(tmp_path / "config.json", tmp_path / "a")
    write_random_checkpoint(str(tmp_path), tmp_path / "below" / "b")
    assert tensors(tmp_path / "a").keys() == tensors(tmp_path / "below" / "b").keys()


def test_an_empty_folder_is_filled_and_any_other_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    write_random_checkpoint(QWEN2, tmp_path / "empty")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").touch()
    for folder in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is there already and is not an empty folder"):
            write_random_checkpoint(QWEN2, folder)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "empty").iterdir()} == before


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 10**6, 5000))
    with pytest.raises(CheckpointError, match=r"has 5,000 bytes free, but the weights take [\d,]+; make room"):
        write_random_checkpoint(QWEN2, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_checkpoint_that_was_not_finished(tmp_path, monkeypatch, error):
    def write_half(folder, *_args, **_kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr("internvl_rt.model.random_checkpoint.write_tensors", write_half)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_random_checkpoint(QWEN2, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (HF, "is of the -hf format, expected the original one"),
        (changed(QWEN2, {"llm_config.vocab_size": 286}), "vocab_size is 286, expected at least 287"),
        (changed(QWEN2, {"template": "Hermes-2"}), "config.json: template is 'Hermes-2'"),
    ],
)
def test_a_model_that_cannot_be_written_is_refused(tmp_path, values, problem):
    with pytest.raises(ConfigError, match=problem):
        write_random_checkpoint(values, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="InternVL3-5B: no such file, and none of the known models InternVL3-1B, InternVL3-2B"
    ):
        write_random_checkpoint("InternVL3-5B", tmp_path / "model")


def test_a_gpt_oss_gets_its_own_tokens_at_their_official_ids(tmp_path):
    narrow = {"llm_config.hidden_size": 8, "llm_config.vocab_size": 200028}
    write_random_checkpoint(changed(harmony.SMALL, narrow), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    official = {"<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003}
    official |= {"<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008}
    official |= {"<|call|>": 200012, "<|endofprompt|>": 200018, "<img>": 200019, "</img>": 200020}
    official |= {"<IMG_CONTEXT>": 200021, "<quad>": 200022, "</quad>": 200023, "<ref>": 200024, "</ref>": 200025}
    official |= {"<box>": 200026, "</box>": 200027, "<|reserved_200017|>": 200017}
    assert {token: tokenizer.token_id(token) for token in official} == official
    assert (tokenizer.vocab_size, tokenizer.find_token_id("<|im_end|>")) == (200028, None)


def test_a_gpt_oss_is_written_and_read_in_its_own_layout(tmp_path):
    write_random_checkpoint(harmony.SMALL, tmp_path / "model")
    shapes = {name: entry.shape for name, entry in open_checkpoint(tmp_path / "model").entries.items()}
    layer = "language_model.model.layers.1."
    assert shapes[f"{layer}mlp.experts.gate_up_proj"] == (4, 32, 96)
    assert shapes[f"{layer}mlp.experts.down_proj_bias"] == (4, 32)
    assert shapes[f"{layer}self_attn.sinks"] == (4,)
    with Engine.from_pretrained(tmp_path / "model", device="cpu") as engine:
        assert engine.config.template == "internvl3_5_gpt_oss"
        reply = engine.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(reply.token_ids) == 4
