"""Makes a chat request what the engine takes: messages, sampling parameters, and how to read the answer."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.inputs import thinking
from internvl_rt.inputs.sampling_params import MAX_NEW_TOKENS, SamplingParams
from internvl_rt.server.fault import refusal
from internvl_rt.server.media import is_media, media_place, read_media
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import ChatRequest, MediaLimits, Message, Part, Sampled, encode, not_served
from internvl_rt.server.reader import AnswerReader
from internvl_rt.server.remote import Fetcher
from internvl_rt.server.thinking import wants_thinking
from internvl_rt.server.tools import Tools, read_tools, text_of_calls, text_of_result

_TEXTS = {"text", "input_text", "output_text"}
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_RANGES = {"temperature": (0, 2), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}  # OpenAI's
_OPERATOR = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # has a meaning in a regular expression
_PASSED = (
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "top_k", "min_p", "seed"),
    *("min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens"),
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the engine, and what the end of the prompt means for the answer."""

    messages: list[dict[str, Any]]
    media_places: tuple[str, ...] = ()  # where in the request its pictures and videos stand
    thinks: bool = False
    tools: Tools | None = None

    def reader(self) -> AnswerReader:
        """Returns what reads one answer."""
        calls, parallel = self.tools is not None, self.tools is None or self.tools.parallel
        return AnswerReader(thinks=self.thinks, calls=calls, parallel=parallel)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for answers, for the engine."""

    conversation: Conversation
    params: SamplingParams
    v2pe_delta: float | str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Asking:
    """Reads requests for one server: its options, its model and what it may fetch."""

    def __init__(self, options: ServerOptions, config: ModelConfig, fetcher: Fetcher, max_model_len: int) -> None:
        self.options, self.config, self._fetcher, self._max_model_len = options, config, fetcher, max_model_len

    async def chat(self, request: ChatRequest, places: Sequence[str] | None = None) -> Ask:
        """Reads a chat request. Raises ApiError, before any picture is decoded.

        places: of its messages in what the client has sent, for errors.
        """
        _refuse_unserved(request)
        tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, self.options.max_tools)
        effort = request.reasoning_effort
        begun = is_begun(request.messages)
        thinks = wants_thinking(effort, request.chat_template_kwargs, self.config, "reasoning_effort", begun=begun)
        top = request.top_logprobs
        if top is not None and not request.logprobs:
            raise refusal("top_logprobs: it needs logprobs true", "top_logprobs", "invalid_value")
        self._limit("top_logprobs", top, self.options.max_logprobs)
        if tools is not None:
            self._limit("tools", len(encode(tools.functions)), self.options.max_schema_bytes, what="bytes")
        form = self._form(request, tools, thinks)
        if request.max_completion_tokens is not None:
            request.max_tokens = request.max_completion_tokens
        params = self.params(request, logprobs=(top or 0) if request.logprobs else None, **form)
        conversation = await self.conversation(
            request.messages, tools, thinks=thinks, places=places, limits=request.mm_processor_kwargs
        )
        metadata = request.metadata or {}
        return Ask(conversation, params, request.v2pe_delta, metadata)

    def params(self, request: Sampled, *, prompts: int = 1, **more: Any) -> SamplingParams:
        """Reads what requests for answers have in common. Raises ApiError, or RequestError that names a field.

        prompts: of the request, which share the limit of its tokens.
        """
        options, n = self.options, 1 if request.n is None else request.n
        self._limit("n", n, options.max_n, least=1)
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self._limit("stop", len(stops), options.max_stops, what="stop strings")
        self._limit("logit_bias", len(request.logit_bias or ()), options.max_logit_biases, what="entries")
        given = request.max_tokens
        if given is not None:
            self._limit("max_tokens", given, options.max_tokens or MAX_NEW_TOKENS, least=1)
        share = options.max_request_tokens // (n * prompts)
        if given is not None and min(given, self._max_model_len) > share:
            raise refusal(
                f"max_tokens: {n * prompts} answers of {given:,} tokens are more than the "
                f"{options.max_request_tokens:,} that a request may have; lower one of them",
                "max_tokens",
                "limit_exceeded",
            )
        most = given or options.default_max_tokens or options.max_tokens or self._max_model_len
        for name, (least, most_value) in _RANGES.items():
            value = getattr(request, name)
            if value is not None and not least <= value <= most_value:
                raise refusal(f"{name}: expected {least} to {most_value}, got {value:g}", name, "invalid_value")
        passed = {name: value for name in _PASSED if (value := getattr(request, name)) is not None}
        return SamplingParams(
            max_tokens=max(1, min(most, share, MAX_NEW_TOKENS)),
            temperature=options.default_temperature if request.temperature is None else request.temperature,
            top_p=options.default_top_p if request.top_p is None else request.top_p,
            n=n,
            stop=stops,
            include_stop=bool(request.include_stop_str_in_output),
            **passed,
            **more,
        )

    async def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        thinks: bool = False,
        places: Sequence[str] | None = None,
        limits: MediaLimits | None = None,
    ) -> Conversation:
        """Makes messages for the engine: one system message, and user and assistant in turns as they come.

        System and developer messages are joined at the front, tools are described after them, and what tools returned
        goes into user messages, several in a row into one.
        """
        self._limit("messages", len(messages), self.options.max_messages, least=1)
        system: list[str] = []
        made: list[dict[str, Any]] = []
        results: list[tuple[dict[str, Any], list[str]]] = []  # what tools returned, with the message it goes into
        role = ""  # of the message before
        media_places: list[str] = []
        for index, message in enumerate(messages):
            where = places[index] if places else f"messages[{index}]"
            if message.role not in _ROLES:
                expected = ", ".join(sorted(_ROLES))
                raise refusal(f"{where}.role: expected one of {expected}, got {message.role!r:.60}", f"{where}.role")
            before, role = role, message.role
            if message.role == "user":
                media_places += _media_places(message, where)
                self._limit(f"{where}.content", len(media_places), self.options.max_media, what="pictures and videos")
                made.append({"role": "user", "content": await self._parts(message, where, limits or MediaLimits())})
                continue
            text = _text_of(message, where)
            if message.role in ("system", "developer"):
                system.append(text)
            elif message.role == "assistant":
                calls = text_of_calls(message.tool_calls or (), f"{where}.tool_calls")
                made.append({"role": "assistant", "content": "\n".join(filter(None, (text, calls)))})
            else:
                if before != "tool":
                    made.append({"role": "user"})
                    results.append((made[-1], []))
                results[-1][1].append(text_of_result(text))
        for turn, texts in results:
            turn["content"] = "\n".join(texts)
        if all(message["role"] != "user" for message in made):
            raise refusal("messages: expected a message of the user, got none; send the question", "messages")
        begun = made[-1]["role"] == "assistant"
        if thinks and begun:
            raise refusal("messages: an answer that is begun cannot be thought about; turn one off", "messages")
        if thinks:
            asking, opening = thinking.thinking_prompt(self.config, "\n\n".join(system) if system else None)
            system = [] if asking is None else [asking]
            made.append({"role": "assistant", "content": opening})
        if tools is not None:
            system = [*(system or filter(None, [self.config.system_message])), tools.system_text()]
        if system:
            made.insert(0, {"role": "system", "content": "\n\n".join(system)})
        return Conversation(made, tuple(media_places), thinks, tools)

    async def _parts(self, message: Message, where: str, limits: MediaLimits) -> str | list[dict[str, Any]]:
        content = message.content
        if content is None:
            raise refusal(
                f"{where}.content: expected text or parts, got null; send the question",
                f"{where}.content",
                "invalid_type",
            )
        if isinstance(content, str):
            return content
        parts: list[dict[str, Any]] = []
        for index, part in enumerate(content):
            place = f"{where}.content[{index}]"
            if isinstance(part, Part) and is_media(part):
                parts.append(await read_media(part, place, self._fetcher, limits, self.options.max_frames))
            else:
                parts.append({"type": "text", "text": _text_of_part(part, place)})
        return parts or ""

    def _form(self, request: ChatRequest, tools: Tools | None, thinks: bool) -> dict[str, Any]:
        """Returns the grammar of the answer as sampling parameters."""
        form, after = request.response_format, {"grammar_after": thinking.END} if thinks else {}
        structured = {kind: getattr(request, f"guided_{kind}") for kind in ("json", "regex", "choice")}
        structured |= request.structured_outputs or {}
        if request.structured_outputs is not None or any(value is not None for value in structured.values()):
            if form is not None or tools is not None:
                reason = "neither response_format nor tools can be there too; leave out one of them"
                raise refusal(f"structured_outputs: {reason}", "structured_outputs")
            return {**_structured(structured), **after}
        if form is None or form.type == "text":
            tagged = tools.grammar() if tools else None
            return {"tagged": tagged, **after} if tagged else {}
        if form.type not in ("json_object", "json_schema"):
            raise not_served(
                f"expected text, json_object or json_schema, got {form.type!r:.60}", "response_format.type"
            )
        if tools is not None and tools.required:
            reason = "a required call leaves no other answer; leave out response_format, or choose tools by auto"
            raise refusal(f"response_format: {reason}", "response_format", "invalid_value")
        schema: Any = {"type": "object"}
        if form.type == "json_schema":
            schema = form.schema if form.json_schema is None else form.json_schema.schema
            where = "response_format.json_schema.schema"
            if schema is None:
                raise refusal(f"{where}: expected a JSON schema, got none; send one", where, "invalid_value")
            self._limit(where, len(json.dumps(schema)), self.options.max_schema_bytes, what="bytes")
        return {**({"json_schema": schema} if tools is None else {"tagged": tools.grammar(schema)}), **after}

    def _limit(self, name: str, value: int | None, most: int, *, least: int = 0, what: str = "") -> None:
        if value is not None and not least <= value <= most:
            raise refusal(
                f"{name}: expected {least} to {most:,} {what}".rstrip() + f", got {value:,}", name, "limit_exceeded"
            )


def _structured(given: dict[str, Any]) -> dict[str, Any]:
    """Reads vLLM's `structured_outputs`; its first part that is given counts."""
    kind, value = next(((kind, value) for kind, value in given.items() if value is not None), ("", None))
    if kind == "json":
        return {"json_schema": value}
    if kind == "regex":
        return {"regex": value}
    if kind == "choice" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return {"regex": "|".join(_OPERATOR.sub(r"\\\g<0>", each) for each in value)}
    raise not_served("expected one of json, regex and choice (a list of texts)", "structured_outputs")


def is_begun(messages: Sequence[Message]) -> bool:
    """Says whether the messages of a request end with the beginning of the answer."""
    return bool(messages) and messages[-1].role == "assistant"


def _refuse_unserved(request: ChatRequest) -> None:
    if request.functions is not None or request.function_call is not None:
        name = "functions" if request.functions is not None else "function_call"
        raise not_served("it is not served, as it has long been replaced; send tools and tool_choice", name)
    if "audio" in (request.modalities or ()):
        raise not_served("audio is not served; leave it out", "modalities")


def _media_places(message: Message, where: str) -> list[str]:
    parts = message.content if isinstance(message.content, list) else []
    named = ((part, f"{where}.content[{index}]") for index, part in enumerate(parts))
    return [media_place(part, place) for part, place in named if isinstance(part, Part) and is_media(part)]


def _text_of(message: Message, where: str) -> str:
    """Returns a content that is text alone, or null."""
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text_of_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _text_of_part(part: Part | str, where: str) -> str:
    if isinstance(part, str):
        return part
    if part.type in _TEXTS and part.text is not None:
        return part.text
    if part.type == "input_json" and part.data is not None:
        return encode(part.data).decode()
    if part.type == "refusal":
        return part.refusal or ""
    if part.type in _TEXTS:
        raise refusal(f"{where}.text: expected a string, got none; send the text", f"{where}.text", "invalid_type")
    if is_media(part):
        raise refusal(f"{where}: pictures and videos belong into user messages", where, "unsupported_content_part")
    raise refusal(
        f"{where}: parts of type {part.type!r:.60} are not served; send text, image_url or video_url",
        where,
        "unsupported_content_part",
    )
