"""Start a way of transfer by its name."""

import argparse
import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from common.errors import ComponentError
from common.kv_arguments import zmq_host
from common.kv_transfer.borrower import Borrower
from common.kv_transfer.lender import MAX_REQUEST_BYTES, Lender
from common.kv_transfer.lent_memory import LentMemory
from common.kv_transfer.nixl_agent import make_agent
from common.kv_transfer.nixl_reader import NixlReader

import zmq
import zmq.asyncio

Way = Literal["nixl", "zmq"]
WAYS: tuple[Way, ...] = ("nixl", "zmq")

MAX_LENT_BYTES = 2**30
LEASE_S = 30.0
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class KvTransfer:
    """The two sides of an engine; one that only decodes never lends."""

    lender: Lender
    borrower: Borrower


def add_kv_transfer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses the way; `--kv-host` says where, see `kv_arguments`."""
    parser.add_argument(
        "--kv-transfer",
        type=_way,
        metavar=f"{{{','.join(WAYS)}}}",
        default=os.environ.get("KV_TRANSFER", "zmq"),
        help="how the KV cache of a prompt moves between engines: nixl reads the other's memory "
        "(RDMA where there is any), zmq sends it over TCP (env KV_TRANSFER, %(default)s)",
    )


@asynccontextmanager
async def kv_transfer(
    way: Way,
    host: str,
    *,
    max_bytes: int = MAX_LENT_BYTES,
    lease_s: float = LEASE_S,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[KvTransfer]:
    """Lend at an address of this machine, and borrow from others, for the length of the block.

    Raises:
        ComponentError: the way is not to be had here, or the address is not this machine's.
    """
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        # A peer that takes nothing of what is sent to it must not keep it here for ever.
        socket.setsockopt(zmq.TCP_MAXRT, max(int(lease_s * 1000), 1))
        _bind(socket, host)
        memory, reader = None, None
        if way == "nixl":
            agent = await asyncio.to_thread(make_agent, secrets.token_hex(16))
            memory, reader = LentMemory(agent, max_bytes), NixlReader(agent)
        lender = Lender(way, socket, memory, max_bytes=max_bytes, lease_s=lease_s)
        borrower = Borrower(way, context, reader, timeout_s=timeout_s)
        try:
            yield KvTransfer(lender, borrower)
        finally:
            borrower.close()
            await lender.close()
    finally:
        context.destroy(linger=0)


def _bind(socket: zmq.asyncio.Socket, host: str) -> None:
    socket.ipv6 = ":" in host
    address = f"tcp://{zmq_host(host, 'lend KV')}:*"
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ComponentError(f"cannot lend KV: {error}") from error


def _way(name: str) -> str:
    if name not in WAYS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(WAYS)}")
    return name
