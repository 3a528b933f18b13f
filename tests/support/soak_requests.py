"""Requests of every kind for the soak of the server, and what of their answers must always be the same."""

import base64
import io
import json
import zlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from support.load import build_video
from support.raw_http import Answer, Events
from support.serving import SAMPLES

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
DECISIONS, TOKENIZE, DETOKENIZE = "/v1/decisions", "/tokenize", "/detokenize"
STREAMS = (CHAT, COMPLETIONS, RESPONSES)
_TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
_FORM = {"type": "object", "properties": {"digits": {"type": "string", "maxLength": 4}}, "required": ["digits"]}


@dataclass(frozen=True)
class Kind:
    """A request that is sent many times. status and code: of its answer; code is that of an error."""

    name: str
    path: str
    body: Any  # JSON, or bytes
    status: int = 200
    code: str | None = None
    is_cut: bool = False  # by timeout_s: the answer may be any beginning of the one without

    def data(self, *, stream: bool = False) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body | {"stream": stream}).encode()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def asked(text: str, *parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def huge_header() -> bytes:
    """Returns a PNG file of a few bytes whose header promises 60,000 x 60,000 pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", b"\0\0\xea\x60" * 2 + b"\x08\x02\0\0\0"), (b"IDAT", zlib.compress(b"\0" * 999))):
        data += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    return data


def pixel(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def build_kinds(max_body_bytes: int) -> list[Kind]:
    samples = [SAMPLES / f"{digits}.png" for digits in (4719, 31415, 42, 7)]
    files = [path.read_bytes() for path in samples]
    read, text = asked("Read the digits.", part(files[0])), asked("Hello")
    long = {"messages": read, "max_tokens": 60, "ignore_eos": True}
    video = {"type": "video_url", "video_url": {"url": data_url(build_video(1), "video/mp4"), "num_frames": 2}}
    tools = [{"type": "function", "function": _TOOL | {"strict": True}}]
    item = [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(files[1])}]}]
    turns = [*read, {"role": "assistant", "content": "4719"}, *asked("And now?", part(files[2]))]
    questions = [
        {"type": "predicate", "instructions": "There is a 4."},
        {"type": "choice", "instructions": "Which is it?", "choices": [{"value": "4719"}, {"value": "none"}]},
        {"type": "score", "instructions": "How many digits?", "levels": [{"label": "2"}, {"label": "4"}]},
    ]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _FORM}}
    good = [
        *(
            Kind(f"read {path.stem}", CHAT, {"messages": asked("Read the digits.", part(path.read_bytes()))})
            for path in samples
        ),
        Kind("several pictures", CHAT, {"messages": asked("Read.", *map(part, files[:3])), "max_tokens": 20}),
        Kind("turns", CHAT, {"messages": turns, "max_tokens": 20}),
        Kind("text", CHAT, {"messages": text, "max_tokens": 8}),
        Kind("long", CHAT, long),
        Kind("n", CHAT, long | {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12}),
        Kind("ends early", CHAT, {"messages": read, "n": 4, "temperature": 2, "seed": 1, "max_tokens": 30}),
        Kind("logprobs", CHAT, {"messages": read, "logprobs": True, "top_logprobs": 3, "max_tokens": 9}),
        Kind("tools", CHAT, {"messages": read, "tools": tools, "tool_choice": "required", "max_tokens": 40}),
        Kind("schema", CHAT, {"messages": read, "response_format": form, "max_tokens": 30}),
        Kind("stop", CHAT, long | {"stop": ["7"]}),
        Kind("cut", CHAT, long | {"max_tokens": 400, "timeout_s": 0.08}, is_cut=True),
        Kind("one pixel", CHAT, {"messages": asked("?", part(pixel(9))), "max_tokens": 5}),
        Kind("video", CHAT, {"messages": asked("Read.", video), "max_tokens": 6}),
        Kind("completion", COMPLETIONS, {"prompt": "Read the digits", "max_tokens": 12, "logprobs": 2}),
        Kind("completions", COMPLETIONS, {"prompt": ["a", "b c", "Hello"], "max_tokens": 9, "n": 2}),
        Kind("scored", COMPLETIONS, {"prompt": "4719 4719", "echo": True, "max_tokens": 0}),
        Kind("response", RESPONSES, {"input": item, "max_output_tokens": 30}),
        Kind("text response", RESPONSES, {"input": "Hello", "instructions": "Be short.", "max_output_tokens": 9}),
        Kind("decisions", DECISIONS, {"questions": questions, "input": item}),
        Kind("tokenize", TOKENIZE, {"messages": turns}),
        Kind("detokenize", DETOKENIZE, {"tokens": [50, 51, 52]}),
    ]
    broken = asked("Read.", part(files[0][: len(files[0]) // 2]))
    large = b'{"messages": "' + b"x" * max_body_bytes + b'"}'
    wrong = [
        Kind("broken picture", CHAT, {"messages": broken}, 400, "invalid_media"),
        Kind("huge header", CHAT, {"messages": asked("Read.", part(huge_header()))}, 400, "invalid_media"),
        Kind("no picture", CHAT, {"messages": asked("Read.", part(b""))}, 400, "invalid_media"),
        Kind(
            "a URL",
            CHAT,
            {"messages": asked("?", {"type": "image_url", "image_url": "http://x/y"})},
            400,
            "media_not_allowed",
        ),
        Kind("no JSON", CHAT, b'{"messages": [', 400, "invalid_json"),
        Kind("a wrong type", CHAT, {"messages": 7}, 400, "invalid_type"),
        Kind("too deep", CHAT, b'{"metadata": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}", 400, "invalid_json"),
        Kind("too large", CHAT, large, 413, "body_too_large"),
        Kind("too long", CHAT, {"messages": asked("word " * 2000)}, 400, "context_length_exceeded"),
        Kind("n too large", CHAT, long | {"n": 99}, 400, "limit_exceeded"),
        Kind("another model", CHAT, {"messages": text, "model": "other"}, 404, "model_not_found"),
        Kind("no prompt", COMPLETIONS, {}, 400, "invalid_type"),
        Kind("state", RESPONSES, {"input": "x", "previous_response_id": "y"}, 400, "unsupported_parameter"),
        Kind("no question", DECISIONS, {"questions": [], "input": "x"}, 400, "limit_exceeded"),
        Kind("no token", DETOKENIZE, {"tokens": [1 << 40]}, 400, "invalid_value"),
        Kind("nowhere", "/v1/nowhere", {}, 404, "not_found"),
    ]
    return [*good, *wrong]


def told_by(path: str, answer: Answer) -> Any:
    """Returns what an answer tells, the same whether it came whole or as a stream. Raises ValueError."""
    if "event-stream" not in answer.headers.get("content-type", ""):
        return _told(path, answer.json())
    events = Events.read(answer.body)
    failed = next((data["error"] for data in events.data if data.get("error")), None)
    if not events.is_done:
        raise ValueError("a stream ended without [DONE]")
    if failed is not None:
        return {"error": failed}
    if path == RESPONSES:
        last = events.data[-1]
        if [data["sequence_number"] for data in events.data] != list(range(len(events.data))):
            raise ValueError("the events are not in order")
        return _told(path, last["response"])
    choices: dict[int, dict[str, Any]] = {}
    for data in events.data:
        for piece in data["choices"]:
            _add(choices.setdefault(piece["index"], {"finish_reason": None}), piece)
    if unfinished := [index for index, choice in choices.items() if choice["finish_reason"] is None]:
        raise ValueError(f"a stream ended without a reason for the answers {unfinished}")
    return [choices[index] for index in sorted(choices)]


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds a piece of a stream to an answer, as `_choice` has it."""
    if choice["finish_reason"] is not None:
        raise ValueError("a piece after the end of an answer")
    delta = piece.get("delta", piece)
    choice["text"] = choice.get("text", "") + (delta.get("content") or delta.get("text") or "")
    calls = choice.setdefault("calls", [])
    for call in delta.get("tool_calls", ()):
        if "id" in call:
            calls.append([call["function"]["name"], ""])
        calls[call["index"]][1] += call["function"]["arguments"]
    choice.setdefault("logprobs", []).extend(_logprobs(piece))
    choice["finish_reason"] = piece["finish_reason"]


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message", {})
    calls = [[each["function"]["name"], each["function"]["arguments"]] for each in message.get("tool_calls", ())]
    text = choice.get("text", message.get("content")) or ""
    return {"finish_reason": choice["finish_reason"], "text": text, "calls": calls, "logprobs": _logprobs(choice)}


def _logprobs(choice: dict[str, Any]) -> list[Any]:
    given = choice["logprobs"] or {}
    if "tokens" in given:
        return [list(pair) for pair in zip(given["tokens"], given["token_logprobs"], strict=True)]
    return [[each["token"], each["logprob"]] for each in given.get("content") or ()]


def _told(path: str, answer: Any) -> Any:
    if answer.get("error"):
        return {"error": answer["error"]}
    if path in (CHAT, COMPLETIONS):
        return [_choice(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    if path == RESPONSES:
        return [answer["status"], [[part["text"] for part in item["content"]] for item in answer["output"]]]
    return {key: value for key, value in answer.items() if key != "usage"}


def is_same(told: Any, expected: Any) -> bool:
    """Compares what two answers tell: texts exactly, probabilities up to rounding."""
    if isinstance(expected, float) and isinstance(told, float):
        return abs(told - expected) <= 1e-3 * max(1.0, abs(expected))
    if isinstance(expected, dict) and isinstance(told, dict):
        return told.keys() == expected.keys() and all(is_same(told[key], expected[key]) for key in expected)
    if isinstance(expected, list) and isinstance(told, list):
        return len(told) == len(expected) and all(map(is_same, told, expected))
    return bool(told == expected)
