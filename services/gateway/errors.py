"""Every error as clients see it: one exception, one JSON body."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from services.protocol import Failure

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. `failure` says what the client will read; `headers` go with it."""

    def __init__(self, failure: Failure, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.headers = dict(headers or {})


def refused(status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None) -> ApiError:
    """An error of that HTTP status, its type following from the status."""
    kind = TYPES.get(status, "invalid_request_error")
    return ApiError(Failure(status, message, kind, param, code, retry_after))


def timed_out() -> ApiError:
    return refused(408, "The request took longer than this service allows.", code="request_timeout")


def unforeseen(identity: str) -> ApiError:
    return refused(500, f"Something went wrong inside the service; the log has it as {identity}.", code="internal_error")


def body(failure: Failure) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}}


def response(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.failure.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.failure.retry_after)))
    return JSONResponse(body(error.failure), error.failure.status, headers)


def invalid(error: ValidationError) -> ApiError:
    """A body that its schema refused; the first problem becomes the error, and names the field."""
    detail = error.errors(include_url=False, include_context=False)[0]
    if detail["type"] == "json_invalid":
        return refused(400, f"The body is not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}.", code="invalid_json")
    param = path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return refused(400, f"Unknown field: {param}.", param=param, code="unknown_parameter")
    if detail["type"] == "missing":
        return refused(400, f"Missing field: {param}.", param=param, code="missing_required_parameter")
    return refused(400, f"{label(param)}{detail['msg'].removeprefix('Value error, ')}.", param=param, code="invalid_value")


def label(param: str | None) -> str:
    return f"Invalid {param}: " if param else ""


def path(location: tuple[str | int, ...]) -> str | None:
    """messages[0].content from pydantic's location, without the <tags> of the union members it tried."""
    return "".join(steps(location)).lstrip(".") or None


def steps(location: tuple[str | int, ...]) -> Iterator[str]:
    for part in location:
        if isinstance(part, int):
            yield f"[{part}]"
        elif not part.startswith("<") and part != "[key]":
            yield f".{part[:80]}"
