"""Whoever is to stop can wait until nothing is lent any more."""

import asyncio

from common.kv_transfer.start import KvTransfer
from tests.common.kv_transfer.conftest import StartTransfer
from tests.common.kv_transfer.kv_helpers import pieces_of


async def test_all_has_been_fetched(lending: KvTransfer, borrowing: KvTransfer) -> None:
    await lending.lender.nothing_lent()
    descriptors = [lending.lender.lend(pieces_of(5000, seed=seed)) for seed in range(2)]
    waiting = asyncio.create_task(lending.lender.nothing_lent())
    for descriptor in descriptors:
        assert not waiting.done()
        assert descriptor is not None
        await borrowing.borrower.fetch(descriptor, 0)
    await asyncio.wait_for(waiting, 30)
    assert lending.lender.lent_bytes == 0


async def test_nobody_came_for_it(start: StartTransfer) -> None:
    async with start(lease_s=0.01) as transfer:
        transfer.lender.lend(pieces_of(5000))
        await asyncio.wait_for(transfer.lender.nothing_lent(), 30)
        assert transfer.lender.counters.expired == 1
