"""What `benchmarks.kv_transfer` compares: ways for bytes to get from one process to another."""

import asyncio
import importlib.util
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from common.errors import ComponentError
from common.kv_transfer.pieces import KvPieces
from common.kv_transfer.start import WAYS, KvTransfer, Way, kv_transfer

import numpy as np
import uvloop
from numpy.typing import NDArray

HOST = "127.0.0.1"
TIMEOUT_S = 120.0
PIECE_BYTES = 16 * 23_053  # a block of 16 tokens of SmolLM2-135M, by its 23,053 bytes a token
MEMCPY, NEW_MEMORY, SHARED = "memcpy", "memcpy, new memory", "shared memory"

# Moves `size` bytes, those of transfer `number`: the seconds, and what came.
Copy = Callable[[int, int], Awaitable[tuple[float, NDArray[np.uint8]]]]


def content(size: int) -> NDArray[np.uint8]:
    """What is moved, but for its stamp; both processes can make it."""
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def stamp(data: NDArray[np.uint8], number: int) -> None:
    """Make every page another one than it was: what an earlier transfer left is then wrong."""
    data[::4096] = number % 256


def lend_in_process(pipe: Connection) -> None:
    """The other process: lends what it is told to, until it is told None."""
    uvloop.run(_lend(pipe))


async def _lend(pipe: Connection) -> None:
    data = np.empty(0, np.uint8)
    async with AsyncExitStack() as stack:
        transfers: dict[Way, KvTransfer] = {}
        for way in available_ways():
            transfers[way] = await stack.enter_async_context(
                kv_transfer(way, HOST, timeout_s=TIMEOUT_S)
            )
        pipe.send("ready")
        while (order := await asyncio.to_thread(pipe.recv)) is not None:
            way, size, number = order
            if size != data.size:
                data = content(size)
            stamp(data, number)
            if way == SHARED:
                await _share(pipe, data)
                continue
            pieces = KvPieces(data, 0, -(-size // PIECE_BYTES) * 16, PIECE_BYTES)
            start = time.perf_counter()
            pipe.send((start, transfers[way].lender.lend(pieces)))


async def _share(pipe: Connection, data: NDArray[np.uint8]) -> None:
    memory = SharedMemory(create=True, size=data.size)
    try:
        np.ndarray(data.size, np.uint8, memory.buf)[:] = data
        pipe.send(memory.name)
        await asyncio.to_thread(pipe.recv)
    finally:
        memory.close()
        memory.unlink()


class Contenders:
    """Everything that moves bytes, by its name; see `contenders`."""

    def __init__(self, pipe: Connection, transfers: dict[Way, KvTransfer]) -> None:
        self._pipe = pipe
        self._transfers = transfers
        self._source = self._target = np.empty(0, np.uint8)
        self.by_name: dict[str, Copy] = {
            MEMCPY: self._memcpy,
            NEW_MEMORY: self._memcpy_new,
            SHARED: self._shared_memory,
            **{way: self._fetching(way) for way in transfers},
        }

    def _prepare(self, size: int, number: int) -> None:
        if self._source.size != size:
            self._source, self._target = content(size), np.zeros(size, np.uint8)
        stamp(self._source, number)

    async def _memcpy(self, size: int, number: int) -> tuple[float, NDArray[np.uint8]]:
        self._prepare(size, number)
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start, self._target

    async def _memcpy_new(self, size: int, number: int) -> tuple[float, NDArray[np.uint8]]:
        self._prepare(size, number)
        start = time.perf_counter()
        copy = self._source.copy()
        return time.perf_counter() - start, copy

    async def _shared_memory(self, size: int, number: int) -> tuple[float, NDArray[np.uint8]]:
        memory = SharedMemory(await self._ask(SHARED, size, number))
        try:
            shared = np.ndarray(size, np.uint8, memory.buf)
            start = time.perf_counter()
            copy = shared.copy()
            seconds = time.perf_counter() - start
            del shared  # before its memory
        finally:
            memory.close()
            self._pipe.send("read")
        return seconds, copy

    def _fetching(self, way: Way) -> Copy:
        async def fetch(size: int, number: int) -> tuple[float, NDArray[np.uint8]]:
            start, descriptor = await self._ask(way, size, number)
            pieces = await self._transfers[way].borrower.fetch(descriptor, 0)
            return time.perf_counter() - start, pieces.buffer  # that clock is the system's

        return fetch

    async def _ask(self, way: str, size: int, number: int) -> Any:
        self._pipe.send((way, size, number))
        return await asyncio.to_thread(self._pipe.recv)


@asynccontextmanager
async def contenders() -> AsyncIterator[Contenders]:
    """Both processes, for the length of the block.

    Raises:
        ComponentError: a way of transfer does not work here.
    """
    context = multiprocessing.get_context("spawn")
    async with AsyncExitStack() as stack:
        transfers: dict[Way, KvTransfer] = {}
        for way in available_ways():
            transfers[way] = await stack.enter_async_context(
                kv_transfer(way, HOST, timeout_s=TIMEOUT_S)
            )
        pipe, other = context.Pipe()
        process = context.Process(target=lend_in_process, args=(other,), daemon=True)
        process.start()
        other.close()
        try:
            await asyncio.to_thread(pipe.recv)
            yield Contenders(pipe, transfers)
            pipe.send(None)
            await asyncio.to_thread(process.join)
        except (EOFError, ConnectionError) as error:
            raise ComponentError("the process that lends has ended") from error
        finally:
            process.kill()
            process.join()
            pipe.close()


def available_ways() -> list[Way]:
    return [way for way in WAYS if way == "zmq" or importlib.util.find_spec("nixl")]
