"""The prefill side of a transfer: lends the KV of prompts to the engines that will decode."""

import asyncio
import dataclasses
import secrets
import weakref

from common.kv_transfer.lent_memory import LentMemory, Stored
from common.kv_transfer.messages import (
    Answer,
    Place,
    Pull,
    Pulled,
    Refused,
    Released,
    decode_request,
    encode,
    to_descriptor,
)
from common.kv_transfer.pieces import KvPieces
from common.protocol_transfer import KvDescriptor
from common.telemetry import log

import msgspec
import zmq
import zmq.asyncio

MAX_REQUEST_BYTES = 4096


@dataclasses.dataclass
class LenderCounters:
    """Since the start; bytes are those handed to ZMQ or read by NIXL."""

    lent: int = 0
    refused: int = 0  # for want of room
    released: int = 0
    expired: int = 0
    pulls: int = 0
    pulled_bytes: int = 0


class _Loan:
    """Pieces that someone may fetch; `uses` are the lease, and what is being sent or copied."""

    def __init__(
        self, pieces: KvPieces, stored: Stored | None, expiry: asyncio.TimerHandle
    ) -> None:
        self.pieces = pieces
        self.stored = stored  # over NIXL
        self.expiry = expiry
        self.uses = 1


class Lender:
    """Made by `kv_transfer`, which closes it; belongs to one event loop.

    Memory counts as lent, against `max_bytes`, until it has been released or has expired after
    `lease_s`, and ZMQ has nothing of it left to send. With `memory`, peers read from there.
    """

    def __init__(
        self,
        kind: str,
        socket: zmq.asyncio.Socket,
        memory: LentMemory | None = None,
        *,
        max_bytes: int,
        lease_s: float,
    ) -> None:
        self.counters = LenderCounters()
        self.lent_bytes = 0
        self._kind = kind
        self._socket, self._memory = socket, memory
        self._max_bytes, self._lease_s = max_bytes, lease_s
        self._loop = asyncio.get_running_loop()
        self._process = secrets.token_bytes(16)
        self._address = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._loans: dict[bytes, _Loan] = {}
        self._nothing_lent = asyncio.Event()
        self._nothing_lent.set()
        self._serving = asyncio.create_task(self._serve())
        self._serving.add_done_callback(_report)

    def lend(self, pieces: KvPieces) -> KvDescriptor | None:
        """Let whoever has the descriptor fetch these pieces; None if there is no room for them.

        Nobody may write to the buffer any more.
        """
        stored = None
        has_room = self.lent_bytes + pieces.size <= self._max_bytes
        if has_room and self._memory is not None:
            stored = self._memory.store(pieces.buffer)
            has_room = stored is not None
        if not has_room:
            self.counters.refused += 1
            return None
        transfer = secrets.token_bytes(16)
        expiry = self._loop.call_later(self._lease_s, self._expire, transfer)
        loan = self._loans[transfer] = _Loan(pieces, stored, expiry)
        if stored is not None:
            loan.pieces = dataclasses.replace(pieces, buffer=stored.place)
            loan.uses += 1
            stored.copied.add_done_callback(lambda _: self._drop(loan))
        self.lent_bytes += pieces.size
        self._nothing_lent.clear()
        self.counters.lent += 1
        place = Place(
            self._address, self._process, transfer, pieces.first, pieces.piece_bytes, pieces.size
        )
        return to_descriptor(self._kind, pieces.tokens, place)

    def withdraw(self, descriptor: KvDescriptor) -> None:
        """Take back what nobody will fetch; no harm if it has been already."""
        self._end(descriptor.data["transfer"])

    async def nothing_lent(self) -> None:
        """Wait until all has been fetched or has expired."""
        await self._nothing_lent.wait()

    async def close(self) -> None:
        """Take everything back; what is being fetched fails."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        for transfer in list(self._loans):
            self._end(transfer)
        self._socket.close(linger=0)
        if self._memory is not None:
            self._memory.close()

    async def _serve(self) -> None:
        while True:
            await self._serve_one()

    async def _serve_one(self) -> None:
        """A function of its own, so that no variable keeps what has been sent."""
        peer, *frames = await self._socket.recv_multipart()
        answer, *data = await self._answer(frames)
        await self._socket.send_multipart([peer, encode(answer), *data], copy=False)

    async def _answer(self, frames: list[bytes]) -> tuple[Answer] | tuple[Answer, zmq.Frame]:
        try:
            (frame,) = frames
            request = decode_request(frame)
        except (ValueError, msgspec.DecodeError) as error:
            return (Refused(f"not a request: {error}"),)
        loan = self._loans.get(request.transfer)
        if request.process != self._process:
            return (Refused("the prefill engine has been restarted"),)
        if loan is None:
            return (Refused("the prefill engine does not have it any more"),)
        if isinstance(request, Pull):
            return await self._pull(request, loan)
        self._end(request.transfer)
        self.counters.released += 1
        return (Released(),)

    async def _pull(self, request: Pull, loan: _Loan) -> tuple[Answer] | tuple[Answer, zmq.Frame]:
        try:
            data = loan.pieces.pieces_from(request.first)
        except IndexError as error:
            return (Refused(str(error)),)
        self.counters.pulls += 1
        self.counters.pulled_bytes += data.nbytes
        if self._memory is not None and loan.stored is not None:
            await asyncio.shield(loan.stored.copied)
            address = loan.pieces.buffer.ctypes.data + loan.pieces.size - data.nbytes
            agent = None if request.known else self._memory.metadata
            return (Pulled(data.nbytes, address, agent),)
        loan.uses += 1
        # The view lives as long as ZMQ has it to send, and dies in a thread of ZMQ's.
        weakref.finalize(data, self._sent, loan).atexit = False
        return Pulled(data.nbytes), zmq.Frame(data, copy=False)

    def _sent(self, loan: _Loan) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drop, loan)

    def _expire(self, transfer: bytes) -> None:
        log.warning("lent KV was not fetched within %g s", self._lease_s)
        self.counters.expired += 1
        self._end(transfer)

    def _end(self, transfer: bytes) -> None:
        loan = self._loans.pop(transfer, None)
        if loan is not None:
            loan.expiry.cancel()
            self._drop(loan)

    def _drop(self, loan: _Loan) -> None:
        loan.uses -= 1
        if not loan.uses:
            self.lent_bytes -= loan.pieces.size
            if not self.lent_bytes:
                self._nothing_lent.set()
            if self._memory is not None and loan.stored is not None:
                self._memory.free(loan.stored)


def _report(serving: asyncio.Task[None]) -> None:
    """Without it borrowers would time out, and nobody would know why."""
    error = None if serving.cancelled() else serving.exception()
    if error is not None:
        log.error("no KV is lent any more: %r", error)
