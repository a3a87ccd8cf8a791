"""A process that lends or borrows until it is killed: `peer_process.py lend|borrow WAY`.

Lists of descriptors are lines of hexadecimal msgpack. One that lends prints such a line; one that
borrows prints an empty one when it can begin, and fetches what it reads.
"""

import asyncio
import sys
from typing import Any

from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.start import KvTransfer, kv_transfer
from common.protocol_transfer import KvDescriptor
from tests.common.kv_transfer.kv_helpers import HOST, LOAN_BYTES, LOANS, pieces_of

import msgspec


async def lend(transfer: KvTransfer) -> None:
    loans = [transfer.lender.lend(pieces_of(LOAN_BYTES, seed=i)) for i in range(LOANS)]
    print(msgspec.msgpack.encode(loans).hex(), flush=True)
    await asyncio.Event().wait()


async def borrow(transfer: KvTransfer) -> None:
    print(flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        descriptors = msgspec.msgpack.decode(bytes.fromhex(line), type=list[KvDescriptor])
        fetches = [transfer.borrower.fetch(descriptor, 0) for descriptor in descriptors]
        for result in await asyncio.gather(*fetches, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, KvTransferError):
                raise result


async def main(role: str, way: Any) -> None:
    async with kv_transfer(way, HOST) as transfer:
        await (lend if role == "lend" else borrow)(transfer)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
