"""The HTTP server over real sockets, with small ASGI apps instead of a pipeline."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from common import http
from common.http import HttpServer, client_gone, http_server, listen

import pytest
from starlette.types import Receive, Scope, Send

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


class App:
    """Answers 200 with the length of the body; with `hold` only when the client has left."""

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered.set()
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.set()
                return
            size += len(message["body"])
            more = message["more_body"]
        if self.hold:
            await client_gone(receive)
            self.left.set()
        body = str(size).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def served(
    app: App, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[HttpServer, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A server of `app`, and a connection to it."""
    async with http_server(app, listen(host, 0)) as server:
        address = urlsplit(server.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            yield server, reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (HEAD + b"x: ", b"a" * 6),
        (HEAD, b"x: a\r\n"),
        (b"GET /", b"a" * 6),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"x: a\r\n"),
    ],
    ids=["one header", "many headers", "path", "trailers"],
)
async def test_headers_without_end_are_refused(start: bytes, more: bytes) -> None:
    """Else one client fills the memory: the parser keeps whatever comes before the body."""
    async with served(App()) as (_, reader, writer):
        refused = asyncio.ensure_future(reader.readline())
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                writer.write(more * 40_000)
                await writer.drain()
        with contextlib.suppress(ConnectionResetError):  # it does not read on to say why
            assert b" 400 " in await asyncio.wait_for(refused, 20)


async def test_headers_and_bodies_within_the_limit_pass() -> None:
    """Large bodies, and many requests on one connection, do not count as headers."""
    headers = b"x: " + b"a" * 30_000 + b"\r\nContent-Length: 300000\r\n\r\n"
    async with served(App()) as (_, reader, writer):
        for _ in range(5):
            writer.write(HEAD + headers + b"b" * 300_000)
            answer = await asyncio.wait_for(reader.readuntil(b"300000"), 20)
            assert answer.startswith(b"HTTP/1.1 200")


async def test_listens_on_ipv6() -> None:
    try:
        listen("::1", 0).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with served(App(), "::1") as (server, reader, writer):
        assert server.url.startswith("http://[::1]:")
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        assert b" 200 " in await reader.readline()


def test_an_address_in_use_is_an_os_error() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", first.getsockname()[1])


async def test_a_drain_waits_for_the_requests_in_flight() -> None:
    app = App()
    async with served(app) as (server, reader, writer):
        writer.write(HEAD + b"Content-Length: 2\r\n\r\na")
        await app.entered.wait()
        draining = asyncio.ensure_future(server.drain())
        done, _ = await asyncio.wait([draining], timeout=0.3)
        assert not done
        writer.write(b"b")
        assert b" 200 " in await reader.readline()
        await asyncio.wait_for(draining, 20)


@pytest.mark.parametrize("body", [b"a", b"ab"], ids=["upload", "answer"])
async def test_a_drain_that_is_given_up_closes_the_connections(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """What is in flight ends as if its client had left: no exception, no traceback, no wait."""
    app = App(hold=True)
    async with served(app) as (server, reader, writer):
        writer.write(HEAD + b"Content-Length: 2\r\n\r\n" + body)
        await app.entered.wait()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(server.drain(), 0.1)
        await asyncio.wait_for(server.close(), 20)
        assert app.left.is_set()
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text


async def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep its request in flight for ever, and a drain with it."""
    monkeypatch.setattr(http, "UNREAD_S", 0.2)
    gone = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.ensure_future(client_gone(receive))
        while not left.done():
            part = {"type": "http.response.body", "body": b"x" * 65536, "more_body": True}
            await send(part)
            await asyncio.sleep(0)
        gone.set()

    async with http_server(endless, listen("127.0.0.1", 0)) as server:
        address = urlsplit(server.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(gone.wait(), 20)
        await asyncio.wait_for(server.drain(), 10)
        writer.transport.abort()


async def test_a_large_answer_arrives_whole() -> None:
    """Writing is paused and resumed again and again."""
    size = 32 * 2**20  # more than the sockets hold

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    async with http_server(large, listen("127.0.0.1", 0)) as server:
        address = urlsplit(server.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(await reader.read(-1)) > size
        writer.close()
        await writer.wait_closed()


async def test_an_error_in_the_block_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """A component that fails while a client holds a connection open exits with its own error."""
    app = App(hold=True)

    async def lose_the_lease() -> None:
        async with served(app) as (server, _, writer):
            writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
            await app.entered.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.drain(), 0.1)
            raise KeyError("lease")

    with pytest.raises(KeyError, match="lease"):
        await lose_the_lease()
    assert not caplog.records
