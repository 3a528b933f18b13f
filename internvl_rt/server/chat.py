"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from internvl_rt.engine.reply import Piece
from internvl_rt.server.answer import (
    Json,
    Shown,
    count_reasoning,
    finish_reason,
    logprobs_of,
    message_of,
    new_id,
    usage_of,
)
from internvl_rt.server.ask import Ask
from internvl_rt.server.body import parse
from internvl_rt.server.call import Call
from internvl_rt.server.gate import read_body
from internvl_rt.server.protocol import ChatRequest, encode
from internvl_rt.server.reader import Delta
from internvl_rt.server.service import Service


async def chat(service: Service, call: Call) -> None:
    """Answers a conversation, whole or as a stream."""
    request = parse(await read_body(service, call), ChatRequest)
    service.check_model(request.model)
    ask = await service.asking.chat(request)
    call.media_places = ask.conversation.media_places
    given: Json = {
        "v2pe_delta": ask.v2pe_delta,
        "cache_salt": service.salt(call, request.cache_salt),
        "timeout_s": service.timeout_s(request.timeout_s),
        "request_id": call.id,
        "think": False,  # the messages end with the beginning of an answer that reasons
    }
    wants_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
    is_stream = bool(request.stream)
    del request  # the encoded pictures are with the engine from here on
    if is_stream:
        chunks = _Chunks(service, call, ask, wants_usage=wants_usage)
        async with aclosing(service.engine.stream(ask.conversation.messages, ask.params, **given)) as pieces:
            await call.stream(chunks.of(pieces))
        return
    reply = await service.engine.chat(ask.conversation.messages, ask.params, **given)
    service.answered(call, reply, ask.params)
    choices: list[Json] = []
    end_ids = service.end_ids(ask.params)
    for index, choice in enumerate(reply.choices):
        reader = ask.conversation.reader()
        message = message_of([*reader.push(choice.text, choice.reasoning or ""), *reader.finish()])
        logprobs = None
        if choice.logprobs is not None:
            shown = Shown(service.core, end_ids, ask.params)
            content = logprobs_of(choice.logprobs, service.core.tokenizer, shown)
            logprobs = {"content": content, "refusal": None}
        reason = finish_reason(choice, reader)
        choices.append({"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs})
    reasoning = count_reasoning(reply, service.core, thinks=ask.conversation.thinks)
    answer = {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.names[0],
        "choices": choices,
        "usage": usage_of(reply.usage, reasoning),
        "system_fingerprint": None,
        "service_tier": None,
    }
    if ask.metadata:
        answer["metadata"] = ask.metadata
    await call.send_json(answer, headers=service.timings_header(call, reply))


class _Chunks:
    """Makes the chunks of one stream. All of them have one id, time and model, which are written once."""

    def __init__(self, service: Service, call: Call, ask: Ask, *, wants_usage: bool) -> None:
        self._service, self._call, self._ask = service, call, ask
        self._wants_usage, end_ids = wants_usage, service.end_ids(ask.params)
        self._readers = [ask.conversation.reader() for _ in range(ask.params.n)]
        self._shown = [Shown(service.core, end_ids, ask.params) for _ in range(ask.params.n)]
        head = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.names[0],
            "system_fingerprint": None,
        }
        self._head = b"data: " + encode(head)[:-1]
        self._tail = (b',"usage":null' if wants_usage else b"") + b"}\n\n"
        texts = (self._chunk(index, b'{"content":""}').split(b'""') for index in range(ask.params.n))
        self._around_text = [(before, after) for before, after in texts]  # of each answer's chunk with a text

    async def of(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[bytes, None]:
        """Yields events; those of a piece are one, so that they are sent together."""
        last_s = 0.0
        async for piece in pieces:
            events: list[bytes] = []
            if last_s == 0.0:
                role = b'{"role":"assistant","content":""}'
                events += [self._chunk(index, role) for index in range(len(self._readers))]
            else:
                self._service.metrics.between_pieces(time.perf_counter() - last_s)
            last_s = time.perf_counter()
            events += self._chunks_of(piece)
            if piece.reply is not None:
                events += self._ends(piece)
            if events:
                yield b"".join(events)

    def _chunks_of(self, piece: Piece) -> list[bytes]:
        deltas = self._readers[piece.choice].push(piece.text, piece.reasoning)
        logprobs: bytes | None = None
        if piece.tokens:
            content = logprobs_of(piece.tokens, self._service.core.tokenizer, self._shown[piece.choice])
            logprobs = encode({"content": content, "refusal": None}) if content else None
        if logprobs is not None and not deltas:
            deltas = [Delta("content", "")]
        return self._deltas(piece.choice, deltas, logprobs)

    def _deltas(self, index: int, deltas: list[Delta], logprobs: bytes | None = None) -> list[bytes]:
        chunks: list[bytes] = []
        for delta in deltas:
            if delta.kind == "content" and logprobs is None:
                before, after = self._around_text[index]
                chunks.append(before + encode(delta.text) + after)
                continue
            chunks.append(self._chunk(index, self._written(delta), logprobs=logprobs))
            logprobs = None
        return chunks

    def _written(self, delta: Delta) -> bytes:
        text = encode(delta.text)
        if delta.kind == "content":
            return b'{"content":' + text + b"}"
        if delta.kind == "reasoning":
            return b'{"reasoning":' + text + b',"reasoning_content":' + text + b"}"
        if delta.kind == "call":
            function = {"name": delta.text, "arguments": ""}
            made = {"index": delta.call, "id": new_id("call_"), "type": "function", "function": function}
            return encode({"tool_calls": [made]})
        return encode({"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]})

    def _chunk(self, index: int, delta: bytes, finish: str | None = None, logprobs: bytes | None = None) -> bytes:
        reason = encode(finish)
        choice = b',"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]'
        return self._head + choice % (index, delta, logprobs or b"null", reason) + self._tail

    def _ends(self, piece: Piece) -> list[bytes]:
        """Returns the last chunks: of each answer, and of the whole request."""
        reply, service = piece.reply, self._service
        assert reply is not None
        service.answered(self._call, reply, self._ask.params)
        events: list[bytes] = []
        for index, (reader, choice) in enumerate(zip(self._readers, reply.choices, strict=True)):
            events += self._deltas(index, reader.finish())
            events.append(self._chunk(index, b"{}", finish_reason(choice, reader)))
        if self._wants_usage:
            reasoning = count_reasoning(reply, service.core, thinks=self._ask.conversation.thinks)
            end: Json = {"choices": [], "usage": usage_of(reply.usage, reasoning)} | service.timings(self._call, reply)
            events.append(self._head + b"," + encode(end)[1:] + b"\n\n")
        return events
