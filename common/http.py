"""The HTTP side of a frontend: a server that our lifecycle owns, and a bounded request body."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive

from common.protocol import PipelineError


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
        PipelineError: kind `too_large`, as soon as more than `limit` bytes are known to come.
    """
    too_large = PipelineError("too_large", f"The request body is over the limit of {limit} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
