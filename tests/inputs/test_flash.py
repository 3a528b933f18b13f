"""Which tiles of a request InternVL3.5-Flash compresses, and what that leaves of a prompt."""

import json
from pathlib import Path

import pytest
import torch

from internvl_rt.checkpoint.config import FlashConfig, ModelConfig, load_config
from internvl_rt.errors import ContextLengthError, RequestError
from internvl_rt.inputs.flash import cannot_decide, check_least, choose, compress
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.prompt import Prompt, VisualSpan
from internvl_rt.inputs.raw_prompt import RawPrompt, shorten
from support.official_flash import CONTEXT, TINY, decide


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    file = tmp_path_factory.mktemp("flash") / "config.json"
    flash = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.25}
    file.write_text(json.dumps(json.loads(Path(TINY / "config.json").read_text()) | flash))
    return load_config(file)


ODDS = (
    [0.5],
    [0.25, 0.75],
    [0.5, 0.5, 0.5],
    [0.501953125, 0.50390625, 0.505859375],  # neighbours in bfloat16
    [0.1, 0.9, 0.9, 0.2, 0.9],
    [number / 256 for number in range(128, 228)],
    torch.rand(13, generator=torch.Generator().manual_seed(1)).bfloat16().tolist(),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("least_odds", [0.0, 0.5, 0.5001, 0.4999, 1.0])
def test_tiles_are_chosen_as_torch_compares_odds_with_numbers(
    dtype: torch.dtype, quantile: float, least_odds: float
) -> None:
    for odds in ODDS:
        expected = decide(torch.tensor(odds, dtype=dtype), quantile, least_odds).tolist()
        assert choose(odds, FlashConfig(quantile, least_odds), dtype) == expected


def test_the_dtype_decides_where_odds_are_near_a_bound() -> None:
    odds = [0.4921875, 0.5, 0.5]  # the quantile of 0.95 is 0.5; that of 0.49 is 0.499..., which rounds to 0.5
    assert choose(odds, FlashConfig(0.49, 0.0), torch.float32) == [False, True, True]
    assert choose(odds, FlashConfig(0.49, 0.0), torch.bfloat16) == [False, False, False]
    assert choose([0.25, 0.5], FlashConfig(0.0, 0.5001), torch.bfloat16) == [False, True]
    assert choose([0.25, 0.5], FlashConfig(0.0, 0.5001), torch.float32) == [False, False]


def test_one_tile_equal_tiles_and_the_highest_quantile_are_never_compressed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose([0.99], FlashConfig(0.0, 0.0), dtype) == [False]
        assert choose([0.99] * 5, FlashConfig(0.0, 0.0), dtype) == [False] * 5
        assert choose([0.1, 0.5, 0.9], FlashConfig(1.0, 0.0), dtype) == [False] * 3
        assert choose([0.1, 0.5, 0.9], FlashConfig(0.0, 0.0), dtype) == [False, True, True]
        assert choose([], FlashConfig(0.0, 0.0), dtype) == []


def pictures(*num_tiles: int) -> list[Picture]:
    return [Picture(bytes([number + 1]) * 32, each, media_id=number) for number, each in enumerate(num_tiles)]


def test_pictures_get_the_decisions_of_their_own_tiles(config: ModelConfig) -> None:
    given = pictures(2, 1, 3)
    given.insert(1, Picture(bytes(32), 1, visual_XD=torch.zeros(5, 128)))
    odds = [0.1, 0.9, 0.8, 0.2, 0.7, 0.3]  # the median is 0.5
    decided = compress(given, odds, config, torch.float32)
    assert [each.compressed for each in decided] == [(False, True), None, (True,), (False, True, False)]
    assert [each.num_saved for each in decided] == [3, 0, 3, 3]
    assert [each.count_tokens(config) for each in decided] == [5, 5, 1, 9]
    assert [each.media_id for each in decided] == [0, 0, 1, 2]
    assert decided[1] is given[1]
    digests = {each.span_digest for each in decided} | {each.digest for each in given}
    assert len(digests) == 7
    assert compress([], [], config, torch.float32) == []


def test_a_picture_is_known_by_its_tiles_and_by_the_compressed_ones(config: ModelConfig) -> None:
    names = set()
    for odds in ([0.1, 0.9], [0.9, 0.1], [0.5, 0.5]):
        (one,), (other,) = (compress(pictures(2), odds, config, torch.float32) for _ in range(2))
        assert one.span_digest == other.span_digest
        assert len(one.span_digest) == 32
        names.add(one.span_digest)
    assert len(names) == 3


def test_pictures_that_cannot_fit_are_refused_and_nobody_decides_without_a_model(config: ModelConfig) -> None:
    check_least(pictures(5, 4), config, 10, "shorten it")
    with pytest.raises(ContextLengthError, match=r"at least 10 tokens, if all tiles are .* may have 10; shorten it"):
        check_least(pictures(5, 5), config, 10, "shorten it")
    with pytest.raises(RequestError, match="prepared only by an engine; use its `prepare`"):
        cannot_decide(pictures(1), None, None)


def test_placeholders_of_compressed_tiles_are_left_out_of_ids_spans_and_text() -> None:
    text = f"a<img>{CONTEXT * 8}</img>b<img>{CONTEXT * 4}</img><img>{CONTEXT * 4}</img>"
    ids = (1, 9, *[7] * 8, 8, 2, 9, *[7] * 4, 8, 9, *[7] * 4, 8)
    spans = VisualSpan(2, 8), VisualSpan(13, 4), VisualSpan(19, 4)
    short = shorten(Prompt(ids, spans, text), [3, 0, 3])
    assert short.token_ids == (1, 9, *[7] * 5, 8, 2, 9, *[7] * 4, 8, 9, 7, 8)
    assert short.spans == (VisualSpan(2, 5), VisualSpan(10, 4), VisualSpan(16, 1))
    assert short.text == f"a<img>{CONTEXT * 5}</img>b<img>{CONTEXT * 4}</img><img>{CONTEXT}</img>"
    for span in short.spans:
        assert set(short.token_ids[span.start : span.start + span.num_tokens]) == {7}
    assert shorten(Prompt(ids, spans, text), [0, 0, 0]) == Prompt(ids, spans, text)


def test_ids_may_have_the_full_number_of_placeholders(config: ModelConfig) -> None:
    tiles = torch.zeros(5, 56, 56, 3, dtype=torch.uint8)
    assert RawPrompt([1], tiles).most_ids(config, 100) == 100 + 5 * 3
    assert RawPrompt([1]).most_ids(config, 100) == 100
    assert RawPrompt([1], tiles).most_ids(load_config(TINY), 100) == 100
