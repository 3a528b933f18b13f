"""A program against the public interface, as strict type checkers see it: tests/test_typing.py checks and runs it.

Each annotation of a variable says what its author relies on; a checker that finds another type fails.
"""

import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import internvl_rt
from internvl_rt import AsyncEngine, Engine, EngineOptions, RawPrompt, SamplingParams
from internvl_rt.kernels.catalogue import Kernel, catalogue
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.operators import register_operators

Picture = str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | torch.Tensor


class Foreign:
    """An array of another library."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def messages_of(*pictures: Picture) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Read the digits."}]}]


def ask(engine: Engine, picture: Picture) -> str:
    params = SamplingParams(max_tokens=8, temperature=0.5, seed=1, stop=("\n",), logit_bias={3: 1.0}, logprobs=1)
    reply: internvl_rt.Reply = engine.chat(messages_of(picture), params, timeout_s=60.0, cache_salt="a")
    usage: internvl_rt.Usage = reply.usage
    timings: internvl_rt.Timings = reply.timings
    choice: internvl_rt.Choice = reply.choices[0]
    seconds: float | None = timings.first_token_s
    tokens: int = usage.total_tokens
    for token in choice.logprobs or ():
        logprob: float = token.logprob
        print(logprob, token.token_id)
    print(seconds, tokens)
    return reply.text


def use_all(engine: Engine, picture: Picture) -> None:
    params = SamplingParams(max_tokens=4)
    for piece in engine.stream(messages_of(picture), params):
        ended: internvl_rt.Reply | None = piece.reply
        print(piece.text, ended)
    replies: list[internvl_rt.Reply] = engine.generate([messages_of(picture)] * 2, [params, params], progress=False)
    scores: list[internvl_rt.Score] = engine.score(messages_of(picture), ["4719", "4718"], include_end=True)
    total: float = scores[0].total
    described: internvl_rt.PromptDescription = engine.describe(messages_of(picture))
    layout: internvl_rt.TileLayout | None = described.layouts[0]
    visual: list[torch.Tensor] = engine.encode_images([picture, Foreign(np.zeros((8, 8, 3), np.uint8))])
    raw = RawPrompt(torch.tensor([[1, 2, 3]]))
    stats: dict[str, int | float] = engine.stats()
    print(replies, total, layout, visual[0].shape, engine.chat(raw, params).finish_reason, stats["running"])


async def serve(engine: AsyncEngine, picture: Picture) -> str:
    text = ""
    try:
        async for piece in engine.stream(messages_of(picture), SamplingParams(max_tokens=8)):
            text += piece.text
        answer: internvl_rt.Reply = await engine.chat(messages_of(picture))
        print(answer.text)
    except internvl_rt.QueueFullError:
        await asyncio.sleep(1)
    except (internvl_rt.MediaError, internvl_rt.ContextLengthError) as error:
        media_id: int | None = error.media_id
        print(media_id)
    return text


def main(picture: Picture) -> None:
    options = EngineOptions(max_num_seqs=3)
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=options.max_num_seqs, exif="apply") as engine:
        print(ask(engine, picture))
        use_all(engine, picture)

    async def run() -> str:
        async with AsyncEngine.from_pretrained("tiny", device="cpu") as shared:
            return await serve(shared, picture)

    print(asyncio.run(run()))
    kernel: Kernel = catalogue()["rms_norm"]
    y: torch.Tensor = rms_norm_reference(torch.ones(2, 3), torch.ones(3), 1e-6)
    names: tuple[str, ...] = register_operators()
    print(kernel.formula, y.shape, names)
