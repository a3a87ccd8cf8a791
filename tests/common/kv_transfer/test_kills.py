"""Processes that are killed in the middle of a transfer."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.pieces import KvPieces
from common.kv_transfer.start import KvTransfer
from common.protocol_transfer import KvDescriptor
from tests.common.kv_transfer.conftest import StartTransfer
from tests.common.kv_transfer.kv_helpers import (
    FEW,
    LOAN_BYTES,
    LOANS,
    WAYS,
    eventually,
    expire,
    held_by_this_process,
    pieces_of,
)
from tests.project_files import ROOT

import msgspec
import numpy as np
import pytest

KILLS = 3

pytestmark = pytest.mark.parametrize("way", [way for way in WAYS if "stand-in" not in way])


@asynccontextmanager
async def peer_process(role: str, way: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("peer_process.py")),
        role,
        way,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line.endswith(b"\n")
    return line.decode().strip()


async def kill_a_borrower(way: str, lending: KvTransfer, choice: random.Random) -> None:
    async with peer_process("borrow", way) as process:
        await line_of(process)
        loans = [lending.lender.lend(pieces_of(LOAN_BYTES)) for _ in range(LOANS)]
        wanted = lending.lender.counters.pulls + choice.randrange(1, LOANS)
        assert process.stdin is not None
        process.stdin.write(msgspec.msgpack.encode(loans).hex().encode() + b"\n")
        await eventually(lambda: lending.lender.counters.pulls >= wanted)
        process.kill()


async def test_borrowers_that_are_killed_leave_nothing_behind(
    way: str, start: StartTransfer
) -> None:
    choice = random.Random(8)
    async with start(lease_s=600.0, max_bytes=2**29) as lending:
        await kill_a_borrower(way, lending, choice)
        before = held_by_this_process()
        for _ in range(KILLS):
            await kill_a_borrower(way, lending, choice)
        expire(lending.lender)
        await eventually(lambda: lending.lender.lent_bytes == 0)
        await eventually(lambda: held_by_this_process() <= before + FEW)
        counters = lending.lender.counters
        assert counters.lent == counters.released + counters.expired == LOANS * (KILLS + 1)


async def test_a_lender_that_is_killed_fails_what_it_had_not_given_yet(
    way: str, borrowing: KvTransfer
) -> None:
    async with peer_process("lend", way) as process:
        descriptors = msgspec.msgpack.decode(
            bytes.fromhex(await line_of(process)), type=list[KvDescriptor]
        )
        fetches = [
            asyncio.create_task(borrowing.borrower.fetch(descriptor, 0))
            for descriptor in descriptors
        ]
        await eventually(lambda: borrowing.borrower.counters.fetched >= 2)
        process.kill()
        results = await asyncio.gather(*fetches, return_exceptions=True)
    for i, result in enumerate(results):
        if isinstance(result, KvPieces):
            assert np.array_equal(result.buffer, pieces_of(LOAN_BYTES, seed=i).buffer)
        else:
            assert isinstance(result, KvTransferError)
    with pytest.raises(KvTransferError, match="no connection"):
        await borrowing.borrower.fetch(descriptors[0], 0)
