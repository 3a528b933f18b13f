"""Chooses which tiles of a request InternVL3.5-Flash sees with fewer visual tokens.

The official code decides over all tiles of a call, which is one request: those of every picture and frame of the
conversation, old ones included. A tile is compressed if its odds are above a quantile of all odds, so one tile alone
never is, nor is any where all odds are equal.

Source: `generate_flash` in modeling_internvl_chat.py of the Flash repositories.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import islice

import torch

from internvl_rt.checkpoint.config import FlashConfig, ModelConfig
from internvl_rt.errors import ContextLengthError, RequestError
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.proceed import Proceed

Decide = Callable[[Items[Picture], str | None, Proceed], Items[Picture]]  # pictures of a request, and its salt


def choose(odds: Items[float], config: FlashConfig, dtype: torch.dtype) -> list[bool]:
    """Says of each tile of a request whether it is compressed. dtype: the model's, which the odds are exact in.

    The quantile is interpolated in float32. Odds are compared in the model's dtype, which rounds both bounds. A
    bfloat16 has 128 steps from 0.5 to 1, so odds are often equal to the quantile, and then their tile is kept.
    """
    if not odds:
        return []
    odds_I = torch.tensor(odds, dtype=dtype)
    bound = torch.quantile(odds_I.float(), config.quantile).to(dtype)
    return ((odds_I > bound) & (odds_I >= torch.tensor(config.least_odds, dtype=dtype))).tolist()


def compress(pictures: Items[Picture], odds: Items[float], config: ModelConfig, dtype: torch.dtype) -> list[Picture]:
    """Decides over the tiles of all pictures of a request, whose odds are given in order.

    Visual tokens that were computed elsewhere stay as they are, and have no odds.
    """
    assert config.flash is not None, "this model compresses tiles"
    chosen = iter(choose(odds, config.flash, dtype))
    saved_per_tile = config.tokens_per_tile - config.least_tokens_per_tile
    decided = []
    for picture in pictures:
        if picture.visual_XD is None:
            compressed = tuple(islice(chosen, picture.num_tiles))
            picture = replace(picture, compressed=compressed, num_saved=sum(compressed) * saved_per_tile)
        decided.append(picture)
    return decided


def check_least(pictures: Items[Picture], config: ModelConfig, limit: int, remedy: str) -> None:
    """Raises ContextLengthError, before any picture is encoded, if not even compressed tiles fit `limit` tokens."""
    least = sum(picture.num_tiles for picture in pictures) * config.least_tokens_per_tile
    if least >= limit:
        raise ContextLengthError(
            f"the pictures have at least {least:,} tokens, if all tiles are compressed, but prompt and answer together "
            f"may have {limit:,}; {remedy}"
        )


def cannot_decide(*_: object) -> Items[Picture]:
    """Decides nothing, where there is no model that could. Raises RequestError."""
    raise RequestError(
        "this model compresses some tiles of a request, as its vision tower decides, so pictures are prepared only by "
        "an engine; use its `prepare`"
    )
