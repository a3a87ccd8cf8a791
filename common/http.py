"""The HTTP side of a frontend: a server that our lifecycle owns, with bounds on what comes in."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp, Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
CLOSE_S = 2.0
# A client that takes nothing of its answer for so long is as good as gone; it would also hold
# up a drain.
UNREAD_S = 20.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `common.worker` decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _BoundedProtocol(HttpToolsProtocol):
    """uvicorn's connection, with bounds that it lacks.

    It would keep a request's headers and trailers whatever their size, and wait for ever for a
    client that does not read.
    """

    beside_body = 0
    unread: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self.beside_body += len(data)
        super().data_received(data)
        if self.beside_body > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are over the limit of {MAX_HEADER_BYTES} bytes.")

    def on_body(self, body: bytes) -> None:
        self.beside_body -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.beside_body = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client_reads()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._client_reads()

    def _client_reads(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None


class HttpServer:
    """A running server, at `url`."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def drain(self) -> None:
        """Accept nothing more; return when the requests in flight are answered."""
        self._server.should_exit = True
        await asyncio.shield(self._serving)  # who gives up waiting does not end the server

    async def close(self) -> None:
        """End at once, for the requests still in flight as if their clients had left."""
        self._server.should_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await asyncio.wait([self._serving], timeout=CLOSE_S)
        self._server.force_exit = True
        await self._serving


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `port` 0 takes a free one.

    Raises:
        OSError: the address is in use or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


@contextlib.asynccontextmanager
async def http_server(app: ASGIApp, listener: socket.socket) -> AsyncIterator[HttpServer]:
    """Serve `app` on `listener` for the length of the block, and close it."""
    with listener:
        config = uvicorn.Config(
            app,
            loop="none",
            http=_BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        server = HttpServer(_Server(config), listener)
        try:
            yield server
        finally:
            await server.close()


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
