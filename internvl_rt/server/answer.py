"""The parts that answers of several interfaces have in common: token counts, log-probabilities, finish reasons."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Raw

from internvl_rt.engine.core import EngineCore
from internvl_rt.engine.reply import Choice, Reply, Usage
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.thinking import END
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.server.protocol import encode
from internvl_rt.server.reader import AnswerReader, Delta
from internvl_rt.steps.logprobs import TokenLogprob

LEAST_LOGPROB = -9999.0  # JSON has no infinity

Json = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def usage_of(usage: Usage, reasoning_tokens: int = 0) -> Json:
    """Returns the `usage` object, with the standard details."""
    text_tokens = usage.prompt_tokens - usage.image_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "saved_image_tokens": usage.saved_image_tokens,
            "text_tokens": text_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "text_tokens": usage.completion_tokens - reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": usage.accepted_draft_tokens,
            "rejected_prediction_tokens": usage.rejected_draft_tokens,
        },
    }


def count_reasoning(reply: Reply, core: EngineCore, *, thinks: bool) -> int:
    """Counts the tokens of the answers up to the end of their reasoning. thinks: they begin inside <think>."""
    ids = [choice.token_ids for choice in reply.choices]
    if not thinks:
        channels = core.preparer.channels
        return sum(map(channels.count_reasoning, ids)) if channels is not None else 0
    end_id = core.tokenizer.find_token_id(END)
    return sum(each.index(end_id) + 1 if end_id in each else len(each) for each in ids)


def finish_reason(choice: Choice, reader: AnswerReader) -> str:
    """Returns why an answer ended, in OpenAI's words: a timeout is a length that was reached."""
    if choice.finish_reason != "stop":
        return "length"
    return "tool_calls" if reader.num_calls else "stop"


def bytes_of(token_id: int, tokenizer: Tokenizer) -> bytes:
    return tokenizer.token_bytes.get(token_id, b"")


def text_of(token_id: int, tokenizer: Tokenizer) -> str:
    return bytes_of(token_id, tokenizer).decode("utf-8", "replace")


class Shown:
    """Says of each token of one answer, in turn, whether it is a part of what the client reads."""

    def __init__(self, core: EngineCore, end_ids: frozenset[int], params: SamplingParams) -> None:
        """end_ids: of the tokens that end an answer."""
        channels = core.preparer.channels
        self._reader = channels.reader(()) if channels is not None and params.skip_special_tokens else None
        self._end_ids = end_ids

    def __call__(self, token_id: int) -> bool:
        part = "text" if self._reader is None else self._reader.push(token_id)
        return part is not None and token_id not in self._end_ids


def logprobs_of(tokens: Iterable[TokenLogprob], tokenizer: Tokenizer, shown: Callable[[int], bool]) -> list[Raw]:
    """Returns log-probabilities, as JSON, of the tokens that are shown.

    An answer may have 100,000 of them with 20 others each, and no other request goes on while they are written.
    """
    spelled: dict[int, bytes] = {}  # the begun object of each token

    def entry(token_id: int, logprob: float) -> bytes:
        begun = spelled.get(token_id)
        if begun is None:
            data = bytes_of(token_id, tokenizer)
            begun = encode({"token": data.decode("utf-8", "replace"), "bytes": list(data)})[:-1]
            spelled[token_id] = begun
        return b'%b,"logprob":%b' % (begun, encode(max(logprob, LEAST_LOGPROB)))

    def written(each: TokenLogprob) -> bytes:
        top = b",".join([entry(*other) + b"}" for other in each.top])
        return b'%b,"top_logprobs":[%b]}' % (entry(each.token_id, each.logprob), top)

    return [Raw(written(each)) for each in tokens if shown(each.token_id)]


def message_of(deltas: Sequence[Delta]) -> Json:
    """Puts the parts of a whole answer into a message."""
    texts = {kind: "".join(each.text for each in deltas if each.kind == kind) for kind in ("content", "reasoning")}
    calls: list[Json] = []
    for delta in deltas:
        if delta.kind == "call":
            function = {"name": delta.text, "arguments": ""}
            calls.append({"id": new_id("call_"), "type": "function", "function": function})
        elif delta.kind == "arguments":
            calls[delta.call]["function"]["arguments"] += delta.text
    message: Json = {"role": "assistant", "content": texts["content"] or (None if calls else ""), "refusal": None}
    if texts["reasoning"]:
        message |= {"reasoning": texts["reasoning"], "reasoning_content": texts["reasoning"]}
    return message | ({"tool_calls": calls} if calls else {})
