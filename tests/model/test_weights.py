"""All checkpoint tensors become parameters, and tensors again, in every dialect and with every kind of tower."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_rt.checkpoint.config import ExpertsConfig, ModelConfig, VisionConfig
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError
from internvl_rt.model.dialects import DIALECTS, find_names
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.placement import PlannedTensor, plan_tensors
from internvl_rt.model.weights import load_weights, save_weights
from support import small_models

SMALL_VIT = VisionConfig(12, 2, 3, 20, 28, 7, "layer_norm", 1e-6, qkv_bias=True, qk_norm=False)
LARGE_VIT = VisionConfig(12, 2, 3, 20, 28, 7, "rms_norm", 1e-6, qkv_bias=False, qk_norm=True)
SIZES = {"hidden_size": 16, "num_heads": 6, "head_dim": 4, "intermediate_size": 14, "vocab_size": 30}
QWEN2 = replace(small_models.QWEN2, **SIZES, num_layers=11)  # layer numbers have one digit or two
QWEN3 = replace(QWEN2, qkv_bias=False, qk_norm=True)
INTERNLM = replace(QWEN2, qkv_bias=False)
THREE = ExpertsConfig(num_experts=3, num_chosen=3, renormalises=False)
EXPERTS = replace(QWEN3, experts=ExpertsConfig(num_experts=12, num_chosen=2, renormalises=True))


def model_config(vision, decoder, checkpoint_format="original"):
    return ModelConfig(
        vision=vision,
        decoder=decoder,
        format=checkpoint_format,
        downsample=2,
        unshuffle="v2",
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        system_message=None,
        dtype="bfloat16",
    )


CASES = {
    "original, qwen2": ("original", model_config(SMALL_VIT, QWEN2)),
    "original, qwen2, large vit": ("original", model_config(LARGE_VIT, QWEN2)),
    "original, qwen3, tied": ("original", model_config(SMALL_VIT, replace(QWEN3, tie_embeddings=True))),
    "internlm2": ("internlm2", model_config(SMALL_VIT, INTERNLM)),
    "internlm2, large vit": ("internlm2", model_config(LARGE_VIT, INTERNLM)),
    "hf, qwen2": ("hf", model_config(SMALL_VIT, QWEN2, "hf")),
    "hf, qwen3, tied": ("hf", model_config(SMALL_VIT, replace(QWEN3, tie_embeddings=True), "hf")),
    "hf nested, qwen3": ("hf-nested", model_config(LARGE_VIT, QWEN3, "hf")),
    "original, experts": ("original", model_config(SMALL_VIT, EXPERTS)),
    "hf nested, experts": ("hf-nested", model_config(SMALL_VIT, EXPERTS, "hf")),
    "hf nested, three experts": ("hf-nested", model_config(SMALL_VIT, replace(EXPERTS, experts=THREE), "hf")),
    "hf nested, llama": ("hf-nested", model_config(SMALL_VIT, INTERNLM, "hf")),
}
case = pytest.mark.parametrize(("dialect", "config"), CASES.values(), ids=CASES.keys())


def random_weights(config, dtype=torch.bfloat16):
    weights = build_weights(config, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(3)
    for tensor in named_parameters(weights).values():
        tensor.normal_(generator=generator)
    return weights


def load(folder, config, dtype=torch.bfloat16):
    return load_weights(open_checkpoint(folder), config, dtype=dtype, device="cpu")


def assert_equal(ours, theirs):
    ours, theirs = named_parameters(ours), named_parameters(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@case
def test_the_plan_fills_every_row_of_every_parameter_exactly_once(dialect, config):
    rows = {
        path: torch.zeros(len(tensor), dtype=torch.int64)
        for path, tensor in named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta")).items()
    }
    for planned in plan_tensors(config, DIALECTS[dialect]).values():
        taken = torch.zeros(planned.shape, dtype=torch.int64).view(-1, planned.shape[-1])
        for place in planned.placements:
            rows[place.parameter][place.start : place.stop] += 1
            taken[place.rows, place.columns] += 1
        assert (taken == 1).all()
    assert all((count == 1).all() for count in rows.values())


def test_each_index_on_a_parameters_path_has_its_place_in_the_names():
    table = {"layers.#.experts.#.gate_up": "model.layers.#.mlp.experts.#.{gate,up}_proj", "norm": "model.norm"}
    path = "layers.3.experts.17.gate_up.weight_NK"
    names = [f"model.layers.3.mlp.experts.17.{part}_proj.weight" for part in ("gate", "up")]
    assert find_names(table, path) == (table["layers.#.experts.#.gate_up"], names)
    assert find_names(table, "norm.bias_D") == ("model.norm", ["model.norm.bias"])


def test_a_placement_takes_a_part_of_a_stored_tensor(tmp_path, monkeypatch):
    """A shard of experts, whose matrices are stored in one tensor, would need this."""
    saved, config = random_weights(PLAIN), PLAIN
    save_weights(saved, config, tmp_path, dialect=DIALECTS["original"])
    stacked = torch.randn(3, 16, 28).to(torch.bfloat16)  # three experts; layer 0 gets columns of the second
    name, tensors = "layers.0.down.stacked", load_file(tmp_path / "model.safetensors")
    down = "language_model.model.layers.0.mlp.down_proj.weight"
    del tensors[down]
    save_file(tensors | {name: stacked}, tmp_path / "model.safetensors")

    def plan(config, dialect):
        planned = plan_tensors(config, dialect)
        (place,) = planned.pop(down).placements
        place = place._replace(rows=slice(16, 32), columns=slice(14, 28))
        return planned | {name: PlannedTensor((3, 16, 28), (place,))}

    monkeypatch.setattr("internvl_rt.model.weights.plan_tensors", plan)
    loaded = load(tmp_path, config)
    assert torch.equal(loaded.decoder.layers[0].mlp.down.weight_NK, stacked[1, :, 14:])
    assert torch.equal(loaded.decoder.layers[1].mlp.down.weight_NK, saved.decoder.layers[1].mlp.down.weight_NK)
    save_weights(loaded, config, tmp_path, dialect=DIALECTS["original"])
    written = load_file(tmp_path / "model.safetensors")[name]
    assert torch.equal(written[1, :, 14:], stacked[1, :, 14:])


@case
@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 5000])
def test_saved_weights_load_bit_for_bit(tmp_path, dialect, config, max_shard_bytes):
    weights = random_weights(config)
    save_weights(weights, config, tmp_path, dialect=DIALECTS[dialect], max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes > 5000)
    loaded = load(tmp_path, config)
    assert_equal(loaded, weights)
    assert (loaded.decoder.lm_head.weight_NK is loaded.decoder.embedding_VD) == config.decoder.tie_embeddings


@case
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_values_are_converted_to_the_dtype_that_is_asked_for(tmp_path, dialect, config, stored):
    weights = random_weights(config, stored)
    save_weights(weights, config, tmp_path, dialect=DIALECTS[dialect])
    converted = named_parameters(load(tmp_path, config, torch.bfloat16))
    for name, tensor in named_parameters(weights).items():
        assert torch.equal(converted[name], tensor.to(torch.bfloat16)), name


def test_the_original_format_is_read_as_published():
    vision, decoder = replace(SMALL_VIT, num_layers=1), replace(QWEN2, num_layers=1)
    layer, block = "vision_model.encoder.layers.0", "language_model.model.layers.0"
    plan = plan_tensors(model_config(vision, decoder), DIALECTS["original"])
    places = {name: (*planned.placements, planned.shape) for name, planned in plan.items()}
    assert {name: (place.parameter, place.start, shape) for name, (place, shape) in places.items()} == {
        "vision_model.embeddings.class_embedding": ("vision.class_E", 0, (1, 1, 12)),
        "vision_model.embeddings.position_embedding": ("vision.position_UE", 0, (1, 17, 12)),
        "vision_model.embeddings.patch_embedding.weight": ("vision.patch.weight_NK", 0, (12, 3, 7, 7)),
        "vision_model.embeddings.patch_embedding.bias": ("vision.patch.bias_N", 0, (12,)),
        f"{layer}.norm1.weight": ("vision.layers.0.norm1.weight_D", 0, (12,)),
        f"{layer}.norm1.bias": ("vision.layers.0.norm1.bias_D", 0, (12,)),
        f"{layer}.attn.qkv.weight": ("vision.layers.0.qkv.weight_NK", 0, (36, 12)),
        f"{layer}.attn.qkv.bias": ("vision.layers.0.qkv.bias_N", 0, (36,)),
        f"{layer}.attn.proj.weight": ("vision.layers.0.proj.weight_NK", 0, (12, 12)),
        f"{layer}.attn.proj.bias": ("vision.layers.0.proj.bias_N", 0, (12,)),
        f"{layer}.ls1": ("vision.layers.0.scale1_E", 0, (12,)),
        f"{layer}.norm2.weight": ("vision.layers.0.norm2.weight_D", 0, (12,)),
        f"{layer}.norm2.bias": ("vision.layers.0.norm2.bias_D", 0, (12,)),
        f"{layer}.mlp.fc1.weight": ("vision.layers.0.fc1.weight_NK", 0, (20, 12)),
        f"{layer}.mlp.fc1.bias": ("vision.layers.0.fc1.bias_N", 0, (20,)),
        f"{layer}.mlp.fc2.weight": ("vision.layers.0.fc2.weight_NK", 0, (12, 20)),
        f"{layer}.mlp.fc2.bias": ("vision.layers.0.fc2.bias_N", 0, (12,)),
        f"{layer}.ls2": ("vision.layers.0.scale2_E", 0, (12,)),
        "mlp1.0.weight": ("projector.norm.weight_D", 0, (48,)),
        "mlp1.0.bias": ("projector.norm.bias_D", 0, (48,)),
        "mlp1.1.weight": ("projector.fc1.weight_NK", 0, (16, 48)),
        "mlp1.1.bias": ("projector.fc1.bias_N", 0, (16,)),
        "mlp1.3.weight": ("projector.fc2.weight_NK", 0, (16, 16)),
        "mlp1.3.bias": ("projector.fc2.bias_N", 0, (16,)),
        "language_model.model.embed_tokens.weight": ("decoder.embedding_VD", 0, (30, 16)),
        f"{block}.input_layernorm.weight": ("decoder.layers.0.norm1.weight_D", 0, (16,)),
        f"{block}.self_attn.q_proj.weight": ("decoder.layers.0.qkv.weight_NK", 0, (24, 16)),
        f"{block}.self_attn.q_proj.bias": ("decoder.layers.0.qkv.bias_N", 0, (24,)),
        f"{block}.self_attn.k_proj.weight": ("decoder.layers.0.qkv.weight_NK", 24, (8, 16)),
        f"{block}.self_attn.k_proj.bias": ("decoder.layers.0.qkv.bias_N", 24, (8,)),
        f"{block}.self_attn.v_proj.weight": ("decoder.layers.0.qkv.weight_NK", 32, (8, 16)),
        f"{block}.self_attn.v_proj.bias": ("decoder.layers.0.qkv.bias_N", 32, (8,)),
        f"{block}.self_attn.o_proj.weight": ("decoder.layers.0.o.weight_NK", 0, (16, 24)),
        f"{block}.post_attention_layernorm.weight": ("decoder.layers.0.norm2.weight_D", 0, (16,)),
        f"{block}.mlp.gate_proj.weight": ("decoder.layers.0.mlp.gate_up.weight_NK", 0, (14, 16)),
        f"{block}.mlp.up_proj.weight": ("decoder.layers.0.mlp.gate_up.weight_NK", 14, (14, 16)),
        f"{block}.mlp.down_proj.weight": ("decoder.layers.0.mlp.down.weight_NK", 0, (16, 14)),
        "language_model.model.norm.weight": ("decoder.norm.weight_D", 0, (16,)),
        "language_model.lm_head.weight": ("decoder.lm_head.weight_NK", 0, (30, 16)),
    }


def test_a_merged_wqkv_holds_the_query_heads_of_a_key_head_then_its_key_then_its_value(tmp_path):
    config = model_config(SMALL_VIT, INTERNLM)
    save_weights(random_weights(config), config, tmp_path, dialect=DIALECTS["internlm2"])
    wqkv = load_file(tmp_path / "model.safetensors")["language_model.model.layers.10.attention.wqkv.weight"]
    heads = wqkv.view(2, 3 + 2, 4, 16)  # [key heads, query heads of each + key + value, channels, width]
    qkv = load(tmp_path, config).decoder.layers[10].qkv.weight_NK.view(6 + 2 + 2, 4, 16)
    for query_head in range(6):
        assert torch.equal(qkv[query_head], heads[query_head // 3, query_head % 3])
    for key_head in range(2):
        assert torch.equal(qkv[6 + key_head], heads[key_head, 3])
        assert torch.equal(qkv[8 + key_head], heads[key_head, 4])


@pytest.fixture
def saved(tmp_path):
    """A function that saves random weights with changed tensors, and returns the unchanged weights."""

    def save(config, dialect="original", **changes):
        weights = random_weights(config)
        save_weights(weights, config, tmp_path, dialect=DIALECTS[dialect])
        tensors = load_file(tmp_path / "model.safetensors") | changes
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        return weights

    return save


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
TIED = model_config(SMALL_VIT, replace(QWEN3, tie_embeddings=True))


@pytest.mark.parametrize("config", [TIED, replace(TIED, format="hf")])
def test_an_lm_head_equal_to_the_tied_embedding_is_not_kept_twice(tmp_path, saved, config):
    dialect = "original" if config.format == "original" else "hf"
    embedding = random_weights(config).decoder.embedding_VD
    weights = saved(config, dialect, **{HEAD: embedding.clone()})
    assert_equal(load(tmp_path, config), weights)


def test_an_lm_head_that_differs_from_the_tied_embedding_is_refused_in_the_original_format(tmp_path, saved):
    saved(TIED, **{HEAD: torch.ones(30, 16, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .*embed_tokens\.weight, but tie_word_emb"):
        load(tmp_path, TIED)


def test_an_lm_head_that_differs_from_the_tied_embedding_is_used_in_the_hf_format(tmp_path, saved):
    config = replace(TIED, format="hf")
    head = torch.randn(30, 16).to(torch.bfloat16)
    weights = saved(config, "hf", **{HEAD: head})
    loaded = load(tmp_path, config)
    assert torch.equal(loaded.decoder.lm_head.weight_NK, head)
    assert torch.equal(loaded.decoder.embedding_VD, weights.decoder.embedding_VD)


PLAIN = model_config(SMALL_VIT, QWEN2)


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (PLAIN, r'class of this model overrules "tie_word_embeddings": true, so save the model again with'),
        (model_config(SMALL_VIT, QWEN3), r'write "tie_word_embeddings": true into llm_config of config\.json'),
        (model_config(SMALL_VIT, QWEN2, "hf"), r'write "tie_word_embeddings": true into text_config of config\.json'),
    ],
    ids=["original, qwen2", "original, qwen3", "hf"],
)
def test_a_missing_lm_head_leads_to_what_helps_in_that_format(tmp_path, saved, config, remedy):
    saved(config, "hf" if config.format == "hf" else "original", **{HEAD: None})
    with pytest.raises(CheckpointError, match=rf"1 missing: language_model\.lm_head\.weight; .*{remedy}"):
        load(tmp_path, config)


@pytest.mark.parametrize("layer", ["", "language_model.base_model.model.model.layers.0.self_attn.q_proj."])
def test_a_lora_adapter_that_is_not_merged_says_how_to_merge_it(tmp_path, saved, layer):
    if layer:
        saved(PLAIN, **{f"{layer}{name}": torch.ones(2, 2) for name in ("base_layer.weight", "lora_A.default.weight")})
    else:  # the adapter alone
        save_file({"base_model.model.q_proj.lora_B.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"; a LoRA adapter is not merged; merge it .*merge_and_unload .*merge_lora"
    ):
        load(tmp_path, PLAIN)


def test_weights_of_another_kind_of_number_alone_do_not_lead_to_a_download(tmp_path, saved):
    saved(PLAIN, **{"mlp1.3.bias": torch.ones(16).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"; the quantization_config that goes with quantised"):
        load(tmp_path, PLAIN)


def test_tensors_of_hostile_names_give_one_short_line(tmp_path, saved):
    saved(PLAIN, **{"x" * 3_000_000: torch.ones(2), "y" * 3_000_000: torch.ones(2)})
    with pytest.raises(
        CheckpointError, match=r"2 left over: xxx.*\.\.\., yyy.*\.\.\.; download config\.json"
    ) as caught:
        load(tmp_path, PLAIN)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


def test_buffers_and_the_unused_mask_token_are_ignored(tmp_path, saved):
    weights = saved(PLAIN, **{"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_equal(load(tmp_path, PLAIN), weights)
    config = replace(PLAIN, format="hf")
    weights = saved(config, "hf", **{"vision_tower.embeddings.mask_token": torch.ones(1, 1, 12)})
    assert_equal(load(tmp_path, config), weights)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mlp1.3.bias": None, "mlp1.0.bias": None}, "2 missing: mlp1.0.bias, mlp1.3.bias"),
        (
            {"vision_model.encoder.layers.2.ls1": torch.ones(12), "x": torch.ones(1)},
            "2 left over: vision_model.encoder.layers.2.ls1, x",
        ),
        ({"mlp1.3.bias": torch.ones(17)}, "1 of the wrong shape: mlp1.3.bias is [17], expected [16]"),
        ({"mlp1.3.bias": torch.ones(4, 4)}, "1 of the wrong shape: mlp1.3.bias is [4, 4], expected [16]"),
        ({HEAD: torch.ones(16, 30)}, f"1 of the wrong shape: {HEAD} is [16, 30], expected [30, 16]"),
        (
            {"mlp1.3.bias": torch.ones(16).int()},
            "1 not stored as 16-bit or 32-bit floating point: mlp1.3.bias is torch",
        ),
        ({"mlp1.3.bias": None, "mlp1.4.bias": torch.ones(16)}, "1 missing: mlp1.3.bias; 1 left over: mlp1.4.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_before_memory_is_taken(
    tmp_path, saved, monkeypatch, changes, problem
):
    saved(PLAIN, **changes)

    def build_on_meta(config, *, dtype, device):
        assert device == "meta"
        return build_weights(config, dtype=dtype, device=device)

    monkeypatch.setattr("internvl_rt.model.weights.build_weights", build_on_meta)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, PLAIN)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} does not fit its config.json: {problem}")
    assert "\n" not in message


def test_long_lists_are_cut_to_five_names_and_a_count(tmp_path, saved):
    saved(PLAIN)
    with pytest.raises(CheckpointError, match=r"24 left over: (language_model\.\S+, ){5}\.\.\.; download"):
        load(tmp_path, model_config(SMALL_VIT, replace(QWEN2, num_layers=9)))


def test_weights_of_another_family_are_refused(tmp_path):
    save_file({"model.layers.0.mlp.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors is one of an InternVL model \(model\.layers"):
        load(tmp_path, PLAIN)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("number", "dtypes"), [(torch.nan, "all"), (-torch.inf, "all"), (7e4, "float16")])
def test_a_number_that_is_not_finite_is_named_with_its_tensor_and_dtype(tmp_path, stored, number, dtypes):
    dialect, config = CASES["internlm2"]
    weights = random_weights(config, stored)
    named_parameters(weights)["decoder.layers.10.qkv.weight_NK"][-1, 3] = number
    save_weights(weights, config, tmp_path, dialect=DIALECTS[dialect])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtypes == "float16" and dtype != torch.float16:
            load(tmp_path, config, dtype)
            continue
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, config, dtype)
        (name,) = [
            name for name in open_checkpoint(tmp_path).entries if name.endswith("layers.10.attention.wqkv.weight")
        ]
        assert f": {name}: numbers are not finite in {str(dtype)[6:]} (NaN or infinity); download" in str(caught.value)
        assert ("load the model with dtype='bfloat16' or 'float32'" in str(caught.value)) == (dtype == torch.float16)
