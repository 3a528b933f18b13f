"""`POST /v1/responses`: the part of that interface that keeps no state on the server."""

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from msgspec import Raw

from internvl_rt.engine.reply import Piece, Reply
from internvl_rt.server.answer import Json, Shown, count_reasoning, logprobs_of, new_id
from internvl_rt.server.ask import Ask, Asking
from internvl_rt.server.body import parse
from internvl_rt.server.call import Call
from internvl_rt.server.gate import read_body
from internvl_rt.server.items import messages_of
from internvl_rt.server.protocol import ChatRequest, Message, ResponsesRequest, encode, not_served
from internvl_rt.server.reader import Delta
from internvl_rt.server.service import Service

_LOGPROBS = "message.output_text.logprobs"


async def responses(service: Service, call: Call) -> None:
    """Answers an input, whole or as a stream of events."""
    request = parse(await read_body(service, call), ResponsesRequest)
    service.check_model(request.model)
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(request, name):
            raise not_served("this server keeps no answers; send the whole input each time", name)
    ask = await ask_of(service.asking, request)
    call.media_places = ask.conversation.media_places
    given: Json = {
        "cache_salt": service.salt(call, request.cache_salt),
        "timeout_s": service.timeout_s(request.timeout_s),
        "request_id": call.id,
        "think": False,  # the messages end with the beginning of an answer that reasons
    }
    output = _Output(service, call, ask, request)
    is_stream = bool(request.stream)
    del request  # the encoded pictures are with the engine from here on
    async with aclosing(service.engine.stream(ask.conversation.messages, ask.params, **given)) as pieces:
        if is_stream:
            await call.stream(output.events(pieces))
            return
        async for piece in pieces:
            deque(output.take(piece), maxlen=0)  # the events are of no use, the items are
    assert output.reply is not None, "a stream ends with its reply"
    await call.send_json(output.response(), headers=service.timings_header(call, output.reply))


async def ask_of(asking: Asking, request: ResponsesRequest) -> Ask:
    """Reads a request as one for chat. Raises ApiError."""
    messages, places = messages_of(request.input)
    if request.instructions:
        messages, places = [Message("system", request.instructions), *messages], ["instructions", *places]
    if all(message.role in ("system", "developer") for message in messages):  # some clients probe so
        messages, places = [*messages, Message("user", "")], [*places, "input"]
    wants_logprobs = _LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    chat = ChatRequest(
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        logprobs=wants_logprobs,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        response_format=request.text.format if request.text else None,
        tools=[tool for tool in request.tools or () if tool.type == "function"],  # others are the caller's own
        tool_choice=request.tool_choice if request.tools else None,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        metadata=request.metadata,
    )
    return await asking.chat(chat, places)


class _Output:
    """The output items of one answer while it grows, and the events that say so. Items follow one another."""

    def __init__(self, service: Service, call: Call, ask: Ask, request: ResponsesRequest) -> None:
        self._service, self._call, self._ask = service, call, ask
        self._reader = ask.conversation.reader()
        self._shown = Shown(service.core, service.end_ids(ask.params), ask.params)
        self._items: list[Json] = []
        self._logprobs: list[Raw] = []  # of the text that is growing
        self._number = 0
        self.reply: Reply | None = None
        params, tools = ask.params, request.tools or []
        self._head: Json = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": request.instructions,
            "metadata": request.metadata or {},
            "model": service.names[0],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_output_tokens": request.max_output_tokens,
            "tool_choice": request.tool_choice or "auto",
            "tools": [_tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in tools if tool.name],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def response(self) -> Json:
        """Returns the response as far as it has come."""
        reply = self.reply
        is_cut = reply is not None and reply.finish_reason != "stop"
        status = "in_progress" if reply is None else "incomplete" if is_cut else "completed"
        details = {"reason": "max_output_tokens"} if is_cut else None
        made = {**self._head, "status": status, "incomplete_details": details, "output": self._items, "usage": None}
        if reply is not None:
            made |= {"usage": self._usage(reply), **self._service.timings(self._call, reply)}
        return made

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[bytes, None]:
        """Yields the events of a stream; those of a piece are one, so that they are sent together."""
        made = [self._event(f"response.{kind}", response=self.response()) for kind in ("created", "in_progress")]
        async for piece in pieces:
            made += self.take(piece)
            if piece.reply is not None:
                response = self.response()
                made.append(self._event(f"response.{response['status']}", response=response))
            if made:
                yield b"".join(made)
            made = []

    def take(self, piece: Piece) -> Iterator[bytes]:
        """Adds a piece of the answer to the items; yields the events."""
        self._logprobs += logprobs_of(piece.tokens, self._service.core.tokenizer, self._shown)
        deltas = self._reader.push(piece.text, piece.reasoning)
        if piece.reply is not None:
            deltas += self._reader.finish()
        for delta in deltas:
            yield from self._grow(delta)
        if piece.reply is not None:
            if not self._items:
                yield from self._open("message", "")
            self.reply = piece.reply
            self._service.answered(self._call, piece.reply, self._ask.params)
            yield from self._close("completed" if piece.reply.finish_reason == "stop" else "incomplete")

    def _grow(self, delta: Delta) -> Iterator[bytes]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(delta.kind, "function_call")
        if delta.kind == "call" or not self._items or self._items[-1]["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind, delta.text)
        item = self._items[-1]
        if delta.kind == "call":
            return
        if kind == "function_call":
            item["arguments"] += delta.text
            yield self._of_item("response.function_call_arguments.delta", delta=delta.text)
            return
        item["content"][0]["text"] += delta.text
        if kind == "reasoning":
            yield self._of_item("response.reasoning_text.delta", content_index=0, delta=delta.text)
        else:
            logprobs, self._logprobs = self._logprobs, []
            item["content"][0]["logprobs"] += logprobs
            yield self._of_item("response.output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs)

    def _open(self, kind: str, name: str) -> Iterator[bytes]:
        item: Json = {"id": new_id({"message": "msg_", "reasoning": "rs_"}.get(kind, "fc_")), "type": kind}
        item["status"] = "in_progress"
        if kind == "function_call":
            item |= {"call_id": new_id("call_"), "name": name, "arguments": ""}
        else:
            item["content"] = []
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        if kind != "function_call":
            item["content"].append(_text_part() if kind == "message" else {"type": "reasoning_text", "text": ""})
            if kind == "message":
                yield self._of_item("response.content_part.added", content_index=0, part=item["content"][0])

    def _close(self, status: str) -> Iterator[bytes]:
        """Ends the item that is growing, if there is one."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._of_item("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        elif item["type"] == "reasoning":
            yield self._of_item("response.reasoning_text.done", content_index=0, text=item["content"][0]["text"])
        else:
            part = item["content"][0]
            part["logprobs"] += self._logprobs
            self._logprobs = []
            yield self._of_item(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, kind: str, **facts: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **facts)

    def _event(self, kind: str, **facts: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **facts}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(event) + b"\n\n"

    def _usage(self, reply: Reply) -> Json:
        usage = reply.usage
        reasoning = count_reasoning(reply, self._service.core, thinks=self._ask.conversation.thinks)
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage.total_tokens,
        }


def _text_part() -> Json:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _tool(name: str, description: str | None, parameters: Json | None, strict: bool | None) -> Json:
    described = {"name": name, "description": description, "parameters": parameters, "strict": bool(strict)}
    return {"type": "function", **described}
