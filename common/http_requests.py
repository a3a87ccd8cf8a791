"""What every request over HTTP gets: an id, and bounds on its body and on who may send it."""

import asyncio
import uuid
from collections.abc import Awaitable

from common.protocol import PipelineError

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def with_request_id(app: ASGIApp) -> ASGIApp:
    """`app` with an id for each request: `request.state.request_id`, header `x-request-id`."""

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = uuid.uuid4().hex

        # No coroutine of its own: it would cost time for every chunk of a stream.
        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            return send(message)

        scope.setdefault("state", {})["request_id"] = request_id
        await app(scope, receive, send_with_id)

    return identified


def refuse_other_sites(request: Request) -> None:
    """Keep web pages of other sites from using the server through the browser of its user.

    A page may send a POST anywhere, though it does not get to see the answer. What is not a
    browser sends none of these headers. Source of the rule: `http.CrossOriginProtection` of
    Go's standard library, https://pkg.go.dev/net/http#CrossOriginProtection.

    Raises:
        HTTPException: 403.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        ours = site in ("same-origin", "none")
    else:
        ours = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not ours:
        raise HTTPException(403, f"A page of another site ({origin}) may not send requests here.")


def refuse_other_parameters(request: Request, *accepted: str) -> None:
    """Keep a parameter of the URL from being ignored.

    Raises:
        PipelineError: kind `invalid_request`, naming it.
    """
    for name in request.query_params:
        if name not in accepted:
            message = f"'{name[:80]}': The parameter is unknown. Supported: {', '.join(accepted)}."
            raise PipelineError("invalid_request", message, name[:80])


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        PipelineError: kind `too_large`, as soon as more than `limit` bytes are known to come.
        HTTPException: 408, it has not come within `timeout_s` seconds.
        ClientDisconnect: the client left before the end.
    """
    too_large = PipelineError("too_large", f"The request body is over the limit of {limit} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        message = f"The body has not come within {timeout_s:g} s."
        # What is left of it may still come, and would keep the connection open.
        raise HTTPException(408, message, {"connection": "close"}) from error
    return bytes(body)
