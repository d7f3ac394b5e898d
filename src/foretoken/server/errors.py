"""What goes wrong, as clients see it: one place that maps errors to statuses and OpenAI's body."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from foretoken.errors import CapacityError, ConfigError, ForetokenError, RequestError
from foretoken.server.submission import DeadlineError, QueueFullError
from foretoken.server.validation import explain, shortened

RETRY_AFTER_S = 1  # where nothing better is known

# Parameters of the sampler that OpenAI's API calls otherwise.
RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}

# Where the engine's messages name a parameter: at their beginning, or where a token id stood.
_PARAMS = {
    "the prompt": "prompt",
    "the reference": "prediction",
    "unknown loaded drafter": "speculation.drafters",
}
_NAMED = re.compile(
    r"^([a-z]+(?:_[a-z]+)*)(?: is| are| needs| holds| maps| at |:)"
    r"|(?<= in )([a-z]+(?:_[a-z]+)+)(?= is )|" + "|".join(_PARAMS)
)

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class FieldError(RequestError):
    """A field of a request is wrong.

    Args:
        param: Its name, with its path in dots.
        message: What is wrong, what was given, what is allowed.
        hint: What to do.
    """

    def __init__(self, param: str | None, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class UnknownModelError(FieldError):
    """A request names a model that is not served.

    Args:
        name: As given.
        served: The one that is.
    """

    def __init__(self, name: str, served: str) -> None:
        super().__init__(
            "model", f"there is no model {shortened(name)} here", hint=f"use {served!r}"
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client sees it.

    Args:
        status: Of HTTP.
        message: One line.
        param: The field at fault, if one is.
        code: A word for programs, if there is one.
        headers: Beside those of every answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What the answer holds."""
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer of JSON."""
    return Response(encode(content), status, dict(headers or {}), "application/json")


def encode(content: object) -> bytes:
    """Return an object as JSON, in UTF-8 and without spaces."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def describe(error: Exception) -> Failure:
    """Return what a client is told of an error; of an unexpected one, nothing but that it was."""
    if isinstance(error, RequestValidationError):
        param, message = explain(error)
        return Failure(400, message, param)
    if isinstance(error, HTTPException):
        return Failure(error.status_code, str(error.detail), headers=error.headers or {})
    if not isinstance(error, ForetokenError):
        return Failure(500, "the server failed; its log says what happened", code="internal_error")
    message = f"{error} ({error.hint})"
    if isinstance(error, UnknownModelError):
        return Failure(404, message, error.param, "model_not_found")
    if isinstance(error, FieldError):
        return Failure(400, message, error.param)
    if isinstance(error, RequestError | ConfigError):
        return _of_sampling(message)
    if isinstance(error, CapacityError):
        return _of_capacity(error, message)
    if isinstance(error, DeadlineError):
        return Failure(504, message, code="deadline_exceeded")
    return Failure(500, message, code="engine_error")


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every error with OpenAI's body."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error.detail += f": {shortened(f'{request.method} {request.url.path}')}"
        return describe(error).response()

    for kind in (ForetokenError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


# -- kinds of errors -------------------------------------------------------------------------


def _of_capacity(error: CapacityError, message: str) -> Failure:
    wait_s = max(1, math.ceil(getattr(error, "retry_after_s", RETRY_AFTER_S)))
    headers = {"Retry-After": str(wait_s)}
    if isinstance(error, QueueFullError):
        return Failure(429, message, code="queue_full", headers=headers)
    return Failure(503, message, code="unavailable", headers=headers)


def _of_sampling(message: str) -> Failure:
    """Return what is said of an error that the engine found, in the API's own words."""
    for name, renamed in RENAMED.items():
        message = re.sub(rf"\b{name}\b", renamed, message)
    params = (match[1] or match[2] or _PARAMS[match[0]] for match in _NAMED.finditer(message))
    return Failure(400, message, next(params, None))
