"""What a client is told when a request fails: OpenAI's error object, with a status, a stable code and headers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_rt.errors import (
    ContextLengthError,
    EngineDeadError,
    InternVLError,
    MediaError,
    NotFiniteError,
    QueueFullError,
    RequestError,
    StepError,
)

NO_RETRY = {"x-should-retry": "false"}  # of an error that would come again
RETRY_MS = 500  # after which a client may ask a full engine again
ENGINE_DEAD = "the engine has ended; the server has to be started again"
INTERNAL = "the server failed at this request; its log has the reason under the request's id"
# What the engine's messages begin with, where they name a part of a request; and other names for it in requests.
_PLACE = re.compile(
    r"(?:the |token \d+ of the )?(messages[\w.\[\]]*|json_schema|regex|tagged|stop|stop_token_ids|n|seed|temperature|"
    r"top_[pk]|min_p|m(?:ax|in)_tokens|repetition_penalty|logit_bias|v2pe_delta|cache_salt|prompt)(?=[: ])"
)
_PLACES = {"json_schema": "response_format", "tagged": "tools"}


@dataclass(eq=False)
class ApiError(Exception):
    """A request's failure as its client sees it. status: of the HTTP answer."""

    status: int
    message: str
    code: str
    param: str | None = None  # the place in the request, such as messages[0].content[1]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Returns the error object. All four keys are always there."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def refusal(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Makes the error for a request that is wrong in itself."""
    return ApiError(400, message, code, param)


def error_of(error: InternVLError, media_places: Sequence[str] = ()) -> ApiError:
    """Translates an engine's error. The engine writes its messages itself and gets no paths from the server.

    media_places: where in the request each of its pictures and videos stands.
    """
    text = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, text, "queue_full", headers={"retry-after-ms": str(RETRY_MS), "retry-after": "1"})
    if isinstance(error, ContextLengthError):
        return ApiError(400, text, "context_length_exceeded", "messages")
    if isinstance(error, NotFiniteError):
        return ApiError(500, text, "not_finite", headers=NO_RETRY)
    if isinstance(error, MediaError | RequestError):
        code = "invalid_media" if isinstance(error, MediaError) else "invalid_request"
        if error.media_id is not None and error.media_id < len(media_places):
            return ApiError(400, text, code, media_places[error.media_id])
        found = _PLACE.match(text)
        return ApiError(400, text, code, _PLACES.get(found[1], found[1]) if found else None)
    if isinstance(error, StepError):  # a later try may succeed
        return ApiError(500, "a step that computed this request failed; try again", "step_failed")
    if isinstance(error, EngineDeadError):
        return ApiError(503, ENGINE_DEAD, "engine_dead", headers=NO_RETRY)
    return internal_error()


def internal_error() -> ApiError:
    """Makes the error for a mistake of ours."""
    return ApiError(500, INTERNAL, "internal_error", headers=NO_RETRY)
