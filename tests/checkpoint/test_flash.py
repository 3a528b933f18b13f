"""The config.json of an InternVL3.5-Flash: its thresholds have no defaults, and limits of its router are checked."""

from typing import Any

import pytest

from internvl_rt.checkpoint.config import FlashConfig
from internvl_rt.errors import ConfigError
from support.configs import HF, ORIGINAL, changed, parse

FLASH: dict[str, Any] = {"flash_mode": True, "flash_relative_threshold": 0.1, "flash_absolute_threshold": 0.5}


def test_tiles_have_two_sizes_and_one_without_flash() -> None:
    config = parse(changed(ORIGINAL, FLASH))
    assert config.flash == FlashConfig(0.1, 0.5)
    assert (config.tokens_per_tile, config.least_tokens_per_tile, config.rows_per_tile) == (256, 64, 321)
    plain = parse(ORIGINAL)
    assert (plain.flash, plain.least_tokens_per_tile, plain.rows_per_tile) == (None, 256, 256)
    assert parse(changed(ORIGINAL, FLASH | {"flash_mode": None})).flash is None
    assert parse(changed(ORIGINAL, FLASH | {"flash_mode": False})).flash is None


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0), (0.0, 1.0)])
def test_thresholds_may_be_anything_from_0_to_1(bounds: tuple[float, float]) -> None:
    given = dict(zip(("flash_relative_threshold", "flash_absolute_threshold"), bounds, strict=True))
    assert parse(changed(ORIGINAL, FLASH | given)).flash == FlashConfig(*map(float, bounds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flash_relative_threshold": ...}, "flash_relative_threshold is missing, expected a number from 0 to 1"),
        ({"flash_absolute_threshold": ...}, "flash_absolute_threshold is missing, expected a number from 0 to 1"),
        ({"flash_absolute_threshold": None}, "flash_absolute_threshold is None, expected a number from 0 to 1"),
        ({"flash_relative_threshold": 1.5}, "flash_relative_threshold is 1.5, expected a number from 0 to 1"),
        ({"flash_relative_threshold": -0.1}, "flash_relative_threshold is -0.1, expected a number from 0 to 1"),
        ({"flash_relative_threshold": float("nan")}, "flash_relative_threshold is nan, expected a number from 0"),
        ({"flash_absolute_threshold": True}, "flash_absolute_threshold is True, expected a number from 0 to 1"),
        ({"flash_absolute_threshold": "0.5"}, "flash_absolute_threshold is '0.5', expected a number from 0 to 1"),
        ({"flash_mode": 1}, "flash_mode is 1, expected true or false"),
        (
            {"vision_config.image_size": 420, "force_image_size": 420},
            "vision_config.image_size is 420, expected a tile whose patches can be merged 4 x 4 with flash_mode",
        ),
        (
            {"vision_config.hidden_size": 1000, "vision_config.num_attention_heads": 8},
            "vision_config.hidden_size is 1000, expected a multiple of 16 with flash_mode",
        ),
        (
            {"vision_config.hidden_size": 1 << 21, "vision_config.num_attention_heads": 16},
            "vision_config.hidden_size is 2097152, expected fewer than 16777216 channels in a compressed visual token",
        ),
    ],
)
def test_what_flash_cannot_be_computed_with_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(changed(ORIGINAL, FLASH), changes))
    assert str(caught.value).startswith(f"there/config.json: {message}")


def test_the_port_to_transformers_is_refused_by_name() -> None:
    """It computes four different rounds of attention, which the official code does not."""
    with pytest.raises(ConfigError, match="model_type is 'internvl_flash', expected a class that runs"):
        parse(changed(HF, {"model_type": "internvl_flash", **FLASH}))
