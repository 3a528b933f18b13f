"""Grids, tiles and video frame indices equal those of the official code."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_rt.inputs.image import ImageSource, open_image
from internvl_rt.inputs.tiles import ImageOptions, choose_grid, plan_tiles
from internvl_rt.inputs.video import choose_frame_indices

SETS = sorted(Path(os.environ["INTERNVL_RT_GOLDEN"]).glob("set*"))


@pytest.fixture(params=SETS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def tile_hashes(source: ImageSource, max_tiles: int, image_size: int) -> list[str]:
    options = ImageOptions(image_size=image_size, max_tiles=max_tiles)
    return [sha256(tile) for tile in open_image(source, options).tiles()]


def test_at_least_one_set_is_found() -> None:
    assert SETS


def test_grids(folder: Path) -> None:
    for row in read(folder / "preprocessing.json")["sizes"]:
        width, height = row.pop("width"), row.pop("height")
        for key, grids in row.items():
            for max_tiles, want in grids.items():
                options = ImageOptions(image_size=int(key.removeprefix("image_size_")), max_tiles=int(max_tiles))
                assert [*choose_grid(width, height, options), plan_tiles(width, height, options).num_tiles] == want


def test_grids_with_a_minimum(folder: Path) -> None:
    for case in read(folder / "preprocessing.json")["min_num_cases"]:
        size = case["width"], case["height"]
        options = ImageOptions(image_size=case["image_size"], min_tiles=case["min_num"], max_tiles=case["max_num"])
        assert [*choose_grid(*size, options), plan_tiles(*size, options).num_tiles] == case["grid"]


def test_photographs(folder: Path) -> None:
    for photo in read(folder / "preprocessing.json")["photos"]:
        path = folder / photo["file"]
        assert sha256(np.asarray(open_image(path, ImageOptions()).decode())) == photo["sha256_decoded_rgb"]
        for run in photo["runs"]:
            assert tile_hashes(path, run["max_num"], run["image_size"]) == run["sha256_tiles"]


def test_inputs_of_the_model_cases(folder: Path) -> None:
    stored = load_file(folder / "inputs.safetensors")
    for name, case in read(folder / "inputs.json").items():
        options = ImageOptions(image_size=case["image_size"], max_tiles=case["max_num"])
        tiles = open_image(folder / case["file"], options).tiles()
        assert [sha256(tile) for tile in tiles] == case["sha256_tiles_u8"]
        assert np.array_equal(tiles, stored.get(f"{name}.tiles_u8", tiles))


def test_pass_order(folder: Path) -> None:
    for case in read(folder / "resize_order.json")["cases"]:
        x, y = np.arange(case["width"])[None, :], np.arange(case["height"])[:, None]
        a, b, c, d, e = case["coefficients"]
        planes = (x * x * a + y * b + (x * y) // c, x * d + y * y, (x ^ y) * e)
        picture = np.stack([plane % 256 for plane in planes], axis=-1).astype(np.uint8)
        assert sha256(picture) == case["sha256_input"]
        assert tile_hashes(picture, case.get("max_num", 12), case.get("image_size", 448)) == case["sha256_tiles"]


def test_video_frame_indices(folder: Path) -> None:
    for case in read(folder / "prompts.json")["video"]:
        indices = choose_frame_indices(case["frames"], case["fps"], case["num_segments"], case["bound"])
        assert indices == case["indices"]
