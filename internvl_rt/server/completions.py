"""`POST /v1/completions`: texts without a template, and the log-probabilities of given ones."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from internvl_rt.engine.reply import Choice, Piece, Reply, Usage
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.server.answer import LEAST_LOGPROB, Json, new_id, text_of, usage_of
from internvl_rt.server.body import parse
from internvl_rt.server.call import Call
from internvl_rt.server.fault import refusal
from internvl_rt.server.gate import read_body
from internvl_rt.server.protocol import CompletionRequest, encode, not_served
from internvl_rt.server.service import Service
from internvl_rt.steps.logprobs import TokenLogprob

DEFAULT_TOKENS = 16  # of OpenAI's interface
MAX_LOGPROBS = 5


async def completions(service: Service, call: Call) -> None:
    """Continues prompts, whole or as a stream; with `echo` and `logprobs` it scores them."""
    request = parse(await read_body(service, call), CompletionRequest)
    service.check_model(request.model)
    _refuse_unserved(request)
    prompts = prompts_of(request.prompt, service.options.max_prompts)
    params = _params(service, request, len(prompts))
    given: Json = {
        "cache_salt": service.salt(call, request.cache_salt),
        "timeout_s": service.timeout_s(request.timeout_s),
        "request_id": call.id,
    }
    answers = _Answers(service, params, request)
    if request.stream:
        streams = [service.engine.stream(prompt, params, **given) for prompt in prompts]
        await call.stream(answers.chunks(call, prompts, streams))
        return
    ids = [(await service.engine.describe(prompt)).prompt.token_ids for prompt in prompts] if answers.echoes else []
    replies = await _all(service.engine.chat(prompt, params, **given) for prompt in prompts)
    for reply in replies:
        service.answered(call, reply, params)
    choices: list[Json] = []
    for number, reply in enumerate(replies):
        choices += [answers.choice(number, index, reply, ids[number] if ids else ()) for index in range(params.n)]
    answer = {**answers.head, "choices": choices, "usage": usage_of(sum_of(replies))}
    await call.send_json(answer, headers=service.timings_header(call, replies[0]))


def sum_of(replies: Sequence[Reply]) -> Usage:
    """Adds up the tokens of several requests."""
    names = Usage.__dataclass_fields__
    return Usage(**{name: sum(getattr(reply.usage, name) for reply in replies) for name in names})


class _Answers:
    """Makes the choices and chunks of one request."""

    def __init__(self, service: Service, params: SamplingParams, request: CompletionRequest) -> None:
        self._service, self._params = service, params
        self._tokenizer, self._end_ids = service.core.tokenizer, service.end_ids(params)
        self.echoes, self._wants_logprobs = bool(request.echo), request.logprobs is not None
        self._draws = request.max_tokens != 0  # with 0 the prompt alone is asked for
        options = request.stream_options
        self._wants_usage = options is not None and bool(options.include_usage)
        self.head: Json = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.names[0],
            "system_fingerprint": None,
        }

    def choice(self, number: int, index: int, reply: Reply, prompt_ids: Sequence[int]) -> Json:
        """Makes the answer `index` to prompt `number`. prompt_ids: of the prompt, if it is part of the answer."""
        choice = reply.choices[index]
        text, tokens = (choice.text, list(choice.logprobs or ())) if self._draws else ("", [])
        logprobs = self._logprobs(tokens) if self._wants_logprobs else None
        if prompt_ids:
            prompt = self._tokenizer.decode(prompt_ids, skip_specials=False)
            text = prompt + text
            if self._wants_logprobs:
                first, *others = reply.prompt_logprobs or (None,)
                scored = [first or TokenLogprob(prompt_ids[0], math.nan), *filter(None, others)]
                logprobs = self._logprobs([*scored, *tokens])
        return self._entry(number * self._params.n + index, text, self._reason(choice), logprobs)

    async def chunks(
        self, call: Call, prompts: Sequence[RawPrompt], streams: Sequence[AsyncGenerator[Piece, None]]
    ) -> AsyncGenerator[bytes, None]:
        """Yields the events of several streams as they come."""
        head = b"data: " + encode(self.head)[:-1]
        tail = (b',"usage":null' if self._wants_usage else b"") + b"}\n\n"
        if self.echoes:
            texts = [self._text_of(prompt) for prompt in prompts for _ in range(self._params.n)]
            entries = [self._entry(index, text, None, None) for index, text in enumerate(texts)]
            yield b"".join(head + b',"choices":' + encode([entry]) + tail for entry in entries)
        offsets: dict[int, int] = {}
        replies: list[Reply] = []
        async with aclosing(_merged(streams)) as merged:
            async for number, piece in merged:
                at = number * self._params.n + piece.choice
                if self._draws and (piece.text or piece.tokens):
                    logprobs = None
                    if self._wants_logprobs:
                        logprobs = self._logprobs(piece.tokens, offsets.get(at, 0))
                    offsets[at] = offsets.get(at, 0) + len(piece.text)
                    yield head + b',"choices":' + encode([self._entry(at, piece.text, None, logprobs)]) + tail
                if piece.reply is not None:
                    self._service.answered(call, piece.reply, self._params)
                    replies.append(piece.reply)
                    ends = enumerate(map(self._reason, piece.reply.choices), number * self._params.n)
                    entries = [self._entry(index, "", reason, None) for index, reason in ends]
                    yield b"".join(head + b',"choices":' + encode([entry]) + tail for entry in entries)
        if self._wants_usage:
            end = {"choices": [], "usage": usage_of(sum_of(replies))} | self._service.timings(call, replies[0])
            yield head + b"," + encode(end)[1:] + b"\n\n"

    def _reason(self, choice: Choice) -> str:
        return choice.finish_reason if self._draws else "length"

    def _entry(self, index: int, text: str, finish: str | None, logprobs: Json | None) -> Json:
        reason = "length" if finish == "timeout" else finish
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _text_of(self, prompt: RawPrompt) -> str:
        if isinstance(prompt.content, str):
            return prompt.content
        return self._tokenizer.decode(prompt.content, skip_specials=False)

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int = 0) -> Json:
        """Makes the object of parallel lists. The first token of a prompt has no log-probability, which is NaN here."""
        lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            if token.token_id in self._end_ids:
                continue
            text, is_known = text_of(token.token_id, self._tokenizer), not math.isnan(token.logprob)
            top = {text_of(token_id, self._tokenizer): max(value, LEAST_LOGPROB) for token_id, value in token.top}
            lists["tokens"].append(text)
            lists["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB) if is_known else None)
            lists["top_logprobs"].append(top if is_known else None)
            lists["text_offset"].append(offset)
            offset += len(text)
        return lists


def _refuse_unserved(request: CompletionRequest) -> None:
    if request.suffix:
        raise not_served("texts cannot be filled in; leave it out", "suffix")
    if request.best_of not in (None, request.n or 1):
        raise not_served("all answers are returned; leave it out or send the same as n", "best_of")
    if request.stream and request.echo and request.logprobs is not None:
        raise not_served("a stream does not score its prompt; leave out echo, logprobs or stream", "echo")


def _params(service: Service, request: CompletionRequest, num_prompts: int) -> SamplingParams:
    num_top = request.logprobs
    if num_top is not None and not 0 <= num_top <= MAX_LOGPROBS:
        raise refusal(f"logprobs: expected 0 to {MAX_LOGPROBS}, got {num_top}", "logprobs", "limit_exceeded")
    asked = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    scored = num_top if request.echo else None
    common = msgspec.structs.replace(request, max_tokens=1 if asked == 0 and request.echo else asked)
    return service.asking.params(common, prompts=num_prompts, logprobs=num_top, prompt_logprobs=scored)


def prompts_of(given: object, most: int) -> list[RawPrompt]:
    """Reads a text, texts, ids, or lists of ids. Raises ApiError."""
    if isinstance(given, str):
        return [RawPrompt(given)]
    if not isinstance(given, list) or not given:
        raise refusal("prompt: expected a text, token ids, or a list of either; send one", "prompt", "invalid_type")
    if all(isinstance(each, int) for each in given):
        return [RawPrompt(given)]
    if len(given) > most:
        raise refusal(f"prompt: at most {most} prompts are taken, got {len(given)}", "prompt", "limit_exceeded")
    if any(isinstance(each, int) for each in given):
        raise refusal("prompt: expected texts or lists of ids, got ids among them", "prompt", "invalid_type")
    return [RawPrompt(each) for each in given]


async def _all(answers: Iterable[Coroutine[Any, Any, Reply]]) -> list[Reply]:
    """Waits for all answers; the first error cancels the others."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yields the pieces of several streams as they come, with the stream's index."""
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
