"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from math import ceil
from typing import Any, TypeAlias

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lazyllm.errors import Closed, ConfigError, DocumentGone, InputError, QueueFull, ReplicaLost, TooLong

Json: TypeAlias = dict[str, Any]

CLIENT_GONE = 499
"""Status of a request whose client went away; nobody reads it but the log."""


class ApiError(HTTPException):
    """A request that is answered with an error.

    Args:
        status: HTTP's number.
        message: what is wrong, with the value and what is allowed.
        kind: what OpenAI's API calls the type of the error.
        param: the parameter at fault.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind, self.param, self.code = kind, param, code

    @property
    def body(self) -> Json:
        """The error as it is sent."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def client_gone() -> ApiError:
    """A request whose client went away."""
    return ApiError(CLIENT_GONE, "the client went away", code="client_gone")


def reader_too_slow() -> ApiError:
    """A stream whose client does not keep up with it."""
    return ApiError(CLIENT_GONE, "the client reads too slowly", code="reader_too_slow")


def timed_out(seconds: float) -> ApiError:
    """A request that took too long."""
    return ApiError(504, f"the request took longer than {seconds:g} s", kind="timeout_error", code="timeout")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; nothing but that there was one where the server is at fault."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            retry = {"Retry-After": str(max(1, ceil(error.retry_seconds)))}
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=retry)
        case Closed():
            return ApiError(503, str(error), kind="service_unavailable_error", code="shutting_down")
        case ReplicaLost():
            return ApiError(503, str(error), kind="service_unavailable_error", code="replica_lost")
        case DocumentGone():
            return ApiError(404, str(error), param="lazyllm.document", code="document_not_found")
        case TooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case InputError() | ConfigError():
            return ApiError(400, str(error))
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
    return ApiError(500, "the server failed; its log says where", kind="server_error", code="internal_error")


def refused_body(error: RequestValidationError) -> ApiError:
    """What is wrong with the first parameter that does not fit."""
    first = error.errors()[0]
    context = first.get("ctx") or {}
    param = context.get("param") or ".".join(map(str, first["loc"][1:])) or None
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"unknown parameter {param!r}", param=param, code="unknown_parameter")
        case "missing":
            missing = "the body is missing" if param is None else f"missing parameter {param!r}"
            return ApiError(400, missing, param=param, code="missing_required_parameter")
        case "unsupported_parameter" | "unsupported_value":
            return ApiError(400, f"{param} {first['msg']}", param=param, code=first["type"])
    what = "the body" if param is None else param
    given = reprlib.repr(first["input"])
    return ApiError(400, f"{what}: {first['msg']}, not {given}", param=param, code="invalid_value")
