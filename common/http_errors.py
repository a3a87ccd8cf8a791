"""How a request over HTTP fails: its status, its body in OpenAI's shape, what it counts as."""

import asyncio
import math
from typing import Any

from common.openai import error_response
from common.protocol import ErrorInfo, PipelineError
from common.telemetry import request_log

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

CANCELLED = (499, "cancelled")  # nginx's status for a client that left; nobody receives it
RETRY_AFTER_S = 1  # where nobody can tell


def json_error(info: ErrorInfo) -> JSONResponse:
    """A failure as status code and JSON, with Retry-After where trying again may help."""
    status, body = error_response(info)
    again = info.kind in ("overloaded", "unavailable")
    after = RETRY_AFTER_S if info.retry_after_s is None else max(math.ceil(info.retry_after_s), 1)
    return JSONResponse(body, status, {"retry-after": str(after)} if again else None)


def outcome(error: BaseException) -> tuple[int, str]:
    """The status and the kind of error that a request counts as which ended by `error`."""
    if isinstance(error, PipelineError):
        return error_response(error.info)[0], error.info.kind
    if isinstance(error, HTTPException):
        return error.status_code, "invalid_request"
    if isinstance(error, ClientDisconnect | asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    return 500, "internal"


async def _refused(request: Request, error: PipelineError) -> Response:
    request_log(request.state.request_id).warning("refused: %s", error)
    return json_error(error.info)


async def _client_left(request: Request, _: ClientDisconnect) -> Response:
    request_log(request.state.request_id).info("the client left before the whole request had come")
    return Response(status_code=CANCELLED[0])


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    request_log(request.state.request_id).info("%d for %s", error.status_code, message)
    _, body = error_response(ErrorInfo("invalid_request", message))
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    name = type(error).__name__
    request_log(request.state.request_id).error("unexpected %s", name)  # uvicorn logs where
    return json_error(ErrorInfo("internal", f"Unexpected {name}."))


EXCEPTION_HANDLERS: dict[Any, Any] = {
    PipelineError: _refused,
    ClientDisconnect: _client_left,
    HTTPException: _http_error,  # a path or method that does not exist, and ours
    Exception: _unexpected,
}
"""What a FastAPI app under `with_request_id` does with what its routes raise."""
