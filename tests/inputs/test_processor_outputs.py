"""What a processor of transformers returns runs as it is: ids with placeholders, and normalised tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import AsyncEngine, RawPrompt, RequestError, SamplingParams
from internvl_rt.compat import load_image
from support.calls import ask, check_idle, load, run

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
PICTURE, OTHER = sorted(SAMPLES.glob("*.png"))[:2]
GREEDY = SamplingParams(max_tokens=8, logprobs=0)


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def processed(engine) -> dict[str, torch.Tensor]:
    """Two pictures as transformers prepares them: its image processor's tiles, and its tokenizer's ids of the text that
    its InternVLProcessor would make. (That class itself needs torchvision, for videos.)"""
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size, per_tile = engine.config.vision.image_size, engine.config.tokens_per_tile
    images = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, crop_to_patches=True, max_patches=4)
    pictures = [Image.open(path).convert("RGB") for path in (PICTURE, OTHER)]
    pixels = images(pictures, return_tensors="pt")
    places = [f"<img>{'<IMG_CONTEXT>' * per_tile * int(number)}</img>\n" for number in pixels["num_patches"]]
    text = f"<|im_start|>user\n{''.join(places)}Read the digits.<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(SAMPLES.parent)([text], return_tensors="pt")
    return {"input_ids": ids["input_ids"], "pixel_values": pixels["pixel_values"]}


def raw_of(engine: Any, *pictures: Path) -> RawPrompt:
    """The same prompt as a chat's, with tiles of the official `load_image`."""
    size = engine.config.vision.image_size
    tiles = torch.cat([load_image(picture, input_size=size, max_num=12) for picture in pictures])
    return RawPrompt(engine.describe(ask("Read.", *pictures)).prompt.token_ids, tiles)


def test_a_processors_ids_and_tiles_run_as_they_are(engine, processed) -> None:
    assert processed["input_ids"].shape[0] == 1
    reply = engine.chat(RawPrompt(processed["input_ids"], processed["pixel_values"]), GREEDY)
    num_tiles = len(processed["pixel_values"])
    assert num_tiles > 2
    assert reply.usage.image_tokens == num_tiles * engine.config.tokens_per_tile
    assert reply.usage.prompt_tokens == processed["input_ids"].shape[1]
    assert reply.text.strip()
    check_idle(engine)


def test_ids_and_official_tiles_give_the_answer_and_log_probabilities_of_the_chat(engine) -> None:
    for pictures in ((PICTURE,), (PICTURE, OTHER)):
        chat, raw = engine.chat(ask("Read.", *pictures), GREEDY), engine.chat(raw_of(engine, *pictures), GREEDY)
        assert raw.token_ids == chat.token_ids
        assert raw.usage.image_tokens == chat.usage.image_tokens > 0
        for ours, theirs in zip(raw.logprobs, chat.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_each_run_of_placeholders_is_a_picture(engine) -> None:
    raw = raw_of(engine, PICTURE, OTHER)
    described, expected = engine.describe(raw), engine.describe(ask("Read.", PICTURE, OTHER))
    assert described.prompt.spans == expected.prompt.spans
    assert described.layouts == (None, None)
    assert engine.chat(RawPrompt(expected.prompt.text, raw.pixel_values), GREEDY).usage.image_tokens > 0


def test_an_asynchronous_engine_copies_tiles_at_once(engine) -> None:
    expected = engine.chat(raw_of(engine, PICTURE), GREEDY)

    async def main() -> None:
        async with AsyncEngine(load()) as served:
            for given in (raw_of(engine, PICTURE), raw_of(engine, PICTURE)):
                tiles = given.pixel_values
                ids = torch.tensor([given.content])
                call = served.chat(RawPrompt(ids, tiles), GREEDY)
                tiles.zero_()
                ids.zero_()
                assert (await call).token_ids == expected.token_ids
            with pytest.raises(RequestError, match="pixel_values"):
                await served.chat(RawPrompt([1, 2], np.zeros((1, 5))), GREEDY)

    run(main())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: RawPrompt(raw.content, raw.pixel_values[:-1]),
            "tiles need .* in runs of a multiple",
        ),
        (lambda raw: RawPrompt([1, 2, 3], raw.pixel_values), "but it has 0 in 0 runs; give the processor's own ids"),
        (lambda raw: RawPrompt(raw.content[: len(raw.content) // 2], raw.pixel_values), "but it has"),
        (lambda raw: RawPrompt(raw.content, raw.pixel_values[0]), "pixel_values: expected at least one tile"),
        (lambda raw: RawPrompt(raw.content, "page.png"), "pixel_values: expected a tensor or an array, got str"),
        (lambda raw: RawPrompt(raw.content, raw.pixel_values * torch.nan), "pixel_values: numbers are not finite"),
        (lambda raw: RawPrompt(torch.ones(2, 3, dtype=torch.int64)), r"expected ids \[n\] or \[1, n\], got \[2, 3\]"),
        (
            lambda raw: RawPrompt(torch.ones(3, device="meta")),
            "the prompt: expected a dense tensor on the CPU or a CUDA",
        ),
        (lambda raw: RawPrompt(torch.ones(3).to_sparse()), "the prompt: expected a dense tensor on the CPU or a CUDA"),
        (lambda raw: RawPrompt(torch.ones(3)), "token 0 of the prompt must be an integer"),
        (lambda raw: RawPrompt(np.zeros((1, 0), np.int64)), "must have from 1 to 32,768 token ids, got 0"),
        (lambda raw: RawPrompt(np.broadcast_to(np.int64(1), (10**9,))), "got 1,000,000,000"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_together_is_refused(engine, change, message) -> None:
    with pytest.raises(RequestError, match=message):
        engine.chat(change(raw_of(engine, PICTURE, OTHER)))
    check_idle(engine)
