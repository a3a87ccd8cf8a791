"""Whatever becomes of a borrower, the lender gets its memory back, and nothing piles up."""

import asyncio
import gc
import random
import socket

from common.kv_transfer import messages
from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.start import KvTransfer
from common.protocol_transfer import KvDescriptor
from tests.common.kv_transfer.conftest import StartTransfer
from tests.common.kv_transfer.kv_helpers import (
    FEW,
    PIECE,
    eventually,
    expire,
    held_by_this_process,
    pieces_of,
)

import psutil
import pytest
import zmq.asyncio

TRANSFERS = 1000


def lend(transfer: KvTransfer, size: int) -> KvDescriptor:
    descriptor = transfer.lender.lend(pieces_of(size))
    assert descriptor is not None
    return descriptor


async def fetch_or_cancel(transfer: KvTransfer, peer: KvTransfer, choice: random.Random) -> None:
    size = choice.choice([1, PIECE, 10 * PIECE + 1, 300 * PIECE])
    descriptor = lend(transfer, size)
    fetching = asyncio.create_task(
        peer.borrower.fetch(descriptor, choice.randrange(-(-size // PIECE)))
    )
    if choice.random() < 0.5:
        for _ in range(choice.randrange(1, 40)):
            await asyncio.sleep(0)
        fetching.cancel()
    await asyncio.gather(fetching, return_exceptions=True)
    if not fetching.cancelled():
        await fetching


async def test_nothing_is_left_of_a_thousand_transfers_half_of_them_cancelled(
    start: StartTransfer,
) -> None:
    choice = random.Random(7)

    async def some(count: int) -> None:
        async with start(lease_s=20.0) as lending, start() as borrowing:
            for _ in range(count // 10):
                await asyncio.gather(
                    *(fetch_or_cancel(lending, borrowing, choice) for _ in range(10))
                )
            await eventually(lambda: lending.lender.lent_bytes == 0)
            assert lending.lender.counters.lent == count

    await some(100)  # what ZMQ keeps for the process, and memory that comes in larger portions
    gc.collect()
    before, memory = held_by_this_process(), psutil.Process().memory_info().rss
    await some(TRANSFERS)
    await eventually(lambda: held_by_this_process() <= before + FEW)
    gc.collect()
    assert psutil.Process().memory_info().rss - memory < 100 * 2**20


def deaf_borrower(descriptor: KvDescriptor) -> socket.socket:
    """Asks for all of it, as a ZMQ socket would (RFC 23 and 37), and never reads."""
    host, port = descriptor.data["address"].removeprefix("tcp://").split(":")
    connection = socket.create_connection((host, int(port)))
    null_mechanism = b"NULL".ljust(20, b"\0")
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    for sent, answer_size in (
        (b"\xff" + bytes(8) + b"\x7f\x03\x00" + null_mechanism + bytes(32), 64),
        (b"\x04" + bytes([len(ready)]) + ready, 43),
    ):
        connection.sendall(sent)
        assert len(connection.recv(answer_size, socket.MSG_WAITALL)) == answer_size
    data = descriptor.data
    pull = messages.encode(messages.Pull(data["process"], data["transfer"], 0))
    connection.sendall(b"\x00" + bytes([len(pull)]) + pull)
    return connection


@pytest.mark.parametrize("way", ["zmq"])
@pytest.mark.parametrize("end", ["dies", "hangs"])
async def test_what_a_peer_does_not_read_is_not_kept_for_ever(
    start: StartTransfer, end: str
) -> None:
    """Bytes on their way count as lent, though their lease has expired."""
    # For so long ZMQ keeps a peer that takes nothing; the lease itself the test ends.
    async with start(lease_s=60.0 if end == "dies" else 1.0) as lending:
        descriptor = lend(lending, 50_000_000)
        for loan in lending.lender._loans.values():
            loan.expiry.cancel()
        with deaf_borrower(descriptor) as connection:
            await eventually(lambda: lending.lender.counters.pulls == 1)
            expire(lending.lender)
            if end == "dies":
                assert lending.lender.lent_bytes == 50_000_000
                connection.close()
            await eventually(lambda: lending.lender.lent_bytes == 0)


async def test_a_lender_survives_nonsense(lending: KvTransfer, borrowing: KvTransfer) -> None:
    descriptor = lend(lending, 5000)
    request = messages.Pull(descriptor.data["process"], descriptor.data["transfer"], 0)
    nonsense = [
        [b""],
        [b"\xc1"],
        [b"", b""],
        [messages.encode(request), b"more"],
        [messages.encode({"type": "Pull"})],
        [messages.encode({"type": "Pull", "process": 1, "transfer": [], "first": None})],
        [messages.encode(messages.Pull(b"", b"", -1))],
        [messages.encode(messages.Pull(request.process, request.transfer, 2**63))],
        [messages.encode(messages.Pull(request.process, request.transfer, -1))],
    ]
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(descriptor.data["address"])
        for frames in nonsense:
            await dealer.send_multipart(frames)
            (answer,) = await dealer.recv_multipart()
            assert isinstance(messages.decode_answer(answer), messages.Refused)
        await dealer.send(bytes(1_000_000))  # ends the connection
        await dealer.send_multipart([bytes(3000)] * 3)
    got = await borrowing.borrower.fetch(descriptor, 0)
    assert bytes(got.buffer) == bytes(pieces_of(5000).buffer)
    with pytest.raises(KvTransferError):
        await borrowing.borrower.fetch(descriptor, 0)
