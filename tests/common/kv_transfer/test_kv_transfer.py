"""KV goes from a lender to a borrower, whole or in part, and never wrong."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from common.kv_transfer import connections
from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.start import KvTransfer
from common.protocol_transfer import KvDescriptor
from tests.common.kv_transfer.conftest import StartTransfer
from tests.common.kv_transfer.kv_helpers import (
    PIECE,
    StandInAgent,
    eventually,
    fake_lender,
    pieces_of,
)

import msgspec
import numpy as np
import pytest


def lend(transfer: KvTransfer, size: int, first: int = 0, seed: int = 0) -> KvDescriptor:
    """Lend KV; the descriptor as it arrives elsewhere."""
    descriptor = transfer.lender.lend(pieces_of(size, first, seed))
    assert descriptor is not None
    return msgspec.msgpack.decode(msgspec.msgpack.encode(descriptor), type=KvDescriptor)


@pytest.mark.parametrize("size", [1, PIECE, 2 * PIECE + 1, 20_000_000])
async def test_what_arrives_is_what_was_lent(
    lending: KvTransfer, borrowing: KvTransfer, size: int
) -> None:
    lent = pieces_of(size)
    got = await borrowing.borrower.fetch(lend(lending, size), 0)
    assert np.array_equal(got.buffer, lent.buffer)
    assert (got.first, got.tokens, got.piece_bytes, got.end) == (0, 777, PIECE, lent.end)
    assert borrowing.borrower.counters.fetched_bytes == size
    await eventually(lambda: lending.lender.lent_bytes == 0)


@pytest.mark.parametrize(("block", "rest"), [(5, 3300), (6, 2300), (8, 300)])
async def test_only_the_blocks_asked_for_travel(
    lending: KvTransfer, borrowing: KvTransfer, block: int, rest: int
) -> None:
    lent = pieces_of(3300, first=5)
    got = await borrowing.borrower.fetch(lend(lending, 3300, first=5), block)
    assert (got.first, got.end, got.size) == (block, 9, rest)
    assert [bytes(got.piece(i)) for i in range(block, 9)] == [
        bytes(lent.piece(i)) for i in range(block, 9)
    ]
    assert lending.lender.counters.pulled_bytes == rest


async def test_several_fetches_from_several_lenders_at_once(
    start: StartTransfer, borrowing: KvTransfer
) -> None:
    async with AsyncExitStack() as stack:
        lenders = [await stack.enter_async_context(start()) for _ in range(3)]
        sizes = [(i * 37_000 + 1, lender) for i in range(8) for lender in lenders]
        got = await asyncio.gather(
            *(borrowing.borrower.fetch(lend(lender, size), 0) for size, lender in sizes)
        )
        for (size, _), pieces in zip(sizes, got, strict=True):
            assert np.array_equal(pieces.buffer, pieces_of(size).buffer)
        for lender in lenders:
            await eventually(lambda lender=lender: lender.lender.lent_bytes == 0)  # type: ignore[misc]


async def test_nothing_is_lent_twice(lending: KvTransfer, borrowing: KvTransfer) -> None:
    descriptor = lend(lending, 10)
    await borrowing.borrower.fetch(descriptor, 0)
    with pytest.raises(KvTransferError, match="does not have it any more"):
        await borrowing.borrower.fetch(descriptor, 0)
    assert borrowing.borrower.counters.failed == 1


async def test_what_does_not_fit_is_not_lent_and_room_comes_back(
    start: StartTransfer, borrowing: KvTransfer
) -> None:
    async with start(max_bytes=40_000) as transfer:
        assert transfer.lender.lend(pieces_of(40_001)) is None
        first = lend(transfer, 20_000)
        second = lend(transfer, 16_000)
        assert transfer.lender.lend(pieces_of(4_097)) is None
        await eventually(lambda: transfer.lender.lent_bytes == 36_000)
        await borrowing.borrower.fetch(second, 0)
        transfer.lender.withdraw(first)
        transfer.lender.withdraw(first)
        await eventually(lambda: transfer.lender.lent_bytes == 0)
        lend(transfer, 40_000)
        assert transfer.lender.counters.refused == 2


async def test_what_nobody_fetches_expires(start: StartTransfer, borrowing: KvTransfer) -> None:
    async with start(lease_s=0.01) as transfer:
        descriptor = lend(transfer, 5000)
        await eventually(lambda: transfer.lender.lent_bytes == 0)
        assert transfer.lender.counters.expired == 1
        with pytest.raises(KvTransferError, match="does not have it any more"):
            await borrowing.borrower.fetch(descriptor, 0)


async def test_a_borrower_can_give_back_what_it_does_not_need(
    lending: KvTransfer, borrowing: KvTransfer
) -> None:
    descriptor = lend(lending, 5000)
    await borrowing.borrower.release(descriptor)
    await eventually(lambda: lending.lender.lent_bytes == 0)
    with pytest.raises(KvTransferError, match="does not have it any more"):
        await borrowing.borrower.release(descriptor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transfer": b"guessed"}, "does not have it any more"),
        ({"process": b"before the restart"}, "has been restarted"),
        ({"size": 2000}, r"sent .*5000.* bytes, not 2000"),
        ({"size": 0}, "not a descriptor"),
        ({"piece_bytes": 0}, "not a descriptor"),
        ({"first": -1}, "not a descriptor"),
        ({"first": "0"}, "not a descriptor.*first"),
        ({"address": "no address"}, "cannot connect"),
        ({"address": "tcp://127.0.0.1:1"}, "no connection to tcp://127.0.0.1:1"),
        ({"nonsense": 1}, "not a descriptor"),
    ],
)
async def test_a_wrong_descriptor_is_an_error(
    lending: KvTransfer, start: StartTransfer, change: dict[str, Any], message: str
) -> None:
    descriptor = lend(lending, 5000)
    descriptor.data.update(change)
    async with start(timeout_s=20.0) as borrowing:
        with pytest.raises(KvTransferError, match=message):
            await borrowing.borrower.fetch(descriptor, 0)


async def test_an_unknown_host_is_an_error(lending: KvTransfer, start: StartTransfer) -> None:
    """It may take long to learn that there is none."""
    descriptor = lend(lending, 5000)
    descriptor.data["address"] = "tcp://no-such-host.invalid:1"
    async with start(timeout_s=2.0) as borrowing:
        with pytest.raises(KvTransferError, match=r"no connection|no KV|cannot connect"):
            await borrowing.borrower.fetch(descriptor, 0)


@pytest.mark.parametrize("block", [-1, 5])
async def test_a_block_that_is_not_lent_is_an_error(
    lending: KvTransfer, borrowing: KvTransfer, block: int
) -> None:
    with pytest.raises(KvTransferError, match=f"block {block} is not one of 0 to 4"):
        await borrowing.borrower.fetch(lend(lending, 5000), block)


async def test_another_kind_of_descriptor_is_an_error(borrowing: KvTransfer) -> None:
    with pytest.raises(KvTransferError, match="lent by 'sglang'"):
        await borrowing.borrower.fetch(KvDescriptor("sglang", 3, {"room": 1}), 0)


PULLED = {"type": "Pulled", "size": 5000}
REFUSED = {"type": "Refused", "reason": "it has expired"}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "no KV from .* within"),
        ([[b"\xc1"]], "no valid answer"),
        ([[b""]], "no valid answer"),
        ([[{"type": "Surprise"}]], "no valid answer"),
        ([[{"type": "Released"}]], "answered with Released"),
        ([[{"type": "Pulled", "size": 4999}, bytes(4999)]], "bytes, not 5000"),
        ([[PULLED, bytes(4999), b"1"]], "bytes, not 5000"),
        ([[REFUSED]], "it has expired"),
    ],
)
async def test_a_wrong_answer_is_an_error(
    lending: KvTransfer, start: StartTransfer, answers: list[list[Any]], message: str
) -> None:
    descriptor = lend(lending, 5000)
    timeout_s = 20.0 if answers else 0.5
    async with fake_lender(answers) as address, start(timeout_s=timeout_s) as borrowing:
        descriptor.data["address"] = address
        with pytest.raises(KvTransferError, match=message):
            await borrowing.borrower.fetch(descriptor, 0)


@pytest.mark.parametrize("way", ["zmq"])
@pytest.mark.parametrize("frames", [[PULLED], [PULLED, bytes(4999)], [PULLED, bytes(5001)]])
async def test_too_little_data_is_an_error(
    lending: KvTransfer, start: StartTransfer, frames: list[Any]
) -> None:
    descriptor = lend(lending, 5000)
    async with fake_lender([frames]) as address, start(timeout_s=20.0) as borrowing:
        descriptor.data["address"] = address
        with pytest.raises(KvTransferError, match="bytes, not 5000"):
            await borrowing.borrower.fetch(descriptor, 0)


@pytest.mark.parametrize("way", ["zmq"])
async def test_data_that_expired_while_it_was_read_is_not_used(
    lending: KvTransfer, borrowing: KvTransfer
) -> None:
    """The memory may have been lent to another one meanwhile."""
    descriptor = lend(lending, 5000)
    async with fake_lender([[PULLED, bytes(5000)], [REFUSED]]) as address:
        descriptor.data["address"] = address
        with pytest.raises(KvTransferError, match="it has expired"):
            await borrowing.borrower.fetch(descriptor, 0)


async def test_a_lender_that_goes_away_is_noticed_at_once(
    start: StartTransfer, borrowing: KvTransfer
) -> None:
    """With a kept connection as well as with a new one."""
    async with start() as lending:
        await borrowing.borrower.fetch(lend(lending, 10), 0)
        descriptor = lend(lending, 10)
    for _ in range(2):
        with pytest.raises(KvTransferError, match="no connection to"):
            await borrowing.borrower.fetch(descriptor, 0)


async def test_the_connection_to_a_lender_that_is_gone_is_closed_without_another_fetch(
    start: StartTransfer, borrowing: KvTransfer
) -> None:
    connections = borrowing.borrower._connections
    async with start() as lending:
        await borrowing.borrower.fetch(lend(lending, 10), 0)
        assert len(connections._idle) == 1
    await eventually(lambda: not connections._idle)


async def test_a_lender_that_closes_fails_what_is_going_on(start: StartTransfer) -> None:
    async with fake_lender([]) as address, start() as lending:
        descriptor = lend(lending, 10)
        descriptor.data["address"] = address
        async with start() as borrowing:
            fetching = asyncio.create_task(borrowing.borrower.fetch(descriptor, 0))
            await asyncio.sleep(0)
        with pytest.raises(KvTransferError, match="no connection to"):
            await fetching


async def test_a_fetch_that_is_cancelled_gives_back_what_was_lent(
    lending: KvTransfer, borrowing: KvTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FAREWELL_MS", 20_000)  # a busy machine may need longer
    for turns in range(1, 30):  # at whatever it is doing by then
        fetching = asyncio.create_task(borrowing.borrower.fetch(lend(lending, 3000), 0))
        for _ in range(turns):
            await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    await eventually(lambda: lending.lender.lent_bytes == 0)
    assert lending.lender.counters.expired == 0


@pytest.mark.parametrize("way", ["nixl stand-in"])
async def test_a_read_that_fails_is_an_error_and_the_next_one_begins_anew(
    lending: KvTransfer, borrowing: KvTransfer, agents: list[StandInAgent]
) -> None:
    agent = agents[1]
    agent.broken = True
    with pytest.raises(KvTransferError, match="NIXL_ERR_REMOTE_DISCONNECT"):
        await borrowing.borrower.fetch(lend(lending, 5000), 0)
    assert (len(agent.registered), agent.peers, agent.transfers) == (1, [], [])
    agent.broken = False
    await borrowing.borrower.fetch(lend(lending, 5000), 0)
    await borrowing.borrower.fetch(lend(lending, 5000), 0)
    assert agent.peers == [agents[0].name]


@pytest.mark.parametrize("way", ["nixl stand-in"])
async def test_a_read_that_never_ends_is_given_up(
    lending: KvTransfer, start: StartTransfer, agents: list[StandInAgent]
) -> None:
    async with start(timeout_s=0.1) as borrowing:
        agents[1].delay = 10**9
        with pytest.raises(KvTransferError, match=r"no KV from .* within"):
            await borrowing.borrower.fetch(lend(lending, 5000), 0)
        await eventually(lambda: len(agents[1].registered) == 1)
    assert agents[1].registered == agents[1].transfers == []
