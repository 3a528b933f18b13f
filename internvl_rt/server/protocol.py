"""The bodies of requests, as typed values. Unknown fields are ignored, and so is what only asks for other services.

What a field may hold beyond its type is checked where it is used, so that errors name the limit.
"""

from typing import Any

import msgspec
from msgspec import Raw, Struct

from internvl_rt.server.fault import ApiError, refusal

Json = dict[str, Any]
NOTHING = Raw(b"null")


class Part(Struct, dict=True):
    """A part of a message's content: in the chat interface, and (input_*, output_text) in that of responses."""

    type: str
    text: str | None = None
    refusal: str | None = None
    data: Any = None  # of input_json
    image_url: Raw = NOTHING  # a URL, or an object with it: `media` reads them, since they may be very long
    video_url: Raw = NOTHING
    detail: str | None = None
    max_tiles: int | None = None
    num_frames: int | None = None
    bound: list[float] | None = None

    @property
    def file(self) -> bytes | None:
        """The data of a long data URL, which `body` has decoded. No field of JSON sets it."""
        return self.__dict__.get("file")


Content = str | list[Part | str] | None


class Function(Struct):
    name: str
    arguments: str | Json = ""


class ToolCall(Struct):
    function: Function
    id: str | None = None
    type: str = "function"


class Message(Struct):
    role: str
    content: Content = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(Struct):
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Struct):
    type: str
    function: ToolFunction | None = None
    name: str | None = None  # from here on as in /v1/responses, whose tools are flat
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class JsonSchema(Struct):
    name: str = ""
    schema: Json | bool | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    type: str
    json_schema: JsonSchema | None = None
    name: str = ""  # from here on as in /v1/responses
    schema: Json | bool | None = None
    strict: bool | None = None


class MediaLimits(Struct):
    """For all pictures and videos of a request that say nothing themselves."""

    max_dynamic_patch: int | None = None  # tiles of a picture
    num_frames: int | None = None  # of a video


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(Struct):
    """The fields that requests for answers have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    timeout_s: float | None = None


class ChatRequest(Sampled):
    messages: list[Message] = msgspec.field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Json | None = None  # vLLM's: one of json, regex, choice
    guided_json: Any = None  # the same by their older names
    guided_regex: Any = None
    guided_choice: Any = None
    tools: list[Tool] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Json] | None = None
    function_call: str | Json | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Json | None = None
    mm_processor_kwargs: MediaLimits | None = None
    metadata: Json | None = None
    v2pe_delta: float | str | None = None


class CompletionRequest(Sampled):
    prompt: str | list[str | int | list[int]] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class Item(Struct):
    """An item of the input of /v1/responses and /v1/decisions: a message, a call, or what a call returned."""

    type: str | None = None
    role: str | None = None
    content: Content = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content = None


Input = str | list[Item] | None


class TextForm(Struct):
    format: ResponseFormat | None = None


class Reasoning(Struct):
    effort: str | None = None


class ResponsesRequest(Struct):
    input: Input = None
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    metadata: Json | None = None
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    background: bool | None = None
    seed: int | None = None
    cache_salt: str | None = None
    timeout_s: float | None = None


class Value(Struct):
    value: str | bool
    description: str | None = None


class Level(Struct):
    label: str
    description: str | None = None


class Question(Struct):
    type: str
    instructions: str | list[Part]
    name: str | None = None
    choices: list[Value] | None = None
    levels: list[Level] | None = None


class DecisionsRequest(Struct):
    questions: list[Question]
    input: Input = None
    model: str | None = None
    cache_salt: str | None = None
    timeout_s: float | None = None


class TokenizeRequest(Struct):
    messages: list[Message] | None = None
    prompt: str | None = None
    model: str | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct):
    tokens: list[int]
    model: str | None = None


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def not_served(what: str, param: str) -> ApiError:
    """Makes the error for a part of OpenAI's interface that this server does not have."""
    return refusal(f"{param}: {what}", param, "unsupported_parameter")
