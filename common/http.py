"""The HTTP side of a frontend: a server that our lifecycle owns, and a bounded request body."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

from common.openai import error_response
from common.protocol import ErrorInfo, PipelineError

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `common.worker` decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """A running server; `drain` stops accepting and waits for the requests in flight."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def drain(self) -> None:
        self._server.should_exit = True
        await self._serving


@contextlib.asynccontextmanager
async def http_server(app: ASGIApp, host: str, port: int) -> AsyncIterator[HttpServer]:
    """Serve `app`, listening before this yields; `port` 0 takes a free one.

    Raises:
        OSError: the address is in use or not ours.
    """
    with socket.create_server((host, port), backlog=2048) as listener:
        config = uvicorn.Config(
            app, loop="none", http="httptools", lifespan="off", log_config=None, access_log=False
        )
        server = HttpServer(_Server(config), listener)
        try:
            yield server
        finally:
            await server.drain()


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        PipelineError: kind `too_large`, as soon as more than `limit` bytes are known to come;
            kind `invalid_request`, when the client leaves before the end.
    """
    too_large = PipelineError("too_large", f"The request body is over the limit of {limit} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect as error:
        message = "The client left before the whole request had come."
        raise PipelineError("invalid_request", message) from error
    return b"".join(parts)


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def no_route(request: Request, error: Exception) -> Response:
    """An exception handler: a path or method that does not exist, in OpenAI's error shape."""
    assert isinstance(error, HTTPException)  # noqa: S101 (what it is registered for)
    message = f"{request.method} {request.url.path}: {error.detail}"
    _, body = error_response(ErrorInfo("invalid_request", message))
    return JSONResponse(body, error.status_code, error.headers)


async def unexpected_error(request: Request, error: Exception) -> Response:
    """An exception handler: a fault of the server, in OpenAI's error shape."""
    status, body = error_response(ErrorInfo("internal", f"Unexpected {type(error).__name__}."))
    return JSONResponse(body, status)
