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
from internvl_rt.critic import (
    Critic,
    Judge,
    MpoLoss,
    MpoWeights,
    Pair,
    PairScores,
    Shift,
    StepScores,
    VisualPRM,
    mpo_loss,
    score_pairs,
)
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
    reasoning: str | None = choice.reasoning
    tokens: int = usage.total_tokens
    for token in choice.logprobs or ():
        logprob: float = token.logprob
        print(logprob, token.token_id)
    print(seconds, tokens, reasoning)
    return reply.text


def use_all(engine: Engine, picture: Picture) -> None:
    params = SamplingParams(max_tokens=4)
    for piece in engine.stream(messages_of(picture), params, think=False):
        ended: internvl_rt.Reply | None = piece.reply
        new: str = piece.reasoning + piece.text
        print(new, ended)
    replies: list[internvl_rt.Reply] = engine.generate([messages_of(picture)] * 2, [params, params], progress=False)
    scores: list[internvl_rt.Score] = engine.score(messages_of(picture), ["4719", "4718"], include_end=True)
    total: float = scores[0].total
    described: internvl_rt.PromptDescription = engine.describe(messages_of(picture))
    layout: internvl_rt.TileLayout | None = described.layouts[0]
    visual: list[torch.Tensor] = engine.encode_images([picture, Foreign(np.zeros((8, 8, 3), np.uint8))])
    raw = RawPrompt(torch.tensor([[1, 2, 3]]))
    stats: dict[str, int | float] = engine.stats()
    print(replies, total, layout, visual[0].shape, engine.chat(raw, params).finish_reason, stats["running"])


def choose(engine: Engine, picture: Picture) -> str:
    asked = messages_of(picture)
    critic = VisualPRM(engine)
    ranking: internvl_rt.Ranking = engine.best_of(asked, 2, critic=critic, params=SamplingParams(max_tokens=4))
    best: internvl_rt.RankedAnswer = ranking.best
    score: float | None = best.score
    choosers: list[Critic | internvl_rt.MajorityVote] = [Judge(engine), lambda messages, text: len(text)]
    for chooser in [*choosers, internvl_rt.MajorityVote(stop_decided=True)]:
        print(engine.best_of(asked, 2, critic=chooser, greedy_first=True).text)
    steps: StepScores = VisualPRM(engine, max_steps=None).score_steps(asked, "4719")
    ranked: list[StepScores] = critic.select_best(asked, ["4719", "7"])
    places: list[internvl_rt.TokenScores] = engine.score_tokens(asked, ["7", 3], [0, -1])
    share: tuple[float, ...] = places[0].probabilities
    for index, reply in engine.generate_as_completed([asked, asked], SamplingParams(max_tokens=4)):
        print(index, reply.text)
    batches: list[list[internvl_rt.Score]] = engine.score_batch([(asked, ["4719"])], progress=False)
    scores: PairScores = score_pairs(None, engine, [Pair(asked, "4719", "7")])
    chosen, rejected = scores.reference_chosen_B, scores.reference_rejected_B
    loss: MpoLoss = mpo_loss(chosen, rejected, chosen, rejected, torch.tensor(1.0), shift=Shift(), weights=MpoWeights())
    print(score, steps.score, ranked[0].index, share, batches[0][0].total, loss.total.item(), loss.shift.count)
    return ranking.text


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
        print(choose(engine, picture))

    async def run() -> str:
        async with AsyncEngine.from_pretrained("tiny", device="cpu") as shared:
            return await serve(shared, picture)

    print(asyncio.run(run()))
    kernel: Kernel = catalogue()["rms_norm"]
    y: torch.Tensor = rms_norm_reference(torch.ones(2, 3), torch.ones(3), 1e-6)
    names: tuple[str, ...] = register_operators()
    print(kernel.formula, y.shape, names)
