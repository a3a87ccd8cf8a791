"""KV goes from a lender to a borrower, whole or in part, and never wrong."""

from collections.abc import AsyncIterator

from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.pieces import KvPieces
from common.kv_transfer.start import KvTransfer, kv_transfer

import numpy as np
import pytest

HOST = "127.0.0.1"
PIECE = 1000


def pieces_of(size: int, seed: int = 0, first: int = 0) -> KvPieces:
    buffer = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return KvPieces(buffer, first, 777, PIECE)


@pytest.fixture
async def lending() -> AsyncIterator[KvTransfer]:
    async with kv_transfer("zmq", HOST) as transfer:
        yield transfer


@pytest.fixture
async def borrowing() -> AsyncIterator[KvTransfer]:
    async with kv_transfer("zmq", HOST) as transfer:
        yield transfer


@pytest.mark.parametrize("size", [1, PIECE, 2 * PIECE + 1, 3_000_000])
async def test_what_arrives_is_what_was_lent(
    lending: KvTransfer, borrowing: KvTransfer, size: int
) -> None:
    lent = pieces_of(size)
    descriptor = lending.lender.lend(lent)
    assert descriptor is not None
    got = await borrowing.borrower.fetch(descriptor, 0)
    assert bytes(got.buffer) == bytes(lent.buffer)
    assert (got.first, got.tokens, got.piece_bytes, got.end) == (0, 777, PIECE, lent.end)


async def test_nothing_is_lent_twice(lending: KvTransfer, borrowing: KvTransfer) -> None:
    descriptor = lending.lender.lend(pieces_of(10))
    assert descriptor is not None
    await borrowing.borrower.fetch(descriptor, 0)
    with pytest.raises(KvTransferError, match="does not have it any more"):
        await borrowing.borrower.fetch(descriptor, 0)
