"""The loading code of the model cards runs, with the devices that it names."""

import math

import pytest
import torch

from internvl_rt import ConfigError, Engine, RequestError
from internvl_rt.compat import AutoConfig, AutoModel, AutoTokenizer


def split_model(path, world_size):
    """From the card of InternVL3; `world_size` is the number of GPUs."""
    device_map = {}
    num_layers = AutoConfig.from_pretrained(path, trust_remote_code=True).llm_config.num_hidden_layers
    per_gpu = [math.ceil(num_layers / (world_size - 0.5))] * world_size
    per_gpu[0] = math.ceil(per_gpu[0] * 0.5)
    layer_cnt = 0
    for i, num_layer in enumerate(per_gpu):
        for _ in range(num_layer):
            device_map[f"language_model.model.layers.{layer_cnt}"] = i
            layer_cnt += 1
    device_map["vision_model"] = 0
    device_map["language_model.lm_head"] = 0
    return device_map


def test_the_cards_loading_code_is_understood(monkeypatch):
    seen = []
    monkeypatch.setattr(Engine, "from_pretrained", lambda model, **given: seen.append(given) or _Loaded)

    def load(**given):
        official = {"load_in_8bit": False, "low_cpu_mem_usage": True, "use_flash_attn": True, "trust_remote_code": True}
        AutoModel.from_pretrained("tiny", **official | given)
        return seen[-1]["device"], seen[-1]["dtype"]

    load(device_map=split_model("tiny", 2))
    assert (seen[-1]["device"], seen[-1]["tensor_parallel_size"]) == ("cuda:0", 2)
    load(device_map={"vision_model": "cuda:3", "mlp1": 2, "language_model": 1})
    assert (seen[-1]["device"], seen[-1]["tensor_parallel_size"]) == ("cuda:1", 3)
    assert load(torch_dtype=torch.bfloat16, device_map=split_model("tiny", 1)) == ("cuda:0", torch.bfloat16)
    assert load(dtype="float16", device_map="auto", load_in_4bit=False) == ("auto", "float16")
    assert load(attn_implementation="flash_attention_2", device_map={"": 0}) == ("cuda:0", "auto")
    assert load(torch_dtype="auto", device_map={"": torch.device("cpu")}) == ("cpu", "auto")
    assert load(device_map={"vision_model": "cuda", "mlp1": 0}, torch_dtype=None)[0] == "cuda:0"
    assert load(device_map=1)[0] == "cuda:1"
    assert load(device_map="cpu", dtype="bfloat16", torch_dtype="bfloat16") == ("cpu", "bfloat16")
    for given, message in (
        ({"device_map": {"a": 0, "b": 2}}, r"device_map: expected one device, or GPUs in a row, .*'cuda:2'\]; leave"),
        (
            {"device_map": {"a": 0, "b": "cpu"}},
            r"device_map: expected one device, or GPUs in a row, .*'cuda:0'\]; leave",
        ),
        ({"device_map": {"a": 0, "b": "auto"}}, "device_map: expected one device, or GPUs in a row"),
        ({"device_map": {}}, "device_map: expected one device"),
        ({"device_map": {"": None}}, "device_map: expected a device or a map to devices, got None"),
        ({"device_map": True}, "device_map: expected a device"),
        ({"device_map": "auto", "device": "cpu"}, "device is 'cpu' but device_map was given too"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16' but dtype is 'float16'"),
        ({"load_in_8bit": True}, "load_in_8bit is not supported"),
        ({"load_in_4bit": True}, "load_in_4bit is not supported"),
        ({"quantization_config": object()}, "does not take quantization_config"),
    ):
        with pytest.raises(RequestError, match=message):
            load(**given)


class _Loaded:
    class config:
        system_message = None
        template = "internvl2_5"


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(RequestError, match="device must be auto, cpu, cuda or cuda:N, got 'disk'"):
        AutoModel.from_pretrained("tiny", device_map="disk")


@pytest.mark.parametrize("kind", [AutoConfig, AutoModel, AutoTokenizer])
def test_a_model_is_a_name_or_a_folder(kind):
    with pytest.raises(RequestError, match="expected a folder or a hub id, got None"):
        kind.from_pretrained(None)
    with pytest.raises(RequestError, match="revision must be a text or None, got 7"):
        kind.from_pretrained("tiny", revision=7)


def test_a_configuration_has_the_keys_of_its_file_as_attributes(tmp_path):
    config = AutoConfig.from_pretrained("InternVL3-8B", trust_remote_code=True)
    assert config.llm_config.num_hidden_layers == 28
    assert config.vision_config.hidden_size == 1024
    with pytest.raises(AttributeError):
        config.no_such_key  # noqa: B018
    with pytest.raises(RequestError, match="does not take cache_dir"):
        AutoConfig.from_pretrained("tiny", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        AutoConfig.from_pretrained(tmp_path)
