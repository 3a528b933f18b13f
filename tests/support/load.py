"""Sends an engine many requests of every kind at once, with faults, for the load test and the soak."""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from internvl_rt import Engine, MediaError, Piece, Reply, SamplingParams, StepError

SAMPLES = sorted((Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples").glob("*.png"))
# Options of the engine that computes the expected answers: nothing is reused, and no answer may depend on them.
ALONE = {"prefix_cache": False, "visual_cache_bytes": 0, "max_num_seqs": 4, "block_size": 16, "max_model_len": 640}
MAX_OPEN = 24


class Fault(RuntimeError):
    """The error that a planted fault raises."""


@dataclass(frozen=True)
class Kind:
    """A request that is sent many times."""

    messages: list[dict[str, Any]]
    params: SamplingParams
    broken: bool = False  # its picture cannot be decoded
    responses: tuple[str, ...] = ()  # are scored together, instead of an answer


def build_kinds(number: int, seed: int, *, sampled: bool = True) -> list[Kind]:
    """Builds requests with text, pictures, video or earlier turns, for 1 to 4 answers, greedy or drawn with a seed."""
    rng = random.Random(seed)
    kinds = []
    for index in range(number):
        pictures = [rng.choice(SAMPLES) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture.read_bytes()} for picture in pictures]
        if index % 10 == 9:
            parts = [{"type": "video", "video": build_video(index)}]
        question = rng.choice(["Read the digits.", "How many digits are there?", "Hello", "Read! " * 12])
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        if rng.random() < 0.3:
            messages += [{"role": "assistant", "content": "4719"}, {"role": "user", "content": "And now?"}]
        options: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 9, 20, 60]), "ignore_eos": rng.random() < 0.7}
        options |= {"n": rng.choice([1, 1, 1, 2, 4])}
        if sampled and rng.random() < 0.5:
            options |= {"temperature": rng.choice([0.7, 3.0]), "seed": index, "top_p": rng.choice([1.0, 0.9])}
        if rng.random() < 0.2:
            options |= {"repetition_penalty": 1.3, "min_tokens": 1}
        if rng.random() < 0.2:
            options |= {"logprobs": 2}
        responses = ("4719", "The digits are 4719.", "7 " * (index % 9 + 1)) if index % 8 == 7 else ()
        kinds.append(Kind(messages, SamplingParams(**options), responses=responses))
    return kinds


def build_video(seed: int) -> bytes:
    """Returns an MP4 file of one second of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def build_broken_kind() -> Kind:
    data = SAMPLES[0].read_bytes()
    content = [{"type": "image", "image": data[: len(data) // 2]}, {"type": "text", "text": "Read the digits."}]
    return Kind([{"role": "user", "content": content}], SamplingParams(max_tokens=4), broken=True)


def answers_of(reply: Reply) -> list[tuple[list[int], str]]:
    """Returns what no other request may change: tokens, or the scores of responses in hundredths."""
    totals = [[round(100 * place.logprobs[0]) for place in scored.places] for scored in reply.scored]
    return [(total, "scored") for total in totals] or [(c.token_ids, c.finish_reason) for c in reply.choices]


def same_answers(found: list[tuple[list[int], str]], expected: list[tuple[list[int], str]]) -> bool:
    """Compares answers; scores may differ by the last digit, where both are rounded."""
    if found == expected:
        return True
    if len(found) != len(expected) or {how for _, how in found + expected} != {"scored"}:
        return False
    pairs = zip(found, expected, strict=True)
    return all(len(a) == len(b) and all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True)) for (a, _), (b, _) in pairs)


def open_stream(engine: Engine, kind: Kind) -> Iterator[Piece]:
    if not kind.responses:
        return engine.stream(kind.messages, kind.params)
    prompt = engine.prepare(kind.messages)
    prompts = [engine.preparer.prepare_score(prompt, text, include_end=True) for text in kind.responses]
    return engine._stream(engine.new_scoring(prompts))


def expected_answers(kinds: list[Kind], **options: Any) -> list[list[tuple[list[int], str]]]:
    """Returns the answers that each request gets when no other request runs and nothing is reused."""
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32", **ALONE, **options) as engine:
        return [[] if kind.broken else answers_of(last_reply(open_stream(engine, kind))) for kind in kinds]


def last_reply(stream: Iterator[Piece]) -> Reply:
    (reply,) = [piece.reply for piece in stream if piece.reply is not None]
    return reply


@dataclass
class Outcome:
    finished: int = 0
    cancelled: int = 0
    refused: int = 0  # requests whose picture cannot be decoded
    faulted: int = 0  # requests in a step that a fault ended
    wrong: list[str] = field(default_factory=list)


@dataclass
class _Open:
    index: int
    stream: Iterator[Any]
    texts: dict[int, str] = field(default_factory=dict)


def run_load(
    engine: Engine,
    kinds: list[Kind],
    expected: list[list[tuple[list[int], str]]],
    *,
    num_requests: int,
    seed: int,
    cancel: float = 0.1,
    arm_fault: Callable[[random.Random], None] | None = None,
) -> Outcome:
    """Opens streams at random, advances one random stream at a time, closes some early; compares every reply.

    arm_fault: a function that makes a later operation fail; it is called now and then.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    streams: list[_Open] = []
    started = 0
    while started < num_requests or streams:
        if started < num_requests and len(streams) < MAX_OPEN and (not streams or rng.random() < 0.4):
            index = rng.randrange(len(kinds))
            started += 1
            try:
                streams.append(_Open(index, open_stream(engine, kinds[index])))
            except MediaError:
                outcome.refused += 1
                assert kinds[index].broken
            continue
        if arm_fault is not None and rng.random() < 0.01:
            arm_fault(rng)
        chosen = rng.choice(streams)
        if rng.random() < cancel / 10:
            chosen.stream.close()
            outcome.cancelled += 1
            streams.remove(chosen)
            continue
        try:
            piece = next(chosen.stream)
        except StepError as error:
            if not isinstance(error.__cause__, Fault):
                raise
            outcome.faulted += 1
            streams.remove(chosen)
            continue
        chosen.texts[piece.choice] = chosen.texts.get(piece.choice, "") + piece.text
        if piece.reply is None:
            continue
        streams.remove(chosen)
        outcome.finished += 1
        if not same_answers(answers_of(piece.reply), expected[chosen.index]):
            outcome.wrong.append(f"kind {chosen.index}: {answers_of(piece.reply)}, alone {expected[chosen.index]}")
        texts = [chosen.texts.get(choice, "") for choice in range(len(piece.reply.choices))]
        if texts != [choice.text for choice in piece.reply.choices]:
            outcome.wrong.append(f"kind {chosen.index}: the pieces do not add up to the texts")
    return outcome


def check_nothing_is_left(engine: Engine) -> None:
    """Checks that no request, sequence or block is held, and that the caches' own counts add up."""
    blocks, stats = engine.cache.blocks, engine.stats()
    blocks.check_invariants()
    assert blocks.num_sequences == 0
    assert stats["kv_blocks_used"] == stats["running"] == stats["waiting"] == 0
    assert blocks.num_available_blocks == blocks.num_blocks
    assert stats["visual_cache_bytes"] <= engine.options.visual_cache_bytes


@contextmanager
def faults(engine: Engine) -> Iterator[Callable[[random.Random], None]]:
    """Yields a function that lets the next vision pass, step or logits call raise `Fault`, before or after its work."""
    armed: list[str] = []
    model = engine.model
    originals = {name: getattr(model, name) for name in ("encode_tiles", "run_step", "logits")}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name in armed:
                armed.remove(name)
                if np.random.default_rng(len(armed)).random() < 0.5:
                    originals[name](*args)
                raise Fault(name)
            return originals[name](*args)

        return call

    for name in originals:
        setattr(model, name, wrap(name))
    try:
        yield lambda rng: armed.append(rng.choice(list(originals)))
    finally:
        for name in originals:
            delattr(model, name)


def tiny_pool_bytes(num_blocks: int, block_size: int = 16, **options: Any) -> int:
    """Returns the bytes of a KV cache with that many blocks for the tiny checkpoint."""
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32", **ALONE, **options) as engine:
        return num_blocks * block_size * (engine.memory.block_bytes // engine.memory.block_size)


torch.set_num_threads(1)
