"""What every request over HTTP gets: an id, and bounds on its body and on who may send it."""

import asyncio
import ipaddress
import re
import uuid
from collections.abc import Awaitable, Iterable
from functools import lru_cache

from common.http_errors import json_error
from common.protocol import ErrorInfo, PipelineError
from common.telemetry import request_log

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"(?:\[([^]]*)\]|([^:]*?)\.?)(?::\d*)?")  # brackets are for IPv6 addresses


def guarded(app: ASGIApp, host: str, allowed_hosts: Iterable[str]) -> ASGIApp:
    """`app` on the address `host`, with ids for its requests and only for known host names."""
    return with_request_id(with_known_hosts(app, host, allowed_hosts))


def with_known_hosts(app: ASGIApp, host: str, allowed_hosts: Iterable[str]) -> ASGIApp:
    """`app` for requests whose Host is an IP address, localhost, `host` or an allowed name.

    A web page may have its own name resolved to our address ("DNS rebinding"): to the browser we
    are its own site then, and it may read our answers. On all addresses and without allowed names
    any Host is accepted. Source of the rule: `server.allowedHosts` of Vite,
    https://vite.dev/config/server-options#server-allowedhosts.
    """
    names = {name.lower() for name in allowed_hosts}
    bound = _address(host)
    if not names and (not host or (bound is not None and bound.is_unspecified)):
        return app
    names |= {"localhost", host.lower()}

    @lru_cache(maxsize=64)
    def is_known(header: bytes) -> bool:
        found = _HOST.fullmatch(header.decode("latin-1").lower())
        if found is None:
            return False
        name = found[1] or found[2] or ""
        return name in names or name.endswith(".localhost") or _address(name) is not None

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"host" and not is_known(value):
                message = f"The host {value[:80].decode('latin-1')!r} is not known here; "
                message += "the server's --allowed-host can name it."
                request_log(scope["state"]["request_id"]).warning("refused: %s", message)
                response = json_error(ErrorInfo("invalid_request", message))
                response.status_code = 403
                await response(scope, receive, send)
                return
        await app(scope, receive, send)

    return checked


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


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
