"""Connections of borrowers to lenders.

A connection does one thing at a time. One that was interrupted is closed, so that its peer need
not send the rest and no answer can be taken for another's; the others are kept for the next time.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from common.kv_transfer.errors import KvTransferError

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

IDLE_S = 60.0
FAREWELL_MS = 200

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Connection:
    """One to `address`; `lost` is done when the peer is gone or cannot be reached.

    Raises:
        KvTransferError: that is no address.
    """

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self.address = address
        self.idle_since = 0.0
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.ipv6 = True  # takes IPv4 addresses, too
        self._events: zmq.asyncio.Socket = self._socket.get_monitor_socket(_LOST)
        self._events.linger = 0
        self.lost = asyncio.create_task(self._lose())
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise KvTransferError(f"cannot connect to {address!r}: {error}") from error

    async def ask(self, request: bytes) -> list[memoryview]:
        """The frames of the answer.

        Raises:
            KvTransferError: the peer is gone or cannot be reached.
        """
        await self._socket.send(request)
        receiving = asyncio.ensure_future(self._socket.recv_multipart(copy=False))
        try:
            await asyncio.wait((receiving, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done() and not receiving.cancelled():
                return [frame.buffer for frame in receiving.result()]
        finally:
            receiving.cancel()
        raise KvTransferError(f"no connection to {self.address}")

    def close(self, farewell: bytes = b"") -> None:
        if self._socket.closed:
            return
        says_farewell = farewell and not self.lost.done()
        self.lost.cancel()
        self._socket.disable_monitor()
        self._events.close()
        if says_farewell:
            with suppress(zmq.ZMQError):  # it is a courtesy
                zmq.Socket.send(self._socket, farewell, zmq.NOBLOCK)
        self._socket.close(FAREWELL_MS if says_farewell else 0)

    async def _lose(self) -> None:
        await recv_monitor_message(self._events)


class Connections:
    """Keeps connections for the next time; belongs to one event loop."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._context = context
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()

    @asynccontextmanager
    async def connection(self, address: str, farewell: bytes = b"") -> AsyncIterator[Connection]:
        """One to `address` for the length of the block; after `farewell` closed if that raises."""
        connection = self._take(address)
        self._used.add(connection)
        done = False
        try:
            yield connection
            done = True
        finally:
            self._used.discard(connection)
            if done and not connection.lost.done():
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
            else:
                connection.close(farewell)

    def _take(self, address: str) -> Connection:
        found = None
        for connection in reversed(self._idle.copy()):
            too_long = time.monotonic() - connection.idle_since > IDLE_S
            if connection.lost.done() or too_long:
                self._idle.remove(connection)
                connection.close()
            elif found is None and connection.address == address:
                self._idle.remove(connection)
                found = connection
        if found is None:
            found = Connection(self._context, address)
            found.lost.add_done_callback(partial(self._forget, found))
        return found

    def _forget(self, connection: Connection, lost: "asyncio.Task[None]") -> None:
        """ZMQ would go on trying to reach a peer that is gone, with no fetch to notice."""
        if connection in self._idle:
            self._idle.remove(connection)
            connection.close()

    def close(self) -> None:
        """Close all; what is going on in one fails."""
        for connection in [*self._idle, *self._used]:
            connection.close()
        self._idle.clear()
