"""Both ways of transfer for tests, and a lender that does what it should not."""

import asyncio
import ctypes
import importlib.util
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from common.kv_transfer.lender import Lender
from common.kv_transfer.pieces import KvPieces

import msgspec
import numpy as np
import zmq
import zmq.asyncio

HOST = "127.0.0.1"
PIECE = 1000
PATIENCE_S = 30.0

FEW = 5  # descriptors and threads that the libraries may keep, whatever they did

LOANS, LOAN_BYTES = 20, 3_000_000  # of a process that is killed while they are fetched

# NIXL's own agent where it is installed; everywhere one that reads this process's memory.
WAYS = ["zmq", "nixl stand-in", *(["nixl"] if importlib.util.find_spec("nixl") else [])]


def pieces_of(size: int, first: int = 0, seed: int = 0) -> KvPieces:
    buffer = np.random.default_rng([seed, size]).integers(0, 256, size, dtype=np.uint8)
    return KvPieces(buffer, first, 777, PIECE)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.002)


def expire(lender: Lender) -> None:
    """All leases are over now; the clock would end them at whatever moment."""
    for transfer, loan in list(lender._loans.items()):
        loan.expiry.cancel()
        lender._expire(transfer)


def held_by_this_process() -> int:
    """File descriptors and threads, but for those that the event loop keeps for `to_thread`."""
    kept = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task")) - kept


class StandInAgent:
    """The part of `nixl_agent` that is used, within one process.

    `delay` is how often a transfer is asked for its state before it is done; with `broken` it
    fails as NIXL does, with an exception of its own.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.registered: list[Any] = []
        self.peers: list[str] = []
        self.transfers: list[Any] = []
        self.delay = 0
        self.broken = False

    def register_memory(self, regions: list[Any], kind: str) -> list[Any]:
        assert kind == "DRAM"
        self.registered += regions
        return regions

    def deregister_memory(self, regions: list[Any]) -> None:
        for region in regions:
            self.registered.remove(region)

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        self.peers.append(metadata.decode())
        return self.peers[-1]

    def remove_remote_agent(self, name: str) -> None:
        self.peers.remove(name)

    def get_xfer_descs(self, regions: list[Any], kind: str) -> list[Any]:
        assert kind == "DRAM"
        return regions

    def initialize_xfer(self, operation: str, own: Any, theirs: Any, peer: str) -> list[Any]:
        assert operation == "READ"
        assert peer in self.peers
        self.transfers.append([own, theirs, self.delay])
        return self.transfers[-1]  # type: ignore[no-any-return]

    def transfer(self, transfer: list[Any]) -> str:
        if self.broken:
            raise RuntimeError("NIXL_ERR_REMOTE_DISCONNECT")
        return self.check_xfer_state(transfer)

    def check_xfer_state(self, transfer: list[Any]) -> str:
        ((own, size, _),), ((theirs, _, _),), delay = transfer
        if delay:
            transfer[2] -= 1
            return "PROC"
        ctypes.memmove(own, theirs, size)
        return "DONE"

    def release_xfer_handle(self, transfer: list[Any]) -> None:
        self.transfers[:] = [one for one in self.transfers if one is not transfer]


@asynccontextmanager
async def fake_lender(answers: Sequence[Sequence[Any]]) -> AsyncIterator[str]:
    """The address of a lender that gives these answers, then none; bytes go as they are."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(f"tcp://{HOST}:*")

        async def serve() -> None:
            for answer in answers:
                peer, _ = await socket.recv_multipart()
                frames = [
                    frame if isinstance(frame, bytes) else msgspec.msgpack.encode(frame)
                    for frame in answer
                ]
                await socket.send_multipart([peer, *frames])

        serving = asyncio.create_task(serve())
        try:
            yield socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
