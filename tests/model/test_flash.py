"""InternVL3.5-Flash computes what its official code does: odds, decisions, both kinds of visual tokens, answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, ModelConfig, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.engine.memory import vision_workspace_bytes
from internvl_rt.errors import CheckpointError
from internvl_rt.inputs.prompt import IMAGE, Turn
from internvl_rt.model.card import model_card, render_card
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.flash import compression_odds, rows_of_tiles
from internvl_rt.model.internvl import InternVL, build_weights, named_linears, named_parameters
from internvl_rt.model.ops import TORCH
from internvl_rt.model.ops_cpu import cpu_ops
from internvl_rt.model.ops_invariant import invariant_ops
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.random_checkpoint import random_weights, write_random_checkpoint
from internvl_rt.model.vision import encode_tiles
from internvl_rt.model.weights import load_weights, save_weights
from internvl_rt.model.work import vision_work
from support.configs import changed, parse
from support.official_flash import CONTEXT, OfficialFlash, decide, shorten, write_flash

CPU = torch.device("cpu")
TURNS = (Turn("user", (IMAGE, "\nRead the digits.")),)
FLASH = {"flash_mode": True, "flash_relative_threshold": 0.1, "flash_absolute_threshold": 0.5}
UNUSED = 2 * (4 * 1024**2 + 6 * 1024)  # attn3, norm3, attn4 and norm4 of 1,024 channels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "v2")


@pytest.fixture(scope="module")
def official(folder: Path) -> OfficialFlash:
    return OfficialFlash(folder)


@pytest.fixture(scope="module")
def engine(folder: Path):
    with Engine.from_pretrained(folder, device="cpu", backend="torch") as engine:
        yield engine


@pytest.fixture(scope="module")
def ordinary():
    """The same model without Flash: its prompts have all placeholders."""
    with Engine.from_pretrained("tiny", device="cpu", backend="torch") as engine:
        yield engine


def draw(num_tiles: int, *, twice: bool = False) -> Tensor:
    """Draws different tiles; twice: those of the first half come again."""
    tiles = torch.randint(0, 256, (num_tiles, 7, 7, 3), generator=torch.Generator().manual_seed(num_tiles))
    tiles = tiles.to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    if twice:
        tiles = torch.cat((tiles[: num_tiles // 2], tiles))[:num_tiles]
    return tiles


def load(folder: Path, dtype: torch.dtype = torch.float32, ops=TORCH) -> InternVL:
    config = load_config(folder)
    return InternVL(config, load_weights(open_checkpoint(folder), config, dtype=dtype, device=CPU, ops=ops), ops)


def of_size(name: str) -> ModelConfig:
    return parse(changed(json.loads(KNOWN_MODELS[name].read_text()), FLASH))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_rows_of_a_tile_are_those_of_the_official_code(version: str, tmp_path: Path) -> None:
    folder, tiles = write_flash(tmp_path / version, version=version), draw(5)
    official, model = OfficialFlash(folder), load(folder)
    features = official.features(tiles)
    kept, compressed = official.visual_tokens(features)
    with torch.inference_mode():
        rows = model.encode_tiles(tiles)
    assert rows.shape == (5, 4 + 1 + 1, 128)
    torch.testing.assert_close(rows[:, :4], kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[:, 4:5], compressed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[:, -1, 0], official.odds(features), rtol=1e-4, atol=1e-5)
    assert not rows[:, -1, 1:].any()
    assert rows[:, -1, 0].std() > 0.05


TABLES = {"onednn": lambda: cpu_ops(CPU, torch.float32), "triton": lambda: triton_ops(CPU)}
TABLES["batch invariant"] = lambda: invariant_ops(CPU)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_of_operations_gives_the_same_rows(table: str, folder: Path, one_order_of_sums: None) -> None:
    tiles, ops = draw(2), TABLES[table]()
    with torch.inference_mode():
        expected = load(folder).encode_tiles(tiles)
        torch.testing.assert_close(load(folder, ops=ops).encode_tiles(tiles), expected, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_the_odds_are_as_exact_as_the_official_ones(folder: Path, official: OfficialFlash) -> None:
    """The official code rounds keys, values and queries once more, before it adds their biases."""
    official_bf16, model = OfficialFlash(folder, torch.bfloat16), load(folder, torch.bfloat16)
    with torch.inference_mode():
        x_RE = encode_tiles(TORCH, model.config.vision, model.weights.vision, draw(13))
        patches = x_RE[:-13].view(13, 4, 4, -1)
        assert model.weights.flash is not None
        odds = compression_odds(TORCH, model.weights.flash.router, x_RE, 13)
        theirs, exact = official_bf16.odds(patches), official.odds(patches.float())
    assert odds.dtype == theirs.dtype == torch.bfloat16
    error, their_error = (odds - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert 0 < error < 1.5 * their_error < 0.05


@pytest.mark.parametrize("num_tiles", range(1, 14))
@pytest.mark.parametrize("twice", [False, True])
def test_a_request_gets_the_official_prompt_logits_and_answer(
    num_tiles: int, twice: bool, engine: Engine, ordinary: Engine, official: OfficialFlash
) -> None:
    tiles = draw(num_tiles, twice=twice)
    features = official.features(tiles)
    odds, (kept, compressed) = official.odds(features), official.visual_tokens(features)
    prepared = engine.prepare_turns(TURNS, [tiles])
    (picture,) = prepared.pictures
    assert picture.compressed is not None
    found = torch.tensor(picture.compressed)
    sure = (odds - torch.quantile(odds, 0.4)).abs() > 1e-5  # of others rounding decides
    expected = decide(odds, *official.thresholds())
    assert torch.equal(found[sure], expected[sure])
    assert sure.any() == found.any() == (num_tiles > 1 + twice)  # of two equal tiles none is compressed

    context_id = engine.tokenizer.token_id(CONTEXT)
    whole = list(ordinary.prepare_turns(TURNS, [tiles]).prompt.token_ids)
    ids = shorten(whole, list(picture.compressed), context_id, 4, 1)
    assert list(prepared.prompt.token_ids) == ids
    assert prepared.prompt.text.count(CONTEXT) == ids.count(context_id) == 4 * num_tiles - 3 * int(found.sum())
    visual_XD = torch.cat([(few if each else many) for each, few, many in zip(found, compressed, kept, strict=True)])
    params = SamplingParams(max_tokens=5, ignore_eos=True, prompt_logprobs=0)
    (reply,) = engine.generate_prepared(iter([prepared]), [params])
    assert reply.token_ids == official.greedy(ids, visual_XD, context_id, 5)
    logprobs = official.logits(ids, visual_XD, context_id, [])[:-1].log_softmax(-1)
    assert reply.prompt_logprobs is not None
    ours = [each.logprob for each in reply.prompt_logprobs if each is not None]
    theirs = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-3, atol=1e-3)
    assert reply.usage.saved_image_tokens == 3 * int(found.sum())
    assert reply.usage.image_tokens + reply.usage.saved_image_tokens == 4 * num_tiles


def test_rows_of_tiles_are_those_that_are_seen(folder: Path) -> None:
    config = load_config(folder)
    assert rows_of_tiles((False, True, False), config).tolist() == [0, 1, 2, 3, 10, 12, 13, 14, 15]


def test_the_parameters_are_those_of_the_hub_but_the_rounds_that_are_never_computed() -> None:
    card = model_card(of_size("InternVL3_5-30B-A3B"), "flash")
    assert card["parameters"]["total"] + UNUSED == 30_991_437_826
    card = model_card(of_size("InternVL3_5-8B"), "flash")
    without = model_card(parse(json.loads(KNOWN_MODELS["InternVL3_5-8B"].read_text())), "ordinary")
    assert card["parameters"]["total"] - without["parameters"]["total"] + UNUSED == 285_324_290
    assert (card["tokens_per_tile"], card["tokens_per_compressed_tile"]) == (256, 64)
    assert "256 tokens, or 64 of a compressed one" in render_card(card)
    assert "flash" not in without["parameters"]
    assert "compressed" not in render_card(without)


@pytest.mark.parametrize("name", ["InternVL3_5-8B", "InternVL3_5-38B"])
def test_work_and_workspace_count_what_flash_adds(name: str) -> None:
    config, ordinary = of_size(name), parse(json.loads(KNOWN_MODELS[name].read_text()))
    dtype = torch.bfloat16
    parameters = named_parameters(build_weights(config, dtype=dtype, device="meta"))
    added = {path: parameter for path, parameter in parameters.items() if path.startswith("flash.")}
    more, less = vision_work(config, dtype, 1), vision_work(ordinary, dtype, 1)
    assert more.bytes - less.bytes == sum(parameter.nbytes for parameter in added.values())
    matrices = {path: parameter.numel() for path, parameter in added.items() if path.endswith("weight_NK")}
    projector = 2 * 64 * sum(count for path, count in matrices.items() if ".projector." in path)
    router = sum(count for path, count in matrices.items() if ".router." in path)
    width, keys = config.vision.hidden_size, 2 * 2 * 1024 * 2 * config.vision.hidden_size**2  # and values
    assert projector + keys < more.flops - less.flops < projector + keys + 8 * router + 16 * 1024 * 4 * width
    many = replace(config, decoder=replace(config.decoder, hidden_size=1 << 14))
    held = 1024 * width + 2 * 2 * 1024 * width + 321 * (1 << 14)  # features, keys and values twice, and visual tokens
    assert vision_workspace_bytes(many, dtype, 1) >= 2 * held
    for num_tiles in (1, 16):
        assert vision_workspace_bytes(config, dtype, num_tiles) > vision_workspace_bytes(ordinary, dtype, num_tiles)


def test_the_router_is_never_quantised(folder: Path) -> None:
    model = load(folder)
    paths = named_linears(model.weights)
    assert {path for path in paths if path.startswith("flash.")} == {f"flash.projector.fc{n}" for n in (1, 2, 3)}
    with Engine.from_pretrained(folder, device="cpu", quantization="int8") as engine:
        assert len(engine.prepare_turns(TURNS, [draw(4)]).pictures) == 1


@pytest.mark.parametrize("unused", [True, False])
def test_rounds_that_are_never_computed_may_be_in_the_file_or_not(unused: bool, tmp_path: Path) -> None:
    folder = write_flash(tmp_path / "flash", unused=unused)
    names = load_file(folder / "model.safetensors")
    assert ("pooling_before_gating.attn4.in_proj_weight" in names) == unused
    assert load(folder).weights.flash is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("-gating.block4.3.bias", r"1 missing: gating\.block4\.3\.bias"),
        ("-pooling_before_gating.attn2.in_proj_weight", "1 missing: pooling_before_gating.attn2.in_proj_weight"),
        ("+pooling_before_gating.attn5.in_proj_weight", "1 left over: pooling_before_gating.attn5.in_proj_weight"),
        ("+mlp2.8.weight", r"1 left over: mlp2\.8\.weight"),
    ],
)
def test_other_tensors_are_missed_or_left_over(change: str, message: str, folder: Path, tmp_path: Path) -> None:
    sign, name = change[0], change[1:]
    made = write_flash(tmp_path / "changed")
    tensors = load_file(made / "model.safetensors")
    if sign == "-":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2)
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(made)


def test_an_ordinary_config_leaves_the_weights_of_flash_over(folder: Path, tmp_path: Path) -> None:
    made = write_flash(tmp_path / "changed")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"flash_mode": False}))
    with pytest.raises(CheckpointError, match=r"left over: .*gating\.block1\.0\.weight"):
        load(made)


def test_weights_can_be_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder, torch.bfloat16)
    save_weights(model.weights, model.config, tmp_path, dialect=DIALECTS["original"])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = named_parameters(load(tmp_path, torch.bfloat16).weights)
    for path, parameter in named_parameters(model.weights).items():
        assert torch.equal(again[path], parameter), path


def test_random_checkpoints_and_weights_have_odds_that_differ(tmp_path: Path) -> None:
    values = json.loads(((folder := write_flash(tmp_path / "flash")) / "config.json").read_text())
    values["llm_config"]["vocab_size"] = 400
    write_random_checkpoint(values, tmp_path / "random")
    written = load(tmp_path / "random")
    made = random_weights(load_config(folder), dtype=torch.float32, device=CPU)
    for model in (written, InternVL(load_config(folder), made, TORCH)):
        with torch.inference_mode():
            odds = model.encode_tiles(draw(8))[:, -1, 0]
        assert odds.isfinite().all()
        assert len(set(odds.tolist())) > 4
