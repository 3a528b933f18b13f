"""Pictures for an engine of the checkpoint that `official_flash` writes, and what such an engine decides of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_rt import Engine, SamplingParams
from internvl_rt.inputs.prepare import Prepared

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def load_flash(folder: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(folder, device="cpu", backend="torch", **{"block_size": 16, **options})


def picture(seed: int, height: int = 110, width: int = 170) -> np.ndarray:
    """Draws a picture of coarse noise, which is cut into 6 tiles and the thumbnail."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return noise.repeat(8, 0).repeat(8, 1)[:height, :width]


def small(seed: int) -> np.ndarray:
    return picture(seed, 56, 56)


def ask(*parts: object) -> list[dict[str, Any]]:
    made = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else part
        if isinstance(part, dict)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": made}]


def bits(prepared: Prepared) -> list[bool]:
    return [each for picture in prepared.pictures for each in picture.compressed or ()]


def odds_of(engine: Engine, prepared: Prepared) -> torch.Tensor:
    """Reads the odds in the last row of each tile, which the vision tower gives."""
    undecided = [replace(picture, compressed=None) for picture in prepared.pictures]
    rows = [engine.loop.encode(picture, None).view(picture.num_tiles, 6, -1) for picture in undecided]
    return torch.cat([each[:, -1, 0] for each in rows])
