"""MCP over HTTP, with a bound on what a server's answer may weigh."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from mcp.client._transport import TransportStreams
from mcp.client.streamable_http import streamable_http_client

MAX_BYTES = 4 * 2**20
TIMEOUT = httpx2.Timeout(10.0, read=300.0)  # a stream may say nothing for long


@asynccontextmanager
async def http_transport(url: str) -> AsyncIterator[TransportStreams]:
    """The messages from and to the server at `url`."""
    async with httpx2.AsyncClient(
        transport=_BoundedTransport(), timeout=TIMEOUT, headers={"accept-encoding": "identity"}
    ) as client:
        transport = streamable_http_client(url, http_client=client, max_sse_event_size=MAX_BYTES)
        async with transport as streams:
            yield streams


class _BoundedTransport(httpx2.AsyncHTTPTransport):
    """Reads no more than `MAX_BYTES` of an answer; the library bounds events of a stream."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.RemoteProtocolError("it is compressed, which was not asked for")
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if not is_stream and isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = _Bounded(response.stream)
        return response


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._stream:
            size += len(piece)
            if size > MAX_BYTES:
                raise httpx2.StreamError(f"an answer of more than {MAX_BYTES} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
