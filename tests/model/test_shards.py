"""Each rank's part of a model: which heads, columns and tokens it has, and that it reads these and nothing else."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_rt.checkpoint import tensor_file
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.checkpoint.quantization import cast
from internvl_rt.errors import CheckpointError, RequestError
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.placement import Placement, cut_placements
from internvl_rt.model.random_checkpoint import random_weights
from internvl_rt.model.shard import WHOLE, Shard, check_size, cut_of, shard_decoder, vocabulary_of
from internvl_rt.model.weights import find_schemes, load_weights, save_weights, shape_weights
from support.shards import assert_part, load_together
from support.small_models import QWEN2, VIT_6B, build_model

OFFICIAL = {name: load_config(file).decoder for name, file in KNOWN_MODELS.items()}
BASE = replace(QWEN2, num_layers=2, vocab_size=45)  # the last rows of the output layer are no multiple of anything
DECODERS = {
    "original": replace(BASE, num_heads=6),
    "internlm2": replace(BASE, qkv_bias=False, num_heads=12, num_kv_heads=3, head_dim=8),
    "hf": replace(BASE, qkv_bias=False, qk_norm=True, num_heads=7, num_kv_heads=1, tie_embeddings=True),
    "hf-nested": BASE,
}
dialects = pytest.mark.parametrize("dialect", DECODERS)
sizes = pytest.mark.parametrize("size", [2, 3, 4])


def ranks(size):
    return [Shard(rank, size) for rank in range(size)]


def config_of(dialect):
    config = build_model(decoder=DECODERS[dialect]).config
    return replace(config, format="original" if dialect in ("original", "internlm2") else "hf")


def save_random(folder, config, dialect="original", dtype=torch.bfloat16):
    weights = build_weights(config, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(3)
    for tensor in named_parameters(weights).values():
        tensor.normal_(generator=generator)
    save_weights(weights, config, folder, dialect=DIALECTS[dialect])
    return weights


def load(folder, config, shard=WHOLE, dtype=torch.bfloat16, **more):
    return load_weights(open_checkpoint(folder), config, dtype=dtype, device="cpu", shard=shard, **more)


@pytest.mark.parametrize("model", OFFICIAL)
@pytest.mark.parametrize("size", range(1, 9))
def test_the_ranks_have_every_row_and_column_once_but_may_share_a_key_head(model, size):
    c = OFFICIAL[model]
    group = c.num_heads // c.num_kv_heads
    count = {
        "qkv": torch.zeros(c.num_heads + 2 * c.num_kv_heads, c.head_dim, dtype=torch.int64),
        "o": torch.zeros(c.num_heads, c.head_dim, dtype=torch.int64),
        "gate_up": torch.zeros(2, c.intermediate_size, dtype=torch.int64),
        "down": torch.zeros(c.intermediate_size, dtype=torch.int64),
        "lm_head": torch.zeros(c.vocab_size, dtype=torch.int64),
    }
    for shard in ranks(size):
        local = shard_decoder(c, shard)
        taken = {name: torch.zeros_like(one).view(-1) for name, one in count.items()}
        for name, one in taken.items():
            path = "decoder.lm_head" if name == "lm_head" else f"decoder.layers.0.{name}"
            cut = cut_of(f"{path}.weight_NK", c, shard)
            if cut is None:
                assert size == 1
                one += 1
            elif name in ("o", "down"):
                assert cut.rows == (slice(0, c.hidden_size),)
                one[cut.columns] += 1
            else:
                assert cut.columns == slice(None)
                for rows in cut.rows:
                    one[rows] += 1
            count[name] += one.view_as(count[name])
        heads = taken["qkv"].view(-1, c.head_dim)
        assert (heads == heads[:, :1]).all()
        parts = heads[:, 0].split([c.num_heads, c.num_kv_heads, c.num_kv_heads])
        q, k, v = (part.nonzero().flatten().tolist() for part in parts)
        assert k == v
        assert (len(q), len(k)) == (local.num_heads, local.num_kv_heads)
        # As attention finds it: the key head of each query head, among those of the rank.
        assert [head // group for head in q] == [k[head // (len(q) // len(k))] for head in range(len(q))]
        assert torch.equal(taken["o"].view(-1, c.head_dim)[:, 0], heads[: c.num_heads, 0])
        assert taken["down"].sum() == local.intermediate_size
        assert all(torch.equal(part, taken["down"]) for part in taken["gate_up"].view(2, -1))
        assert taken["lm_head"].sum() == (part := vocabulary_of(c, shard)).stop - part.start > 0
    assert (count["qkv"][: c.num_heads] == 1).all()
    assert (count["qkv"][c.num_heads :] >= 1).all()
    if size <= c.num_kv_heads:
        assert (count["qkv"] == 1).all()
    assert all((count[name] == 1).all() for name in ("o", "gate_up", "down", "lm_head"))


def test_columns_of_the_mlp_are_split_between_groups_of_128_of_them():
    for c in OFFICIAL.values():
        for size in range(2, 9):
            columns = [shard_decoder(c, shard).intermediate_size for shard in ranks(size)]
            assert sum(columns) == c.intermediate_size
            # Experts of 768 among 7 ranks, or 8; those of GPT-OSS, of 2,880, at any number.
            unit = 128 if c.intermediate_size >= 128 * size and c.intermediate_size % 128 == 0 else 64
            assert all(number % unit == 0 for number in columns)
            assert max(columns) - min(columns) <= unit


def test_parameters_of_the_towers_and_norms_are_not_cut():
    paths = ("vision.layers.0.qkv.weight_NK", "projector.fc1.bias_N", "decoder.embedding_VD", "decoder.norm.weight_D")
    layer = [f"decoder.layers.0.{name}.weight_D" for name in ("norm1", "norm2", "q_norm", "k_norm")]
    assert [cut_of(path, BASE, Shard(1, 2)) for path in (*paths, *layer)] == [None] * 8


@pytest.mark.parametrize(("heads", "size", "most"), [(14, 15, 14), (64, 17, 16)])
def test_more_ranks_than_a_model_can_be_split_among_are_refused(heads, size, most):
    config = replace(BASE, num_heads=heads, vocab_size=1000, intermediate_size=512)
    check_size(config, most)
    with pytest.raises(RequestError) as caught:
        check_size(config, size)
    assert str(caught.value) == (
        f"tensor_parallel_size is {size}, but this model, with {heads} query heads, can be split among at most {most} "
        "ranks; lower it"
    )


@dialects
@sizes
def test_a_rank_loads_its_part_of_the_whole(tmp_path, dialect, size):
    config = config_of(dialect)
    save_random(tmp_path, config, dialect)
    for dtype in (torch.bfloat16, torch.float32):  # as it is stored, and through a buffer
        whole = load(tmp_path, config, dtype=dtype)
        for shard in ranks(size):
            part = load(tmp_path, config, shard, dtype)
            assert_part(part, whole, config, shard)
            tied = part.decoder.lm_head.weight_NK is part.decoder.embedding_VD
            assert tied == config.decoder.tie_embeddings
            planned = named_parameters(shape_weights(config, dtype, {}, shard))
            assert {path: one.shape for path, one in planned.items()} == {
                path: one.shape for path, one in named_parameters(part).items()
            }


def test_a_large_vision_tower_is_whole_on_every_rank(tmp_path):
    config = build_model(vision=VIT_6B, decoder=BASE).config
    saved = save_random(tmp_path, config)
    part = load(tmp_path, config, Shard(1, 2))
    assert_part(part, saved, config, Shard(1, 2))
    assert named_parameters(part)["vision.layers.2.qkv.weight_NK"].shape == (3 * 96, 96)


@pytest.mark.parametrize("how", ["dense", "fp8", "int8"])
@sizes
def test_random_weights_of_a_rank_are_its_part_of_the_whole(how, size):
    config = config_of("original")
    more = {"dtype": torch.bfloat16, "device": "cpu", "seed": 5}
    more["quantization"] = None if how == "dense" else cast(how, vision=True)
    whole = random_weights(config, **more)
    for shard, part in load_together(size, lambda shard: random_weights(config, shard=shard, **more)):
        assert_part(part, whole, config, shard)


@pytest.mark.parametrize("to", ["fp8", "int8"])
@dialects
@sizes
def test_dense_weights_are_quantised_by_the_largest_number_of_whole_rows(tmp_path, to, dialect, size):
    config, quantization = config_of(dialect), cast(to, vision=False)
    save_random(tmp_path, config, dialect)
    whole = load(tmp_path, config, quantization=quantization)
    schemes = find_schemes(config, quantization)
    for shard, part in load_together(size, lambda shard: load(tmp_path, config, shard, quantization=quantization)):
        assert_part(part, whole, config, shard)
        assert shard.group.num_calls == 2 * config.decoder.num_layers  # once for each o and down
        for ours, theirs in zip(part.decoder.layers, whole.decoder.layers, strict=True):
            assert torch.equal(ours.mlp.down.scale_NG, theirs.mlp.down.scale_NG)
        planned = named_parameters(shape_weights(config, torch.bfloat16, schemes, shard))
        assert {path: (one.shape, one.dtype) for path, one in planned.items()} == {
            path: (one.shape, one.dtype) for path, one in named_parameters(part).items()
        }


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts the bytes that are read of tensors: one number, in a list."""
    count, read_at = [0], tensor_file._read_at

    def read_and_count(entry, file, offset, memory):
        count[0] += len(memory)
        read_at(entry, file, offset, memory)

    monkeypatch.setattr(tensor_file, "_read_at", read_and_count)
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@sizes
def test_a_rank_reads_what_it_keeps_and_nothing_else(tmp_path, bytes_read, dtype, size):
    decoder = replace(BASE, num_heads=12, num_kv_heads=12, intermediate_size=1536, vocab_size=1200)
    config = build_model(decoder=decoder).config
    weights = named_parameters(save_random(tmp_path, config))
    cut_bytes = sum(one.nbytes for path, one in weights.items() if cut_of(path, decoder, Shard(0, 2)))
    replicated = sum(one.nbytes for one in weights.values()) - cut_bytes
    for shard in ranks(size):
        bytes_read[0] = 0
        part = load(tmp_path, config, shard, dtype)
        assert bytes_read[0] == sum(2 * one.numel() for one in named_parameters(part).values())
        assert bytes_read[0] <= cut_bytes / size * 1.005 + replicated


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_broken_checkpoint_is_refused_in_the_same_words_on_every_rank(tmp_path, fault):
    config = config_of("original")
    save_random(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    tensor = tensors.pop(name)
    if fault == "misshapen":
        tensors[name] = tensor[:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    words = set()
    for shard in (WHOLE, *ranks(3)):
        with pytest.raises(CheckpointError, match=name) as caught:
            load(tmp_path, config, shard)
        words.add(str(caught.value))
    assert len(words) == 1


def test_a_number_that_is_not_finite_is_told_by_the_rank_that_has_it(tmp_path):
    config = config_of("original")
    weights = save_random(tmp_path, config)
    weights.decoder.layers[1].mlp.down.weight_NK[5, -1] = torch.nan
    save_weights(weights, config, tmp_path, dialect=DIALECTS["original"])
    load(tmp_path, config, Shard(0, 2))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: numbers are not finite"):
        load(tmp_path, config, Shard(1, 2))


def test_a_part_of_a_stored_tensor_is_cut_where_it_lies():
    """A shard of experts, whose matrices are stored in one tensor, would need this."""
    down = Placement("decoder.layers.0.mlp.down.weight_NK", 0, 64, slice(64, 128), slice(96, 192))
    (place,) = cut_placements([down], BASE, Shard(1, 2))
    assert place == down._replace(columns=slice(96 + 64, 192))  # of 96 columns the second rank has the last 32
    gate = Placement("decoder.layers.0.mlp.gate_up.weight_NK", 0, 96, slice(192, 288))
    (place,) = cut_placements([gate], BASE, Shard(1, 2))
    assert place == gate._replace(stop=32, rows=slice(192 + 64, 288))
