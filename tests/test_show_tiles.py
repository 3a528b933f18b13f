"""`internvl-rt chat --show-tiles` draws how pictures are cut, in the order in which the prompt has the tiles."""

from pathlib import Path

import pytest
from PIL import Image

from internvl_rt.chat import draw_tiles
from internvl_rt.cli import main
from internvl_rt.inputs.tiles import TileLayout

SAMPLE = Path(__file__).parents[1] / "internvl_rt" / "tiny" / "samples" / "4719.png"


def test_tiles_are_numbered_row_by_row_and_the_thumbnail_is_the_last() -> None:
    assert draw_tiles(TileLayout(1920, 1080, 4, 3, thumbnail=True), 448, 256).splitlines() == [
        "1,920 x 1,080 pixels, stretched to 1,792 x 1,344: 12 tiles and the thumbnail, 3,328 tokens",
        "+----+----+----+----+",
        "| 1  | 2  | 3  | 4  |",
        "+----+----+----+----+",
        "| 5  | 6  | 7  | 8  |",
        "+----+----+----+----+",
        "| 9  | 10 | 11 | 12 |",
        "+----+----+----+----+",
        "| 13 |  the whole picture",
        "+----+",
    ]


def test_one_tile_has_no_thumbnail() -> None:
    assert draw_tiles(TileLayout(30, 30, 1, 1, thumbnail=False), 448, 256).splitlines() == [
        "30 x 30 pixels, stretched to 448 x 448: 1 tile, 256 tokens",
        *("+----+", "| 1  |", "+----+"),
    ]


def test_chat_draws_the_pictures_of_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    square = ["--image", str(tmp_path / "square.png")]
    assert main(["chat", "tiny", "--image", str(SAMPLE), *square, *square, "--show-tiles", "Read the digits."]) == 0
    printed = capsys.readouterr()
    drawn = [line for line in printed.err.splitlines() if "picture" in line]
    assert drawn[0].startswith("picture 1: 248 x 61 pixels, stretched to 224 x 56: 4 tiles and the thumbnail, ")
    assert drawn[-1].startswith("pictures 2 to 3: 40 x 40 pixels, stretched to 56 x 56: 1 tile, ")
    assert "+" not in printed.out
