"""The options of the server, which `internvl-rt serve --help` lists, checked once."""

from dataclasses import dataclass

from internvl_rt.errors import RequestError
from internvl_rt.inputs.grammar_source import MAX_GRAMMAR_BYTES
from internvl_rt.inputs.sampling_params import MAX_ANSWERS, MAX_BIASES, MAX_LOGPROBS, MAX_STOPS
from internvl_rt.values import Flag, Integer, Kind, Number, OrNone, Several, Text, read_fields

_SECONDS = Number(0, 86_400, above=True)
_BYTES = Integer(1, 1 << 40)
_NAME = Text(1, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of the server. Raises RequestError that names a value out of range.

    host: the address that is listened on. Others than loopback reach it only if this says so, as 0.0.0.0 does.
    port: 0 is any free one.
    served_model_name: names that requests may give as `model`; the first is the one in answers. By default the last
        part of MODEL.
    api_keys_file: a file with one API key a line; every path but /health, /ready and the page then needs one.
    shared_prefixes: whether requests of different API keys share what was computed for prompts that begin alike. A
        request's time then tells whether somebody else has sent the same picture or text.
    allowed_origins: web pages of these origins, such as https://chat.example, may use the server from a browser.
    page: whether a page to try the model is served at /.
    access_log: whether a line of JSON is written for each request.
    trace: a file for what the engine does, for Perfetto or chrome://tracing; it grows by about 500 bytes a step.
    remote_hosts: hosts that pictures and videos may be fetched from by http and https, without subdomains. By default
        there are none, and pictures come as data: URLs.
    max_remote_bytes: most bytes of a picture or video that is fetched.
    remote_timeout_s: most seconds that fetching one takes.
    max_body_bytes: most bytes of a request's body.
    max_text_bytes: most bytes of a body without its data: URLs. To read JSON holds up all other requests, a second for
        some ten megabytes of short values, and none for a picture.
    max_bodies_bytes: most bytes of the bodies of all requests that are being read or answered.
    max_connections: most connections at a time.
    header_timeout_s: most seconds until the head of a request has arrived.
    body_timeout_s: most seconds until its body has.
    stall_timeout_s: seconds after which a client that does not read what was sent to it is disconnected.
    idle_timeout_s: seconds after which a connection without a request is closed; more than a proxy's own limit.
    keep_alive_s: seconds without an event after which a stream gets a comment, so that no proxy closes it.
    request_timeout_s: most seconds of a request; an answer ends then as far as it has come.
    drain_s: seconds for requests in flight when the server ends by SIGTERM; the rest is cancelled.
    default_temperature: of requests without one; 0 is greedy, as in the official quick start.
    default_top_p: of requests without one.
    default_max_tokens: of requests without one; None is as many as fit.
    max_tokens: most tokens that an answer may ask for; None is what the context window holds.
    max_request_tokens: most tokens that all answers of a request may have together.
    max_messages: most messages of a conversation.
    max_media: most pictures and videos of a request.
    max_frames: most frames that are taken of a video.
    max_n: most answers to a prompt (n).
    max_prompts: most prompts of a request to /v1/completions.
    max_logprobs: most log-probabilities of a token (top_logprobs).
    max_logit_biases: most entries of logit_bias.
    max_stops: most stop strings.
    max_tools: most tools of a request.
    max_schema_bytes: most bytes of a request's JSON schema, and of its tools.
    max_questions: most questions of a request to /v1/decisions.
    max_question_values: most values that all its questions may have together, each of which is scored.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_keys_file: str | None = None
    shared_prefixes: bool = False
    allowed_origins: tuple[str, ...] = ()
    page: bool = True
    access_log: bool = False
    trace: str | None = None
    remote_hosts: tuple[str, ...] = ()
    max_remote_bytes: int = 64 << 20
    remote_timeout_s: float = 10.0
    max_body_bytes: int = 64 << 20
    max_text_bytes: int = 4 << 20
    max_bodies_bytes: int = 1 << 30
    max_connections: int = 2048
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    keep_alive_s: float = 15.0
    request_timeout_s: float = 600.0
    drain_s: float = 30.0
    default_temperature: float = 0.0
    default_top_p: float = 1.0
    default_max_tokens: int | None = None
    max_tokens: int | None = None
    max_request_tokens: int = 1 << 18
    max_messages: int = 2048
    max_media: int = 64
    max_frames: int = 256
    max_n: int = 16
    max_prompts: int = 64
    max_logprobs: int = 20
    max_logit_biases: int = 300
    max_stops: int = 16
    max_tools: int = 128
    max_schema_bytes: int = 64 << 10
    max_questions: int = 400
    max_question_values: int = 4096

    def __post_init__(self) -> None:
        read_fields(self, SERVER_KINDS)
        for origin in self.allowed_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise RequestError(
                    f"allowed_origins: expected scheme and host, such as https://chat.example, got {origin!r}; leave "
                    "out the path"
                )


_MANY = Several(_NAME, 64)
SERVER_KINDS: dict[str, Kind] = {
    "host": _NAME,
    "port": Integer(0, 65_535),
    "served_model_name": _MANY,
    "api_keys_file": OrNone(Text(1, 4096)),
    "shared_prefixes": Flag(),
    "allowed_origins": _MANY,
    "page": Flag(),
    "access_log": Flag(),
    "trace": OrNone(Text(1, 4096)),
    "remote_hosts": _MANY,
    "max_remote_bytes": _BYTES,
    "remote_timeout_s": _SECONDS,
    "max_body_bytes": _BYTES,
    "max_text_bytes": _BYTES,
    "max_bodies_bytes": _BYTES,
    "max_connections": Integer(1, 1 << 20),
    **dict.fromkeys(
        (
            "header_timeout_s",
            "body_timeout_s",
            "stall_timeout_s",
            "idle_timeout_s",
            "keep_alive_s",
            "request_timeout_s",
        ),
        _SECONDS,
    ),
    "drain_s": Number(0, 86_400),
    "default_temperature": Number(0, 2),
    "default_top_p": Number(0, 1, above=True),
    "default_max_tokens": OrNone(Integer(1)),
    "max_tokens": OrNone(Integer(1)),
    "max_request_tokens": Integer(1),
    "max_messages": Integer(1, 1 << 20),
    "max_media": Integer(0, 10_000),
    "max_frames": Integer(1, 10_000),
    "max_n": Integer(1, MAX_ANSWERS),
    "max_prompts": Integer(1, 1 << 16),
    "max_logprobs": Integer(0, MAX_LOGPROBS),
    "max_logit_biases": Integer(0, MAX_BIASES),
    "max_stops": Integer(0, MAX_STOPS),
    "max_tools": Integer(0, 1024),
    "max_schema_bytes": Integer(0, MAX_GRAMMAR_BYTES),
    "max_questions": Integer(0, 400),
    "max_question_values": Integer(0, 1 << 20),
}
