"""Errors in the shape that OpenAI clients expect.

Source of the shape: https://platform.openai.com/docs/guides/error-codes and the official
Python client, which raises `APIStatusError` for a status code and `APIError` for an SSE event
whose data has an `error` object.
"""

import re
from typing import Any, NamedTuple, Protocol

from common.openai_objects import ErrorDocument, ErrorObject
from common.protocol import ErrorInfo, ErrorKind

import msgspec
from msgspec.structs import replace


class FieldNames(Protocol):
    """A request that knows what the client calls the fields for which we have other names."""

    def field_names(self) -> dict[str, str]: ...


class _Shape(NamedTuple):
    status: int
    type: str
    code: str | None


_SHAPES: dict[ErrorKind, _Shape] = {
    "invalid_request": _Shape(400, "invalid_request_error", None),
    "too_large": _Shape(413, "invalid_request_error", "request_too_large"),
    "model_not_found": _Shape(404, "invalid_request_error", "model_not_found"),
    "not_found": _Shape(404, "invalid_request_error", "not_found"),
    "conflict": _Shape(409, "invalid_request_error", "conflict"),
    "overloaded": _Shape(429, "rate_limit_error", "overloaded"),
    "unavailable": _Shape(503, "server_error", "unavailable"),
    "internal": _Shape(500, "server_error", "internal_error"),
}


def client_error(request: FieldNames, info: ErrorInfo) -> ErrorInfo:
    """`info`, which a component behind the frontend sent, in terms of what the client sent.

    The components have names of their own for some fields, and a client may have used another
    of two names; both `param` and the mention in the message become the client's. Applied
    twice it changes nothing more.
    """
    names = request.field_names()
    if info.param not in names:
        return info
    name = names[info.param]
    message = re.sub(rf"\b{info.param}\b", name, info.message)
    return replace(info, message=message, param=name)


def error_response(info: ErrorInfo) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the JSON body that tell a client about `info`."""
    shape = _SHAPES[info.kind]
    error = ErrorObject(info.message, shape.type, info.param, info.code or shape.code)
    body: dict[str, Any] = msgspec.to_builtins(ErrorDocument(error))
    return shape.status, body


def sse_error(info: ErrorInfo) -> bytes:
    """The last event of a stream that failed after its status 200 was sent.

    No `[DONE]` follows: the official client raises `APIError` at this event, and a client
    that knows no such event sees a stream that did not complete.
    """
    return b"data: " + msgspec.json.encode(error_response(info)[1]) + b"\n\n"
