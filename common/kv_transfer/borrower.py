"""The decode side of a transfer: fetches the KV that another engine computed."""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from common.kv_transfer.connections import Connection, Connections
from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.messages import (
    Place,
    Pull,
    Pulled,
    Refused,
    Release,
    Released,
    Request,
    decode_answer,
    encode,
    from_descriptor,
)
from common.kv_transfer.nixl_reader import NixlReader
from common.kv_transfer.pieces import KvPieces
from common.protocol_transfer import KvDescriptor

import msgspec
import numpy as np
import zmq.asyncio

T = TypeVar("T", Pulled, Released)


@dataclass
class BorrowerCounters:
    """Since the start; bytes are of transfers that succeeded."""

    fetched: int = 0
    failed: int = 0
    fetched_bytes: int = 0


class Borrower:
    """Made by `kv_transfer`, which closes it; belongs to one event loop."""

    def __init__(
        self,
        kind: str,
        context: zmq.asyncio.Context,
        reader: NixlReader | None = None,
        *,
        timeout_s: float,
    ) -> None:
        self.counters = BorrowerCounters()
        self._kind, self._reader = kind, reader
        self._timeout_s = timeout_s
        self._connections = Connections(context)

    async def fetch(self, descriptor: KvDescriptor, first_block: int) -> KvPieces:
        """The pieces from block `first_block` on, which are lent no longer; may be cancelled.

        Raises:
            KvTransferError: they did not arrive in time, or not as they should.
        """
        try:
            place = self._find(descriptor, first_block)
            async with asyncio.timeout(self._timeout_s):
                pieces = await self._fetch(place, descriptor.tokens, first_block)
        except TimeoutError:
            self.counters.failed += 1
            raise KvTransferError(
                f"no KV from {place.address} within {self._timeout_s:g} s"
            ) from None
        except KvTransferError:
            self.counters.failed += 1
            raise
        self.counters.fetched += 1
        self.counters.fetched_bytes += pieces.size
        return pieces

    async def release(self, descriptor: KvDescriptor) -> None:
        """Tell the lender that nobody will fetch it.

        Raises:
            KvTransferError: the lender cannot be told, or knows nothing of it.
        """
        place = from_descriptor(descriptor)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._connections.connection(place.address) as connection,
            ):
                await _ask(connection, Release(place.process, place.transfer), Released)
        except TimeoutError:
            raise KvTransferError(f"no answer from {place.address}") from None

    def close(self) -> None:
        """Close the connections; what is going on fails."""
        self._connections.close()
        if self._reader is not None:
            self._reader.close()

    def _find(self, descriptor: KvDescriptor, first_block: int) -> Place:
        if descriptor.kind != self._kind:
            raise KvTransferError(
                f"KV is lent by {descriptor.kind!r}, and this engine borrows by {self._kind!r}"
            )
        place = from_descriptor(descriptor)
        blocks = -(-place.size // place.piece_bytes)
        if not place.first <= first_block < place.first + blocks:
            raise KvTransferError(
                f"block {first_block} is not one of {place.first} to {place.first + blocks - 1}"
            )
        return place

    async def _fetch(self, place: Place, tokens: int, first_block: int) -> KvPieces:
        size = place.size - (first_block - place.first) * place.piece_bytes
        known = self._reader is not None and self._reader.knows(place.process)
        pull = Pull(place.process, place.transfer, first_block, known)
        release = Release(place.process, place.transfer)
        async with self._connections.connection(place.address, encode(release)) as connection:
            pulled, data = await _ask(connection, pull, Pulled)
            sizes = [pulled.size, *(frame.nbytes for frame in data)]
            if sizes != [size] * (2 if self._reader is None else 1):
                raise KvTransferError(f"{place.address} sent {sizes} bytes, not {size}")
            if self._reader is None:
                buffer = np.frombuffer(data[0], np.uint8)
            else:
                buffer = await self._reader.read(place.process, pulled.agent, pulled.address, size)
            await _ask(connection, release, Released)
        return KvPieces(buffer, first_block, tokens, place.piece_bytes)


async def _ask(
    connection: Connection, request: Request, expected: type[T]
) -> tuple[T, list[memoryview]]:
    """The answer, and the frames that come with it."""
    first, *data = await connection.ask(encode(request))
    try:
        answer = decode_answer(first)
    except msgspec.DecodeError as error:
        raise KvTransferError(f"{connection.address} gave no valid answer: {error}") from error
    if isinstance(answer, Refused):
        raise KvTransferError(f"{connection.address}: {answer.reason}")
    if not isinstance(answer, expected):
        raise KvTransferError(f"{connection.address} answered with {type(answer).__name__}")
    return answer, data
